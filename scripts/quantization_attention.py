"""Attention in 8 bits: at which numbers of tokens TensorRT-RTX fuses it."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from quantization_bench import Bench, row

from msn_export.calibration.plan import BLOCK_ROLES, Plan
from msn_export.calibration.qdq import FORMATS, Scheme, find_operands, find_projections
from msn_export.engine.build import build_engine
from msn_export.engine.options import BuildSpec, find_backend
from msn_export.graph import io
from msn_export.graph.fuse import fuse_attention
from msn_export.graph.precision import type_graph
from msn_export.spec import AttentionForm, BatchRange, ComputeCapability, Dtype
from tests.builders import engine_graphs

TOKENS = ((32, 8), (56, 8), (64, 8), (224, 16), (352, 16), (368, 16), (512, 16))


def attention_rows(bench: Bench) -> list[str]:
    """Compile one block with 8-bit attention, at several numbers of tokens."""
    rows = []
    for size, patch in TOKENS:
        vit = engine_graphs.Vit(dtype="fp32", depth=1, dim=384, heads=6, size=size, patch=patch)
        cells = []
        for form in (Dtype.INT8, Dtype.FP8):
            with tempfile.TemporaryDirectory(dir=bench.folder) as name:
                kernels, fused = compile_attention(vit, form, Path(name))
            cells.append(f"{'fused' if fused else 'not fused'} ({kernels} kernels)")
        rows.append(row(vit.tokens, *cells))
        print(rows[-1], flush=True)
    return rows


def compile_attention(vit: engine_graphs.Vit, form: Dtype, folder: Path) -> tuple[int, int]:
    """Quantise a graph with its attention, however many tokens; count kernels, and fused ones."""
    model = io.load(engine_graphs.save(vit, folder / "m.onnx"))
    io.infer_shapes(model)
    fuse_attention(model, AttentionForm.PLAIN)
    projections = tuple(p for p in find_projections(model) if p.role in BLOCK_ROLES)
    # not Plan.of, which refuses what is to be shown here
    plan = Plan(model, Scheme(FORMATS[form], Dtype.FP16), projections, find_operands(model))
    limits = dict.fromkeys(plan.watched, 4.0) | {core.p: 1.0 for core in plan.operands}
    model = replace(plan, thresholds=limits).quantised()
    type_graph(model, Dtype.FP16, {})
    io.save(model, folder / "typed.onnx")
    spec = BuildSpec(
        folder / "typed.onnx", (BatchRange(1, 8, 32),), (ComputeCapability(8, 9),), precision=form
    )
    census = build_engine(spec, find_backend("tensorrt-rtx"), folder / "m.engine").census
    return len(census.kernels), len(census.fused_attention)
