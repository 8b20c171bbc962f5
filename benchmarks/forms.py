"""Count and time every form of attention and of the last block: what a target's form rests on.

    python benchmarks/forms.py [--variant vit-msn-small] [--rounds 30]

Kernels: fp16, TensorRT-RTX for SM 8.9, compiled without a GPU. Milliseconds: fp32, onnxruntime on the
CPU with two threads, all forms by turns in random order.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from msn_export.engine.build import build_engine
from msn_export.engine.options import BuildSpec, find_backend
from msn_export.errors import BuildError
from msn_export.graph import io
from msn_export.graph.cls_only import narrow_to_first_token
from msn_export.graph.fuse import fuse_attention
from msn_export.graph.precision import type_graph
from msn_export.graph.summary import macs
from msn_export.graph.torch_reference import trace
from msn_export.host import this_machine
from msn_export.models.checkpoint import load_checkpoint
from msn_export.models.vit import VitMsn
from msn_export.preprocessing import preset
from msn_export.spec import (
    AttentionForm,
    BatchRange,
    ComputeCapability,
    Dtype,
    Head,
    ImageSize,
    InputFormat,
)

RESULTS = Path(__file__).parent / "results" / "forms.json"
ROWS = {
    "full": (),
    "last block for [CLS], one projection": (False,),
    "last block for [CLS], queries apart": (True,),
}


def main() -> None:
    """Build every form, compile it, time it, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="vit-msn-small")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    module = load_checkpoint(f"random:{options.variant}:0").model
    found: list[dict[str, Any]] = []
    sessions = []
    with tempfile.TemporaryDirectory() as name:
        for row, narrowed in ROWS.items():
            for form in AttentionForm:
                graph = Path(name) / f"{len(found)}.onnx"
                try:
                    model = written(module, form, narrowed)
                except Exception as error:  # noqa: BLE001  a form that cannot be written is a row
                    print(f"{row}, {form}: {error}", flush=True)
                    continue
                io.save(model, graph)
                facts: dict[str, Any] = {
                    "nodes": len(model.graph),
                    "multiply_adds": macs(model),
                }
                facts["kernels"], facts["fused"] = kernels(model, Path(name))
                found.append({"last block": row, "form": form.value} | facts)
                sessions.append(opened(graph))
        times = timed(sessions, options.batch, options.rounds)
    for facts, taken in zip(found, times, strict=True):
        facts["ms"] = statistics.median(taken)
        facts["ratio"] = statistics.median(a / b for a, b in zip(taken, times[0], strict=True))
        print(
            f"| {facts['last block']} | {facts['form']} | {facts['nodes']} | "
            f"{facts['multiply_adds'] / 1e9:.3f} | {facts['kernels']} | {facts['fused']} | "
            f"{facts['ms']:.1f} | {facts['ratio']:.3f} |"
        )
    told = {"variant": options.variant, "batch": options.batch, "machine": asdict(this_machine())}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(told | {"forms": found}, indent=2) + "\n")


def traced(module: VitMsn, head: Head) -> ir.Model:
    """Trace bytes to a head."""
    return trace(
        module,
        heads=[head],
        input_format=InputFormat.UINT8,
        batch=BatchRange(),
        preprocessing=preset("hf", ImageSize(*module.config.image_size)),
    )


def written(module: VitMsn, form: AttentionForm, narrowed: tuple[bool, ...]) -> ir.Model:
    """Trace bytes to a [CLS] embedding, and write it in one form."""
    model = traced(module, Head.CLS)
    for split in narrowed:
        narrow_to_first_token(model, split_projection=split)
    fuse_attention(model, form, expected=module.config.depth)
    return model


def kernels(model: ir.Model, folder: Path) -> tuple[int | None, int | None]:
    """Compile in fp16; no count where this compiler has no kernel for the form."""
    path = folder / "half.onnx"
    half = ir.from_proto(ir.to_proto(model))
    type_graph(half, Dtype.FP16, {})
    io.save(half, path)
    spec = BuildSpec(path, (BatchRange(),), (ComputeCapability(8, 9),), precision=Dtype.FP16)
    try:
        census = build_engine(spec, find_backend("tensorrt-rtx"), folder / "half.engine").census
    except BuildError:
        return None, None
    return len(census.kernels), len(census.fused_attention)


def opened(path: Path, threads: int = 2) -> onnxruntime.InferenceSession:
    """Open on the CPU with threads that do not spin while others take their turn."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def timed(
    sessions: list[onnxruntime.InferenceSession], batch: int, rounds: int
) -> list[list[float]]:
    """Run all by turns, and give milliseconds of each."""
    shape = (batch, *sessions[0].get_inputs()[0].shape[1:])
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    times: list[list[float]] = [[] for _ in sessions]
    order = list(range(len(sessions)))
    for index in order:
        sessions[index].run(None, {"images": images})
    for _ in range(rounds):
        random.shuffle(order)
        for index in order:
            started = time.perf_counter()
            sessions[index].run(None, {"images": images})
            times[index].append(1e3 * (time.perf_counter() - started))
    return times


if __name__ == "__main__":
    main()
