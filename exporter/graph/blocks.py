"""The residual stream of a transformer in a graph, whatever exporter wrote it, and its blocks.

A value is a *cut* where every path from the images to the outputs passes through it: the stream
after each addition ``x + branch(x)`` is one. A block is what lies between two cuts around one
attention core: it ends behind the third matrix product after the core (output projection and the
MLP's two layers), with the addition that follows. So a block that lacks an addition, or has its
norms elsewhere, is found all the same.

Shapes: ``b`` batch, ``n`` tokens, ``dim`` hidden size.

A tensor has up to three names: its own; that of the module it is the result of, where an exporter
named nodes after modules (``blocks.3.attn.qkv``); and its part in the block, found by structure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from msn_export.errors import GraphError
from msn_export.graph.builder import producer

ENTRY = "patch embedding"  # what the stream is before the first block
PRODUCTS = frozenset({"Gemm", "MatMul"})

# Operators that hand the stream on: other types, fewer rows, quantised
_HANDS_ON = frozenset(
    ("Cast", "DequantizeLinear", "Dropout", "Gather", "Identity", "QuantizeLinear", "Slice")
)
# Operators whose result depends on shapes, not on numbers
_SHAPES = frozenset(("ConstantOfShape", "Shape", "Size"))
_CORES = frozenset(("Attention", "Softmax"))
# what may follow a block's last product before the stream it adds to: its bias, a layer scale
_AFFINE = frozenset(("Add", "Mul"))
# output projection and the two layers of the MLP
_AFTER_CORE = 3
# blocks.3.attn (ours), /vit/encoder/layer.3/ and vit.layers.3. (Hugging Face), encoder_layer_3
_NUMBER = re.compile(r"(?:^|[./_])(?:blocks?|layers?)[._/]?(\d+)(?=[./_]|$)")


@dataclass(frozen=True, slots=True)
class Block:
    """A transformer block: ``nodes``, in order, compute ``output`` from ``entry``.

    ``branches`` are what is added to the stream, attention's result first; ``streams`` the stream
    after each addition. A regular block has two of each. All are [b, n, dim]; where only [CLS] is
    read of the last block, n is 1. ``core`` is the Attention or Softmax.
    """

    number: int
    entry: ir.Value
    output: ir.Value
    core: ir.Node
    streams: tuple[ir.Value, ...]
    branches: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream: ``entry`` is what the first block reads.

    ``tail`` are residual additions behind the last block; a ViT has none.
    """

    entry: ir.Value
    blocks: tuple[Block, ...]
    tail: tuple[ir.Value, ...] = ()


def stages_of(stream: Stream) -> dict[str, ir.Value]:
    """Name what the stream is before the first block and after each."""
    return {ENTRY: stream.entry} | {f"block {b.number}": b.output for b in stream.blocks}


def find_stream(model: ir.Model) -> Stream:
    flow = _Flow(model.graph)
    entry = flow.entry(flow.cores[0]) if flow.cores else None
    if entry is None:
        raise GraphError(
            "the graph has no residual stream with attention in its branches: it is no "
            "transformer, or was fused into operators of one runtime; export it again without"
        )
    numbers = _numbers(flow.cores)
    blocks: list[Block] = []
    before = entry
    for index, (number, core) in enumerate(zip(numbers, flow.cores, strict=True)):
        following = flow.cores[index + 1] if index + 1 < len(flow.cores) else None
        output = flow.end(before, core, following)
        if output is None:
            break  # no single value holds all that the next block reads
        blocks.append(flow.block(number, before, output, core))
        before = output
    if not blocks:
        raise GraphError(
            "the graph has no residual stream: no single value holds all that comes out of its "
            "first attention block"
        )
    return Stream(entry, tuple(blocks), flow.additions_after(before))


