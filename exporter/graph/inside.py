"""Name the tensors inside a block so that two graphs, or a graph and a module, can be compared.

A tensor has up to three names: its own; that of the module it is the result of, where an exporter
named nodes after modules (``blocks.3.attn.qkv``); and its part in the block, found by structure.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import onnx_ir as ir

from msn_export.graph.stream import PRODUCTS, Block, handed_on


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor that the PyTorch reference has in every block.

    ``path`` is a submodule of the block; the tensor is what that is given, or gives. ``leaf`` is
    the module the tensor is named after, ``part`` what every pre-norm block calls it.
    """

    path: str
    given: bool
    leaf: str | None
    part: str | None

    def names(self, block: int) -> tuple[str, ...]:
        """Name it in a block."""
        leaf = () if self.leaf is None else (f"blocks.{block}.{self.leaf}",)
        part = () if self.part is None else (f"block {block} {self.part}",)
        return leaf + part


PLACES = (
    Place("norm1", False, "norm1", "norm before attention"),
    Place("attn.qkv", False, "attn.qkv", None),
    Place("attn.proj", True, None, "attention heads"),
    Place("attn", False, "attn.proj", "attention"),
    Place("norm2", True, None, "stream after attention"),
    Place("norm2", False, "norm2", "norm before MLP"),
    Place("mlp.fc1", False, "mlp.fc1", None),
    Place("mlp.fc2", True, None, "activation"),
    Place("mlp", False, "mlp.fc2", "MLP"),
)


def inside(block: Block) -> list[tuple[tuple[str, ...], ir.Value]]:
    """Give the float values a block computes, in the graph's order, each with all its names."""
    known = [*modules_of(block).items(), *parts_of(block).items()]
    found = []
    for node in block.nodes:
        for value in node.outputs:
            if value.dtype is None or value.dtype.is_floating_point():
                others = tuple(name for name, held in known if held is value)
                found.append(((value.name or "", *others), value))
    return found


def modules_of(block: Block) -> dict[str, ir.Value]:
    """Find each leaf module's result: the last value computed under its name."""
    leaves = "|".join(re.escape(place.leaf) for place in PLACES if place.leaf)
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
    parts = [place.part for place in PLACES if place.part]
    return {
        f"block {block.number} {part}": value
        for part, value in zip(parts, values, strict=True)
        if value is not None
    }


def halves(block: Block) -> tuple[tuple[ir.Node, ...], tuple[ir.Node, ...]]:
    """Split a block's nodes at the stream between attention and MLP."""
    middle = block.streams[0].producer()
    assert middle is not None  # an addition computes it
    index = block.nodes.index(middle)
    return block.nodes[:index], block.nodes[index + 1 :]


def _ends(nodes: tuple[ir.Node, ...]) -> tuple[ir.Value | None, ir.Value | None]:
    """Find what a branch's last matrix product reads, and the LayerNorm it begins with."""
    products = [node for node in nodes if node.op_type in PRODUCTS]
    norms = [node.outputs[0] for node in nodes if node.op_type == "LayerNormalization"]
    read = handed_on(products[-1].inputs[0]) if products and products[-1].inputs[0] else None
    return read, norms[0] if len(norms) == 1 else None
