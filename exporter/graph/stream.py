"""Find the residual stream of a pre-norm transformer in a graph, whatever exporter wrote it.

The stream is the chain of additions ``x + branch(x)``: of an addition's two operands, the stream is
the one that the other was computed from. Nothing is told by position: a block begins with the
addition whose branch holds an attention core.

Shapes: ``b`` batch, ``n`` tokens, ``dim`` hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from msn_export.errors import GraphError

ENTRY = "patch embedding"  # what the stream is before the first block

# Operators that hand the stream on: other types, fewer rows, quantised
_HANDS_ON = frozenset(
    ("Cast", "DequantizeLinear", "Dropout", "Gather", "Identity", "QuantizeLinear", "Slice")
)
# Operators whose result depends on shapes, not on numbers
_SHAPES = frozenset(("ConstantOfShape", "Shape", "Size"))
_ATTENTION = frozenset(("Attention", "Softmax"))
# blocks.3.attn (ours), /vit/encoder/layer.3/ and vit.layers.3. (Hugging Face), encoder_layer_3
_NUMBER = re.compile(r"(?:^|[./_])(?:blocks?|layers?)[._/]?(\d+)(?=[./_]|$)")


@dataclass(frozen=True, slots=True)
class Block:
    """A transformer block: ``nodes``, in order, compute ``output`` from the stream before it.

    ``branches`` are what is added to the stream, attention's result first; ``streams`` the stream
    after each addition, the last of them ``output``. All are [b, n, dim]; where only [CLS] is
    read of the last block, n is 1.
    """

    number: int
    streams: tuple[ir.Value, ...]
    branches: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]

    @property
    def output(self) -> ir.Value:
        """The stream after the block."""
        return self.streams[-1]


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream: ``entry`` is what the first block reads."""

    entry: ir.Value
    blocks: tuple[Block, ...]


def stages_of(model: ir.Model) -> dict[str, ir.Value]:
    """Name what the stream is before the first block and after each.

    Raises:
        GraphError: there is no residual stream.
    """
    stream = find_stream(model)
    return {ENTRY: stream.entry} | {f"block {b.number}": b.output for b in stream.blocks}


@dataclass(frozen=True, slots=True)
class _Addition:
    node: ir.Node
    before: ir.Value
    branch: ir.Value
    nodes: frozenset[ir.Node]

    @property
    def attends(self) -> bool:
        return any(node.op_type in _ATTENTION for node in self.nodes)


def find_stream(model: ir.Model) -> Stream:
    """Find the residual stream.

    Raises:
        GraphError: there is none, or no attention in its branches.
    """
    additions = list(_additions(model.graph))[::-1]
    if not any(addition.attends for addition in additions):
        raise GraphError(
            "the graph has no residual stream with attention in its branches: it is no pre-norm "
            "transformer, or was fused into operators of one runtime; export it again without"
        )
    groups: list[list[_Addition]] = []
    for addition in additions:
        if addition.attends or not groups:
            groups.append([])
        groups[-1].append(addition)
    order = {node: index for index, node in enumerate(model.graph)}
    numbers = _numbers(groups)
    blocks = tuple(
        _block(number, group, order) for number, group in zip(numbers, groups, strict=True)
    )
    return Stream(additions[0].before, blocks)


def _block(number: int, group: list[_Addition], order: dict[ir.Node, int]) -> Block:
    inside = {node for addition in group for node in (*addition.nodes, addition.node)}
    return Block(
        number,
        streams=tuple(addition.node.outputs[0] for addition in group),
        branches=tuple(addition.branch for addition in group),
        nodes=tuple(sorted(inside, key=order.__getitem__)),
    )


def _numbers(groups: list[list[_Addition]]) -> list[int]:
    """Number the blocks as the names do, if those rise one by one; else count."""
    named = []
    for group in groups:
        match = _NUMBER.search(group[-1].node.outputs[0].name or "")
        named.append(int(match[1]) if match else -1)
    rising = all(later == earlier + 1 for earlier, later in pairwise(named))
    return named if named[0] >= 0 and rising else list(range(len(groups)))


def _additions(graph: ir.Graph) -> Iterator[_Addition]:
    """Walk the chain of additions, the last one first."""
    for node in reversed(graph):
        addition = _addition(node)
        if addition is not None:
            break
    else:
        return
    while addition is not None:
        yield addition
        producer = addition.before.producer()
        addition = _addition(producer) if producer is not None else None


def _addition(node: ir.Node) -> _Addition | None:
    """Read ``node`` as stream + branch; None if it is no such addition."""
    if node.op_type != "Add":
        return None
    left, right = node.inputs
    assert left is not None  # an Add has two operands
    assert right is not None
    for stream, branch in ((left, right), (right, left)):
        before = handed_on(stream)
        if branch.producer() is None or before.const_value is not None:
            continue
        nodes = _between(before, branch)
        if nodes is not None:
            return _Addition(node, before, branch, nodes)
    return None


def handed_on(value: ir.Value) -> ir.Value:
    """Step back over operators that hand the stream on."""
    while (node := value.producer()) is not None and node.op_type in _HANDS_ON:
        if node.inputs[0] is None:
            break
        value = node.inputs[0]
    return value


def _between(before: ir.Value, branch: ir.Value) -> frozenset[ir.Node] | None:
    """Collect the nodes that compute ``branch`` from ``before``; None if it does not come from it.

    A walk that reaches a graph input went past ``before``: its values are no function of it alone.
    """
    found: set[ir.Node] = set()
    pending, reached = [branch], False
    while pending:
        value = pending.pop()
        if value is before:
            reached = True
            continue
        node = value.producer()
        if node is None:
            if not value.is_initializer() and value.const_value is None:
                return None
            continue
        if node in found or node.op_type in _SHAPES:
            continue
        found.add(node)
        pending.extend(operand for operand in node.inputs if operand is not None)
    return frozenset(found) if reached else None
