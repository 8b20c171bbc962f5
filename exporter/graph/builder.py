"""Put new nodes into a graph in place of an old value, and let it show values on its way.

A Cast stands at each such place, so that half precision is handed over as float32, which every
runtime can; it changes no value that the graph computes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Names:
    """The names that a graph's nodes and values have; those of a foreign graph may be anything."""

    def __init__(self, graph: ir.Graph) -> None:
        self._held = {node.name for node in graph}
        self._held |= {value.name for node in graph for value in node.outputs}
        self._held |= {*graph.initializers, *(value.name for value in graph.inputs)}

    def free(self, stem: str) -> str:
        """Take ``stem``, or ``stem_2`` and so on where it is taken."""
        name, number = stem, 1
        while name in self._held:
            number += 1
            name = f"{stem}_{number}"
        self._held.add(name)
        return name


class Patch:
    """Nodes that go into ``graph`` before ``anchor``, named after it.

    The names matter: the compiler's log repeats them, and by them a kernel is traced to its block.
    """

    def __init__(self, graph: ir.Graph, anchor: ir.Node) -> None:
        self.graph = graph
        self.anchor = anchor
        self._names = Names(graph)

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """Add a node of one output and return that output."""
        return self.ops(op_type, inputs, attributes, outputs=1)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: int,
    ) -> Sequence[ir.Value]:
        """Add a node of several outputs and return them."""
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs)
        node.name = self._names.free(f"{self.anchor.name or self.anchor.outputs[0].name}.{op_type}")
        for index, value in enumerate(node.outputs):
            value.name = node.name if outputs == 1 else f"{node.name}.{index}"
        self.graph.insert_before(self.anchor, node)
        return node.outputs

    def constant(self, array: np.ndarray[Any, Any], name: str) -> ir.Value:
        """Add an initializer, or give the one of that name if it holds the same."""
        tensor = ir.tensor(np.asarray(array, order="C"))
        known = self.graph.initializers.get(name)
        if known is not None and known.const_value is not None:
            held = known.const_value.numpy()
            if held.dtype == array.dtype and np.array_equal(held, array):
                return known
            return self.constant(array, f"{name}_")
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        value.const_value = tensor
        self.graph.register_initializer(value)
        return value


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let everything that reads ``old`` read ``new``, which takes over type, shape and name."""
    new.type, new.shape = old.type, old.shape
    was_output = old.is_graph_output()
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if was_output:
        old.name = f"{name}.before"
        new.name = name


MARK = "seen:"
GIVEN = "given:"


def mark_outputs(model: ir.Model, shown: Mapping[str, ir.Value]) -> ir.Model:
    """Copy ``model`` with each of ``shown`` as one more output, in float32, named ``seen:KEY``.

    The graph's own outputs stay.
    """
    copy = model.clone()
    graph, values = copy.graph, _values(copy)
    for key, value in shown.items():
        node = _cast(values[value.name], ir.DataType.FLOAT, f"{MARK}{key}")
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
