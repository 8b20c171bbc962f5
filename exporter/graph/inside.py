"""Name the tensors inside a block so that two graphs, or a graph and a module, can be compared.

A tensor has up to three names: its own; that of the module it is the result of, where an exporter
named nodes after modules (``blocks.3.attn.qkv``); and its part in the block, found by structure.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from msn_export.graph.stream import Block, handed_on

MODULES = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
PARTS = (
    "norm before attention",
    "attention heads",
    "attention",
    "stream after attention",
    "norm before MLP",
    "activation",
    "MLP",
)


def inside(block: Block) -> dict[str, ir.Value]:
    """Give the float values a block computes under all their names, in the graph's order."""
    named: dict[str, ir.Value] = {}
    modules = modules_of(block)
    parts = parts_of(block)
    for node in block.nodes:
        for value in node.outputs:
            if value.dtype is not None and not value.dtype.is_floating_point():
                continue
            for names in (modules, parts):
                named |= {name: value for name, held in names.items() if held is value}
            named[value.name or ""] = value
    return named


def modules_of(block: Block) -> dict[str, ir.Value]:
    """Find each leaf module's result: the last value computed under its name."""
    found: dict[str, ir.Value] = {}
    pattern = re.compile(rf"(blocks\.{block.number}\.(?:{'|'.join(map(re.escape, MODULES))}))\.\w+")
    for node in block.nodes:
        match = pattern.fullmatch(node.name or "")
        if match is not None and node.op_type != "Cast":
            found[match[1]] = node.outputs[0]
    return found


def parts_of(block: Block) -> dict[str, ir.Value]:
    """Find the tensors that every pre-norm block has, by structure alone."""
    if len(block.branches) != 2:
        return {}
    (heads, norm1), (activation, norm2) = map(_ends, _halves(block))
    attention, mlp = block.branches
    values = (norm1, heads, attention, block.streams[0], norm2, activation, mlp)
    return {
        f"block {block.number} {part}": value
        for part, value in zip(PARTS, values, strict=True)
        if value is not None
    }


def _halves(block: Block) -> tuple[tuple[ir.Node, ...], tuple[ir.Node, ...]]:
    """Split a block's nodes at the stream between attention and MLP."""
    middle = block.streams[0].producer()
    assert middle is not None  # an addition computes it
    index = block.nodes.index(middle)
    return block.nodes[:index], block.nodes[index + 1 :]


def _ends(nodes: tuple[ir.Node, ...]) -> tuple[ir.Value | None, ir.Value | None]:
    """Find what a branch's last matrix product reads, and the LayerNorm it begins with."""
    products = [node for node in nodes if node.op_type in {"MatMul", "Gemm"}]
    norms = [node.outputs[0] for node in nodes if node.op_type == "LayerNormalization"]
    read = handed_on(products[-1].inputs[0]) if products and products[-1].inputs[0] else None
    return read, norms[0] if len(norms) == 1 else None