class _Flow:
    """The nodes between images and outputs in order, and where one value alone is between them."""

    def __init__(self, graph: ir.Graph) -> None:
        self.images = _image_values(graph)
        self.nodes = _towards_last(graph, self.images)
        self.index = {node: index for index, node in enumerate(self.nodes)}
        self.cuts = self._cuts()
        self.cores = [node for node in self.nodes if self._is_core(node)]

    def _cuts(self) -> dict[ir.Value, int]:
        """Give each cut the index of the node that computes it."""
        last: dict[ir.Value, int] = {}
        for index, node in enumerate(self.nodes):
            for value in _operands(node):
                if value in self.images and (
                    value.producer() is None or value.producer() in self.index
                ):
                    last[value] = index
        live = {value for value in last if value.producer() is None}
        found = {}
        for index, node in enumerate(self.nodes):
            live -= {value for value in _operands(node) if last.get(value) == index}
            live |= {value for value in node.outputs if value in last}
            if len(live) == 1 and (value := next(iter(live))).producer() is node:
                found[value] = index
        if self.nodes and self.nodes[-1].outputs:
            found[self.nodes[-1].outputs[0]] = len(self.nodes) - 1
        return found

    def _is_core(self, node: ir.Node) -> bool:
        """A classifier's Softmax holds all there is; attention's has the values beside it."""
        if node.op_type not in _CORES:
            return False
        return node.op_type == "Attention" or node.outputs[0] not in self.cuts

    def entry(self, core: ir.Node) -> ir.Value | None:
        """Find the stream that a block with this core reads."""
        before = [value for value, index in self.cuts.items() if index < self.index[core]]
        if not before:
            return None
        nearest = before[-1]
        stream = handed_on(nearest)
        if self._goes_around(stream, core):
            return stream if stream in self.cuts else nearest
        for value in reversed(before):  # no addition: over the projection and the norm
            node = producer(value)
            if node.op_type == "LayerNormalization" and node.inputs[0] in self.cuts:
                return node.inputs[0]
            if self._joins(node):
                return value
        return nearest

    def _goes_around(self, value: ir.Value, core: ir.Node) -> bool:
        after = self.nodes[self.index[core] + 1 :]
        return any(
            node.op_type == "Add" and any(handed_on(v) is value for v in _operands(node))
            for node in after
        )

    def end(self, entry: ir.Value, core: ir.Node, following: ir.Node | None) -> ir.Value | None:
        """Find the stream after a block; ``following`` is the next block's core."""
        until = len(self.nodes) if following is None else self.index[following]
        start = self.index[core]
        products = [i for i in range(start + 1, until) if self._is_weighted(self.nodes[i])]
        if not products:
            return None
        behind = products[min(_AFTER_CORE, len(products)) - 1]
        found = None
        for value, index in self.cuts.items():
            if not behind <= index < until:
                continue
            node = self.nodes[index]
            if self._joins(node):
                found = value
                break
            if found is not None and node.op_type not in _AFFINE | _HANDS_ON:
                break
            if found is not None and node.op_type in _HANDS_ON:
                continue
            found = value
        return found and self._with_norm(entry, core, found)

    def _with_norm(self, entry: ir.Value, core: ir.Node, found: ir.Value) -> ir.Value:
        """Count a norm behind the addition to a block that begins with none, or is named alike."""
        first = self.index[producer(entry)] + 1 if entry.producer() is not None else 0
        ahead = self.nodes[first : self.index[core]]
        begins = any(node.op_type == "LayerNormalization" for node in ahead)
        for use in found.uses():
            value = use.node.outputs[0]
            if use.node.op_type != "LayerNormalization" or value not in self.cuts:
                continue
            if not begins or _named(use.node) == _named(core) != -1:
                return value
        return found

    def _is_weighted(self, node: ir.Node) -> bool:
        """A product of one computed value and a weight."""
        computed = [value for value in _operands(node)[:2] if value in self.images]
        return node.op_type in PRODUCTS and len(computed) == 1

    def _joins(self, node: ir.Node) -> bool:
        return node.op_type == "Add" and all(value in self.images for value in _operands(node))

    def block(self, number: int, entry: ir.Value, output: ir.Value, core: ir.Node) -> Block:
        nodes = between(entry, output)
        assert nodes is not None  # both are cuts
        order = {node: index for index, node in enumerate(producer(output).graph or ())}
        inside = tuple(sorted(nodes, key=order.__getitem__))
        streams, branches = [], []
        for node in inside:
            if node.outputs and node.outputs[0] in self.cuts and self._joins(node):
                branch = _branch(node)
                if branch is not None:
                    streams.append(node.outputs[0])
                    branches.append(branch)
        return Block(number, entry, output, core, tuple(streams), tuple(branches), inside)

    def additions_after(self, output: ir.Value) -> tuple[ir.Value, ...]:
        """List the residual additions behind a cut."""
        return tuple(
            value
            for value, index in self.cuts.items()
            if index > self.cuts[output]
            and self._joins(self.nodes[index])
            and _branch(self.nodes[index]) is not None
        )


