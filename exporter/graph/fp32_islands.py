"""Measure which values of a graph fp16 cannot hold, by running it on images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from msn_export.graph.builder import Names
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
    names = Names(graph)
    scalars = [_peak(graph, names, value) for value in watched]
    node = ir.node("Concat", scalars, {"axis": 0}, name=names.free(MAXIMA))
    graph.append(node)
    (joined,) = node.outputs
    joined.name = node.name
    joined.type, joined.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(watched)])
    graph.outputs.clear()
    graph.outputs.append(joined)
    return Observed(copy, tuple(value.name or "" for value in watched))


def _peak(graph: ir.Graph, names: Names, value: ir.Value) -> ir.Value:
    """Take the largest absolute value [1] right where ``value`` is computed.

    Right there, for onnxruntime takes nodes in the order of the file where it can: at the end of
    the graph they would keep every value of it in memory.
    """
    producer = value.producer()
    assert producer is not None
    largest = ir.node("Abs", [value])
    scalar = ir.node("ReduceMax", largest.outputs, {"keepdims": 0})
    axes = ir.Value(name=names.free(f"{value.name}.axes"), const_value=ir.tensor(np.array([0])))
    graph.register_initializer(axes)
    vector = ir.node("Unsqueeze", [*scalar.outputs, axes])
    wide = ir.node("Cast", vector.outputs, {"to": int(ir.DataType.FLOAT)})
    nodes = (largest, scalar, vector, wide)
    for node, ending in zip(nodes, ("abs", "max", "vector", "peak"), strict=True):
        node.name = node.outputs[0].name = names.free(f"{value.name}.{ending}")
    graph.insert_after(producer, nodes)
    return wide.outputs[0]


def choose(
    maxima: Mapping[str, float], dtype: Dtype = Dtype.FP16, *, headroom: float
) -> dict[str, float]:
    """Pick the values that stay fp32, with their measured maxima; a NaN maximum is picked too.

    A value stays when it came above the largest number of ``dtype`` divided by ``headroom``.
    """
    limit = LARGEST[dtype] / headroom
    return {name: peak for name, peak in maxima.items() if not peak <= limit}
