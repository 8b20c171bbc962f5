"""Add nodes and constants to a graph, and read what a well-formed node has."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

_Dim = int | ir.SymbolicDim | None


class GraphBuilder:
    """Nodes and constants that go into ``graph``, before ``anchor`` or else at its end.

    ``scope`` begins their names: the anchor's name where there is an anchor. The names matter: the
    compiler's log repeats them, and by them a kernel is traced to its block.
    """

    def __init__(self, graph: ir.Graph, anchor: ir.Node | None = None) -> None:
        self.graph = graph
        self.scope = ""
        self._anchor: ir.Node | None = None
        self._last: ir.Node | None = None
        # all that the graph has: names of a foreign graph may be anything
        self._taken = {node.name for node in graph}
        self._taken |= {value.name for node in graph for value in node.outputs}
        self._taken |= {*graph.initializers, *(value.name for value in graph.inputs)}
        if anchor is not None:
            self.before(anchor)

    def before(self, anchor: ir.Node) -> Self:
        """Add the next nodes before ``anchor``, and name them after it."""
        self._anchor, self._last = anchor, None
        self.scope = f"{anchor.name or anchor.outputs[0].name}"
        return self

    def after(self, node: ir.Node) -> Self:
        """Add the next nodes after ``node``, one behind the other."""
        self._anchor, self._last = None, node
        return self

    def free(self, wanted: str) -> str:
        """Take the name ``wanted``, or ``stem_2`` and so on where it is taken."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        shape: Iterable[_Dim] | None = None,
        name: str = "",
    ) -> ir.Value:
        """Add a node of one output and return that output."""
        return self.ops(op_type, inputs, attributes, outputs=1, shape=shape, name=name)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        outputs: int,
        shape: Iterable[_Dim] | None = None,
        name: str = "",
    ) -> Sequence[ir.Value]:
        """Add a node of several outputs and return them.

        Where their shape is given, it is that of each, and their type the first input's.
        """
        node = ir.node(op_type, inputs, attributes, num_outputs=outputs)
        node.name = self.free(name or (f"{self.scope}.{op_type}" if self.scope else op_type))
        kind = None if shape is None or inputs[0] is None else inputs[0].dtype
        for index, value in enumerate(node.outputs):
            value.name = node.name if outputs == 1 else f"{node.name}.{index}"
            value.shape = None if shape is None else ir.Shape(shape)
            value.type = None if kind is None else ir.TensorType(kind)
        if self._anchor is not None:
            self.graph.insert_before(self._anchor, node)
        elif self._last is not None:
            self.graph.insert_after(self._last, node)
            self._last = node
        else:
            self.graph.append(node)
        return node.outputs

    def cast(self, value: ir.Value, dtype: ir.DataType, name: str = "") -> ir.Value:
        result = self.op("Cast", [value], {"to": int(dtype)}, shape=value.shape, name=name)
        result.type = ir.TensorType(dtype)
        return result

    def reshape(self, x: ir.Value, *sizes: int, shape: Iterable[_Dim] | None = None) -> ir.Value:
        """Add a Reshape to ``sizes`` behind the batch, whose size is left open."""
        name = "x".join(str(size) for size in sizes)
        target = self.constant([-1, *sizes], f"shape.bx{name}")
        return self.op("Reshape", [x, target], shape=shape)

    def constant(self, array: ArrayLike, name: str) -> ir.Value:
        """Add a constant, or give the one of that name if it holds the same."""
        array = np.asarray(array, order="C")
        value = self.graph.initializers.get(name)
        if value is None:
            return self.initializer(ir.tensor(array), name)
        held = array_of(value)
        if held.dtype == array.dtype and np.array_equal(held, array):
            return value
        return self.constant(array, f"{name}_")

    def initializer(self, tensor: ir.TensorProtocol, name: str) -> ir.Value:
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        value = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value


def operand(node: ir.Node, index: int) -> ir.Value:
    """Give an input that the operator requires."""
    value = node.inputs[index]
    assert value is not None
    return value


def producer(value: ir.Value | None) -> ir.Node:
    """Give the node that computes a value, which no input and no constant is."""
    node = None if value is None else value.producer()
    assert node is not None
    return node


def producer_of(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Give the node that computes a value if it is an ``op_type``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def permuted(value: ir.Value | None, axes: tuple[int, ...]) -> ir.Value | None:
    """Give what a Transpose by ``axes`` makes ``value`` of; None where there is no such node."""
    node = producer_of(value, "Transpose")
    return node.inputs[0] if node and tuple(node.attributes.get_ints("perm", ())) == axes else None


def only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """Give the one node that reads a value if it is an ``op_type``."""
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None


def constant_of(value: ir.Value | None) -> NDArray[Any] | None:
    """Give the numbers of a constant, None of what is computed."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def sizes_of(value: ir.Value | None) -> list[int | None]:
    """Give a shape, None for each size that is open; nothing where the rank is unknown."""
    shape = () if value is None or value.shape is None else value.shape
    return [size if isinstance(size, int) else None for size in shape]


def array_of(value: ir.Value) -> NDArray[Any]:
    assert value.const_value is not None
    return value.const_value.numpy()


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

    The graph's own outputs stay. A Cast stands at each place, so that half precision is handed over
    as float32, which every runtime can; it changes no value that the graph computes.
    """
    copy = model.clone()
    values, builder = _values(copy), GraphBuilder(copy.graph)
    for key, value in shown.items():
        cast = builder.cast(values[value.name], ir.DataType.FLOAT, f"{MARK}{key}")
        copy.graph.outputs.append(cast)
    return copy


def with_inputs(model: ir.Model, given: Mapping[str, ir.Value]) -> ir.Model:
    """Copy ``model`` with an input for each of ``given``, in float32, named ``given:KEY``.

    What reads the value reads the input instead; the value itself is still computed, so that
    ``mark_outputs`` can show it. With the stream before each block given, every block runs by
    itself.
    """
    copy = model.clone()
    graph, values = copy.graph, _values(copy)
    builder = GraphBuilder(graph)
    for key, old in given.items():
        value = values[old.name]
        taken = ir.Value(name=f"{GIVEN}{key}", type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs.append(taken)
        builder.before(graph[0])
        cast = builder.cast(taken, value.dtype or ir.DataType.FLOAT, f"{GIVEN}{key}.Cast")
        cast.shape = value.shape
        value.replace_all_uses_with(cast)
    return copy


def _values(model: ir.Model) -> dict[str | None, ir.Value]:
    values = {value.name: value for node in model.graph for value in node.outputs}
    return values | {value.name: value for value in model.graph.inputs}