def _image_values(graph: ir.Graph) -> set[ir.Value]:
    """Collect the values whose numbers depend on the images."""
    weights = graph.initializers
    found = {value for value in graph.inputs if value.name not in weights}
    for node in graph:
        if node.op_type not in _SHAPES and any(value in found for value in _operands(node)):
            found.update(node.outputs)
    return found


def _towards_last(graph: ir.Graph, images: set[ir.Value]) -> list[ir.Node]:
    """List the nodes that the output with the most nodes behind it is computed by, in order."""
    best: set[ir.Node] = set()
    for output in graph.outputs:
        found = _behind(output, images)
        if len(found) > len(best):
            best = found
    return [node for node in graph if node in best]


def _behind(output: ir.Value, images: set[ir.Value]) -> set[ir.Node]:
    """Collect the nodes a value is computed by.

    A classifier may read [CLS] of several blocks side by side: of those, the last one alone.
    """
    found: set[ir.Node] = set()
    pending = [output]
    while pending:
        value = pending.pop()
        node = value.producer()
        if value not in images or node is None or node in found:
            continue
        found.add(node)
        beside = [operand for operand in _operands(node) if operand in images]
        if node.op_type == "Concat" and len(beside) > 1 and len(value.shape or ()) == 2:
            behind = [_behind(operand, images) for operand in beside]
            found |= max(behind, key=len)
        else:
            pending += beside
    return found


def _operands(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None]


def _numbers(cores: list[ir.Node]) -> list[int]:
    """Number the blocks as their names do, if those rise from 0; else count."""
    named = [_named(core) for core in cores]
    rising = named[0] == 0 and all(later > earlier for earlier, later in pairwise(named))
    return named if rising else list(range(len(cores)))


def _named(node: ir.Node) -> int:
    """Read the block's number off a node's name; -1 if there is none."""
    match = _NUMBER.search(node.name or "") or _NUMBER.search(node.outputs[0].name or "")
    return int(match[1]) if match else -1


def _branch(node: ir.Node) -> ir.Value | None:
    """Find the branch that an addition adds to the stream; None if nothing is multiplied in it."""
    left, right = _operands(node)
    for stream, branch in ((left, right), (right, left)):
        nodes = between(handed_on(stream), branch)
        if nodes and any(inner.op_type in PRODUCTS | _CORES for inner in nodes):
            return branch
    return None


def handed_on(value: ir.Value) -> ir.Value:
    """Step back over operators that hand the stream on."""
    while (node := value.producer()) is not None and node.op_type in _HANDS_ON:
        if node.inputs[0] is None or _keeps_patches(node):
            break
        value = node.inputs[0]
    return value


def _keeps_patches(node: ir.Node) -> bool:
    """Find a choice of several tokens: the others are no part of the stream behind it."""
    chosen = node.inputs[1].const_value if node.op_type == "Gather" and node.inputs[1] else None
    return chosen is not None and chosen.size > 1


