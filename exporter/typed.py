"""Carry out a choice of precision on a graph, and run what came of it on the CPU."""

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx_ir as ir

from msn_export.check.sample import Sample
from msn_export.graph import io
from msn_export.graph.emulate import emulate_bf16, has_bf16
from msn_export.graph.precision import type_graph
from msn_export.islands import decide
from msn_export.runtime.ort import OrtRunner
from msn_export.spec import Dtype, InputKind


@dataclass(frozen=True, slots=True)
class Islands:
    """What stays fp32: values and weights with their largest absolute value, and the nodes.

    A value that was named and not measured has infinity.
    """

    maxima: dict[str, float]
    nodes: tuple[str, ...] = ()


def type_as(
    model: ir.Model, dtype: Dtype, choice: str, sample: Sample, stem: InputKind, stage: Path
) -> Islands:
    """Type an fp32 graph in place; ``choice`` is ``measured``, ``none`` or an islands file.

    Raises:
        GraphError: the islands file does not fit, or the graph cannot be typed.
    """
    measured = decide(model, choice, dtype, sample, stem, stage)
    typed = type_graph(model, dtype, measured)
    peaks = {**measured, **typed.weights}
    return Islands({name: peaks.get(name, math.inf) for name in typed.islands}, typed.fp32_nodes)


def cpu_runner(path: Path, dtype: Dtype, stage: Path) -> OrtRunner:
    """Open a graph in onnxruntime on the CPU; bf16, which has no kernels there, is emulated."""
    if dtype is not Dtype.BF16 and not dtype.is_quantised:
        return OrtRunner(path)
    model = io.load(path)
    if not has_bf16(model):  # a quantised graph's other half
        return OrtRunner(path)
    with TemporaryDirectory(dir=stage) as own:
        emulated = Path(own) / "emulated.onnx"
        io.save(emulate_bf16(model), emulated)
        runner = OrtRunner(emulated)
    runner.name += " (bf16 emulated: fp32 arithmetic, every value rounded to bf16)"
    return runner
