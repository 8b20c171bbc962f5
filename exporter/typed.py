"""Carry out a choice of precision on a graph, and run what came of it on the CPU."""

import math
from pathlib import Path

import onnx_ir as ir

from msn_export.check.sample import Sample
from msn_export.graph import io
from msn_export.graph.emulate import emulate_bf16
from msn_export.graph.precision import type_graph
from msn_export.islands import decide
from msn_export.runtime.ort import OrtRunner
from msn_export.spec import Dtype, InputKind


def type_as(
    model: ir.Model, dtype: Dtype, islands: str, sample: Sample, stem: InputKind, stage: Path
) -> dict[str, float]:
    """Type an fp32 graph in place.

    Returns:
        The values and weights that stay fp32 with their largest absolute value; infinity for a
        weight that overflows by itself.

    Raises:
        GraphError: the islands file does not fit, or the graph cannot be typed.
    """
    if dtype is Dtype.FP32:
        return {}
    measured = decide(model, islands, dtype, sample, stem, stage)
    typed = type_graph(model, dtype, measured)
    return {name: measured.get(name, math.inf) for name in typed.islands}


def cpu_runner(path: Path, dtype: Dtype, stage: Path) -> OrtRunner:
    """Open a graph in onnxruntime on the CPU; bf16, which has no kernels there, is emulated."""
    if dtype is not Dtype.BF16:
        return OrtRunner(path)
    emulated = stage / "emulated.onnx"
    io.save(emulate_bf16(io.load(path)), emulated)
    runner = OrtRunner(emulated)
    emulated.unlink()
    runner.name += " (bf16 emulated: fp32 arithmetic, every value rounded to bf16)"
    return runner