def between(before: ir.Value, after: ir.Value) -> frozenset[ir.Node] | None:
    """Collect the nodes that compute ``after`` from ``before``; None if it does not come from it.

    A walk that reaches a graph input went past ``before``: its values are no function of it alone.
    """
    found: set[ir.Node] = set()
    pending, reached = [after], False
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
        pending.extend(_operands(node))
    return frozenset(found) if reached else None


@dataclass(frozen=True, slots=True)
class BlockTensor:
    """A tensor that the PyTorch reference has in every block.

    ``path`` is a submodule of the block; the tensor is what that is given, or gives. ``leaf`` is
    the module the tensor is named after, ``part`` what every pre-norm block calls it.
    """

    path: str
    given: bool
    leaf: str | None
    part: str | None

    def names(self, block: int) -> tuple[str, ...]:
        leaf = () if self.leaf is None else (f"blocks.{block}.{self.leaf}",)
        part = () if self.part is None else (f"block {block} {self.part}",)
        return leaf + part


TENSORS = (
    BlockTensor("norm1", False, "norm1", "norm before attention"),
    BlockTensor("attn.qkv", False, "attn.qkv", None),
    BlockTensor("attn.proj", True, None, "attention heads"),
    BlockTensor("attn", False, "attn.proj", "attention"),
    BlockTensor("norm2", True, None, "stream after attention"),
    BlockTensor("norm2", False, "norm2", "norm before MLP"),
    BlockTensor("mlp.fc1", False, "mlp.fc1", None),
    BlockTensor("mlp.fc2", True, None, "activation"),
    BlockTensor("mlp", False, "mlp.fc2", "MLP"),
)


def tensors_of(block: Block) -> list[tuple[tuple[str, ...], ir.Value]]:
    """Give the float values a block computes, in the graph's order, each with all its names."""
    named = [*modules_of(block).items(), *parts_of(block).items()]
    found = []
    for node in block.nodes:
        for value in node.outputs:
            if value.dtype is None or value.dtype.is_floating_point():
                others = tuple(name for name, held in named if held is value)
                found.append(((value.name or "", *others), value))
    return found


def modules_of(block: Block) -> dict[str, ir.Value]:
    """Find each leaf module's result: the last value computed under its name."""
    leaves = "|".join(re.escape(tensor.leaf) for tensor in TENSORS if tensor.leaf)
    pattern = re.compile(rf"(blocks\.{block.number}\.(?:{leaves}))\.\w+")
    found: dict[str, ir.Value] = {}
    for node in block.nodes:
        match = pattern.fullmatch(node.name or "")
        if match is not None and node.op_type != "Cast":
            found[match[1]] = node.outputs[0]
    return found


def parts_of(block: Block) -> dict[str, ir.Value]:
    """Find the tensors that every pre-norm block has, by structure alone."""
    if len(block.branches) != 2:
        return {}
    (heads, norm1), (activation, norm2) = map(_ends, halves(block))
    attention, mlp = block.branches
    values = (norm1, heads, attention, block.streams[0], norm2, activation, mlp)
    parts = [tensor.part for tensor in TENSORS if tensor.part]
    return {
        f"block {block.number} {part}": value
        for part, value in zip(parts, values, strict=True)
        if value is not None
    }


def halves(block: Block) -> tuple[tuple[ir.Node, ...], tuple[ir.Node, ...]]:
    """Split a block's nodes at the stream between attention and MLP."""
    index = block.nodes.index(producer(block.streams[0]))
    return block.nodes[:index], block.nodes[index + 1 :]


def _ends(nodes: tuple[ir.Node, ...]) -> tuple[ir.Value | None, ir.Value | None]:
    """Find what a branch's last matrix product reads, and the LayerNorm it begins with."""
    products = [node for node in nodes if node.op_type in PRODUCTS]
    norms = [node.outputs[0] for node in nodes if node.op_type == "LayerNormalization"]
    read = handed_on(products[-1].inputs[0]) if products and products[-1].inputs[0] else None
    return read, norms[0] if len(norms) == 1 else None
