"""Measure which values of a graph fp16 cannot hold, by running it on images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from msn_export.graph.builder import GraphBuilder, producer
from msn_export.graph.io import infer_shapes
from msn_export.graph.precision import LARGEST
from msn_export.spec import Dtype

MAXIMA = "maxima"
_WATCHED = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True, slots=True)
class Observed:
    """A copy of a graph whose one output is ``maxima`` [len(names)], the largest |value| each."""

    model: ir.Model
    names: tuple[str, ...]


def observe(model: ir.Model) -> Observed:
    """Copy ``model`` with one output: the largest absolute value of each of its float values.

    The copy's own outputs go: with them, onnxruntime runs the whole graph first and every
    value stays in memory until its maximum is taken at the end.
    """
    copy = model.clone()
    infer_shapes(copy)
    graph = copy.graph
    watched = [value for node in graph for value in node.outputs if value.dtype in _WATCHED]
    builder = GraphBuilder(graph)
    peaks = [_peak(builder, value) for value in watched]
    joined = builder.after(graph[-1]).op("Concat", peaks, {"axis": 0}, name=MAXIMA)
    joined.type, joined.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(watched)])
    graph.outputs.clear()
    graph.outputs.append(joined)
    return Observed(copy, tuple(value.name or "" for value in watched))


def _peak(builder: GraphBuilder, value: ir.Value) -> ir.Value:
    """Take the largest absolute value [1] right where ``value`` is computed.

    Right there, for onnxruntime takes nodes in the order of the file where it can: at the end of
    the graph they would keep every value of it in memory.
    """
    builder.after(producer(value))
    axes = builder.initializer(ir.tensor(np.array([0])), builder.free(f"{value.name}.axes"))
    largest = builder.op("Abs", [value], name=f"{value.name}.abs")
    scalar = builder.op("ReduceMax", [largest], {"keepdims": 0}, name=f"{value.name}.max")
    vector = builder.op("Unsqueeze", [scalar, axes], name=f"{value.name}.vector")
    return builder.cast(vector, ir.DataType.FLOAT, f"{value.name}.peak")


def choose(
    maxima: Mapping[str, float], dtype: Dtype = Dtype.FP16, *, headroom: float
) -> dict[str, float]:
    """Pick the values that stay fp32, with their measured maxima; a NaN maximum is picked too.

    A value stays when it came above the largest number of ``dtype`` divided by ``headroom``.
    """
    limit = LARGEST[dtype] / headroom
    return {name: peak for name, peak in maxima.items() if not peak <= limit}
