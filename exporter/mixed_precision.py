"""Graphs in half precision: the choice of values that stay fp32, typing, and runs on the CPU."""

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
import onnxruntime

from msn_export.errors import GraphError, ManifestError
from msn_export.graph import io
from msn_export.graph.emulate import emulate_bf16, has_bf16
from msn_export.graph.precision import choose, observe, type_graph
from msn_export.input_files import ISLANDS, read_json
from msn_export.metrics.evaluate import Sample
from msn_export.metrics.tolerances import HEADROOM
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.schema import from_plain
from msn_export.spec import Dtype, InputFormat

MEASURED = "measured"
NONE = "none"


def choose_fp32_islands(
    model: ir.Model,
    choice: str,
    dtype: Dtype,
    sample: Sample,
    input_format: InputFormat,
    stage: Path,
) -> dict[str, float]:
    """Choose the values that stay fp32, each with its largest absolute value over the images.

    ``choice`` is ``measured``, ``none``, or the path of a JSON object of name to maximum. bf16 has
    fp32's range: it never needs an island. ``stage`` is a folder for the instrumented graph.
    """
    if choice == NONE or dtype is not Dtype.FP16:
        return {}
    if choice == MEASURED:
        return choose(measure(model, sample, input_format, stage), dtype, headroom=HEADROOM)
    return _read(Path(choice))


def measure(
    model: ir.Model, sample: Sample, input_format: InputFormat, stage: Path
) -> dict[str, float]:
    observed = observe(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    # by default it runs the graph first and takes the maxima after, all values in memory:
    # 5.1 GB instead of 2.0 for one image of vit-msn-base-4
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    with TemporaryDirectory(dir=stage) as own:
        path = Path(own) / "observed.onnx"
        io.save(observed.model, path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    # a graph of one batch size takes no other: its last batch starts over with the first image
    fixed = taken.shape[0] if isinstance(taken.shape[0], int) else None
    batch = fixed or min(4, sample.max_batch)
    peaks = np.zeros(len(observed.names), np.float32)
    for start in range(0, len(sample), batch):
        end = start + batch if fixed else min(start + batch, len(sample))
        images = sample.preprocess(range(start, end), input_format)
        (maxima,) = session.run(None, {taken.name: images})
        peaks = np.maximum(peaks, maxima)
    return dict(zip(observed.names, (float(peak) for peak in peaks), strict=True))


def _read(path: Path) -> dict[str, float]:
    listed = read_json(path, ISLANDS)
    try:
        peaks = from_plain(dict[str, float | None], listed, "islands")
    except ManifestError as error:
        raise GraphError(
            f"islands file {path} is not a JSON object of tensor name to largest value; take the "
            f"'islands' of a manifest ({error})"
        ) from error
    # a manifest, which is JSON, has null for the infinity of a weight that overflows by itself
    return {name: math.inf if peak is None else peak for name, peak in peaks.items()}


@dataclass(frozen=True, slots=True)
class Fp32Islands:
    """Values and weights that stay fp32, with their largest absolute value, and the nodes.

    A value that was named and not measured has infinity.
    """

    maxima: dict[str, float]
    nodes: tuple[str, ...] = ()


def convert(
    model: ir.Model,
    dtype: Dtype,
    choice: str,
    sample: Sample,
    input_format: InputFormat,
    stage: Path,
) -> Fp32Islands:
    """Type an fp32 graph in place; ``choice`` is as for ``choose_fp32_islands``."""
    measured = choose_fp32_islands(model, choice, dtype, sample, input_format, stage)
    typed = type_graph(model, dtype, measured)
    peaks = {**measured, **typed.weights}
    return Fp32Islands(
        {name: peaks.get(name, math.inf) for name in typed.islands}, typed.fp32_nodes
    )


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
