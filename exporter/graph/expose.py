"""Let a graph show values it computes on its way, or take them from outside, by the caller's names.

A Cast stands at each such place, so that half precision is handed over as float32, which every
runtime can; it changes no value that the graph computes.
"""

from collections.abc import Mapping

import onnx_ir as ir

SEEN = "seen:"
GIVEN = "given:"


def expose(model: ir.Model, shown: Mapping[str, ir.Value]) -> ir.Model:
    """Copy ``model`` with each of ``shown`` as one more output, in float32, named ``seen:KEY``.

    The graph's own outputs stay.
    """
    copy = model.clone()
    graph, values = copy.graph, _values(copy)
    for key, value in shown.items():
        node = _cast(values[value.name], ir.DataType.FLOAT, f"{SEEN}{key}")
        graph.append(node)
        graph.outputs.append(node.outputs[0])
    return copy


def feed(model: ir.Model, given: Mapping[str, ir.Value]) -> ir.Model:
    """Copy ``model`` with an input for each of ``given``, in float32, named ``given:KEY``.

    What reads the value reads the input instead; the value itself is still computed, so that
    ``expose`` can show it. With the stream before each block given, every block runs by itself.
    """
    copy = model.clone()
    graph, values = copy.graph, _values(copy)
    for key, old in given.items():
        value = values[old.name]
        taken = ir.Value(name=f"{GIVEN}{key}", type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs.append(taken)
        node = _cast(taken, value.dtype or ir.DataType.FLOAT, f"{GIVEN}{key}.Cast")
        node.outputs[0].shape = value.shape
        value.replace_all_uses_with(node.outputs[0])
        graph.insert_before(graph[0], node)
    return copy


def _values(model: ir.Model) -> dict[str | None, ir.Value]:
    values = {value.name: value for node in model.graph for value in node.outputs}
    return values | {value.name: value for value in model.graph.inputs}


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(dtype)})
    node.name = name
    output = node.outputs[0]
    output.name, output.shape, output.type = name, value.shape, ir.TensorType(dtype)
    return node
