"""Let a graph show values it computes on its way, under names of the caller's."""

from collections.abc import Mapping

import onnx_ir as ir

SEEN = "seen:"


def expose(model: ir.Model, shown: Mapping[str, ir.Value]) -> ir.Model:
    """Copy ``model`` with each of ``shown`` as one more output, in float32, named ``seen:KEY``.

    The graph's own outputs stay. A Cast stands before each new output, so that half precision
    comes out as what every runtime can hand over; it changes no value that the graph computes.
    """
    copy = model.clone()
    graph = copy.graph
    values = {value.name: value for node in graph for value in node.outputs}
    values |= {value.name: value for value in graph.inputs}
    for key, value in shown.items():
        node = ir.node("Cast", [values[value.name]], {"to": int(ir.DataType.FLOAT)})
        node.name = f"{SEEN}{key}"
        output = node.outputs[0]
        output.name, output.shape = node.name, value.shape
        output.type = ir.TensorType(ir.DataType.FLOAT)
        graph.append(node)
        graph.outputs.append(output)
    return copy
