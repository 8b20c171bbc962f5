"""Measure which values of a graph fp16 cannot hold, by running it on images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from msn_export.graph.io import infer_shapes
from msn_export.graph.precision import LARGEST
from msn_export.spec import Dtype

MAXIMA = "maxima"

# A value is kept in fp32 when the images bring it above the largest fp16 number divided by this:
# other images than the measured ones may reach higher.
HEADROOM = 4.0


@dataclass(frozen=True, slots=True)
class Observed:
    """A copy of a graph with one more output: ``maxima`` [len(names)], the largest |value| each."""

    model: ir.Model
    names: tuple[str, ...]


def observe(model: ir.Model) -> Observed:
    """Add an output that holds the largest absolute value of every float value of ``model``."""
    copy = model.clone()
    infer_shapes(copy)
    graph = copy.graph
    watched = [
        value for node in graph for value in node.outputs if value.dtype == ir.DataType.FLOAT
    ]
    scalars = []
    for value in watched:
        peak = _add(graph, "Abs", [value], f"{value.name}.abs")
        peak = _add(graph, "ReduceMax", [peak], f"{value.name}.max", keepdims=0)
        axes = ir.Value(name=f"{value.name}.axes", const_value=ir.tensor(np.array([0])))
        graph.register_initializer(axes)
        scalars.append(_add(graph, "Unsqueeze", [peak, axes], f"{value.name}.peak"))
    joined = _add(graph, "Concat", scalars, MAXIMA, axis=0)
    joined.type, joined.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(watched)])
    graph.outputs.append(joined)
    return Observed(copy, tuple(value.name or "" for value in watched))


def _add(
    graph: ir.Graph, op_type: str, inputs: list[ir.Value], name: str, **attributes: Any
) -> ir.Value:
    node = ir.node(op_type, inputs, attributes)
    node.name = node.outputs[0].name = name
    graph.append(node)
    return node.outputs[0]


def choose(
    maxima: Mapping[str, float], dtype: Dtype = Dtype.FP16, headroom: float = HEADROOM
) -> dict[str, float]:
    """Pick the values that stay fp32, with their measured maxima; a NaN maximum is picked too."""
    limit = LARGEST[dtype] / headroom
    return {name: peak for name, peak in maxima.items() if not peak <= limit}
