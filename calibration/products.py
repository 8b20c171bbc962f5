"""Find the matrix products of a ViT that are worth 8 bits, by structure and not by name.

Each attention core is an anchor: its operands come from the query, key and value projections
(packed into one, or apart), its result goes to the output projection, and of the products between
that and the next core the first is the MLP's first layer and the second its second.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.errors import GraphError
from msn_export.graph.attention import AttentionCore, match
from msn_export.graph.builder import array_of, operand

# Operators between a projection and an attention core: they move, scale or shift elements.
_MOVES = ("Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
_BETWEEN = frozenset({"Add", "Div", "Mul", *_MOVES})
_PRODUCTS = frozenset({"MatMul", "Gemm"})
# Signs of one weight before and after 8 bits agree in 0.9 and more, those of two in 0.05.
_SAME = 0.5


class Role(StrEnum):
    """What a product does in a ViT."""

    QKV = "qkv"
    OUT = "out"
    FC1 = "fc1"
    FC2 = "fc2"
    PATCH = "patch"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class Projection:
    """A product with a constant weight: names of its node, input and weight.

    ``axis`` is the weight's axis of output channels; ``block`` is None outside the blocks.
    """

    role: Role
    block: int | None
    node: str
    x: str
    weight: str
    axis: int


def find_cores(model: ir.Model) -> list[AttentionCore]:
    """List the attention cores in order; the graph's were all matched before (fuse_attention)."""
    candidates = [node for node in model.graph if node.op_type in {"Softmax", "Attention"}]
    return [core for core in map(match, candidates) if isinstance(core, AttentionCore)]


def find_projections(model: ir.Model) -> tuple[Projection, ...]:
    """Name every product with a constant weight, in the order of the graph.

    Raises:
        GraphError: a block has not the four projections of a ViT; the message says which.
    """
    cores = find_cores(model)
    if not cores:
        raise GraphError("the graph has no attention core; expected a ViT")
    roles: dict[ir.Node, tuple[Role, int | None]] = {}
    for block, core in enumerate(cores):
        into = _sources(core)
        if not into:
            raise GraphError(
                f"the queries, keys and values of block {block} ({core.output.name!r}) come from "
                "no product with a constant weight; expected a projection"
            )
        roles |= dict.fromkeys(into, (Role.QKV, block))
    products = [node for node in model.graph if _is_product(node)]
    order = {node: index for index, node in enumerate(model.graph)}
    for block, core in enumerate(cores):
        first = order[core.node]
        last = order[cores[block + 1].node] if block + 1 < len(cores) else len(order)
        after = [n for n in products if first < order[n] < last and n not in roles]
        _name_block(roles, after, block, closing=block + 1 == len(cores))
    roles |= {node: (Role.PATCH, None) for node in model.graph if _is_convolution(node)}
    return tuple(_describe(node, *roles[node]) for node in model.graph if node in roles)


def find_by_weight(
    known: Sequence[Projection], model: ir.Model, other: ir.Model, chosen: Collection[str]
) -> list[tuple[Projection, Projection]]:
    """Find the projections of a graph in another one, by the signs of their weights.

    Signs outlast rounding, scales and smoothing, which multiplies whole rows or columns by positive
    numbers. A packed projection is found in the three of another graph, and they in it.

    Args:
        known: projections of ``model``.
        model: a graph of floats.
        other: the graph to search, of floats too.
        chosen: names of its products that must all be found.

    Returns:
        Each of ``known`` that is there, with what it is in ``other``.

    Raises:
        GraphError: a chosen product has no weight of ``model``.
    """
    products = [
        _describe(node, Role.HEAD, None)
        for node in other.graph
        if node.name in chosen and (_is_product(node) or _is_convolution(node))
    ]
    theirs = [_signs(other, product) for product in products]
    mine = [_signs(model, own) for own in known]
    agreed = np.asarray([[_agreement(one, two) for two in theirs] for one in mine])
    for product, best in zip(products, agreed.max(axis=0).tolist(), strict=True):
        if best < _SAME:
            raise GraphError(
                f"product {product.node!r} of the candidate has the weight of none of the reference"
            )
    return [
        (own, replace(products[int(row.argmax())], role=own.role, block=own.block))
        for own, row in zip(known, agreed, strict=True)
        if row.max() >= _SAME
    ]


def _signs(model: ir.Model, projection: Projection) -> NDArray[np.float32]:
    """Give the signs of a weight, [output channels, some 64 of the rest]."""
    held = array_of(model.graph.initializers[projection.weight])
    weight: NDArray[np.float32] = np.moveaxis(held, projection.axis, 0)
    rows = weight.reshape(len(weight), -1)
    return np.sign(rows[:, :: max(1, rows.shape[1] // 64)])


def _agreement(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Give the mean product of two weights' signs: 1 of the same, about 0 of others.

    Packed projections are compared part by part.
    """
    unit = math.gcd(len(one), len(other))
    if one.shape[1:] != other.shape[1:] or max(len(one), len(other)) > 3 * unit:
        return 0.0
    parts = [weight.reshape(-1, unit * weight.shape[1]) for weight in (one, other)]
    return float((parts[0] @ parts[1].T).max()) / parts[0].shape[1]


def _name_block(
    roles: dict[ir.Node, tuple[Role, int | None]],
    after: list[ir.Node],
    block: int,
    *,
    closing: bool,
) -> None:
    if len(after) < 3 or (len(after) > 3 and not closing):
        names = ", ".join(repr(node.name) for node in after) or "none"
        raise GraphError(
            f"block {block} has {len(after)} products with a constant weight after its attention "
            f"({names}); expected output projection, fc1 and fc2"
        )
    for node, role in zip(after, (Role.OUT, Role.FC1, Role.FC2), strict=False):
        roles[node] = (role, block)
    for node in after[3:]:
        roles[node] = (Role.HEAD, None)


def _sources(core: AttentionCore) -> list[ir.Node]:
    """Walk back from a core's operands to the products that give them."""
    found: dict[ir.Node, None] = {}
    pending = [core.q, core.k, core.v]
    seen: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        if _is_product(node):
            found[node] = None
        elif node.op_type in _BETWEEN:
            pending += [v for v in node.inputs if v is not None and v.const_value is None]
    return list(found)


def _is_product(node: ir.Node) -> bool:
    return node.op_type in _PRODUCTS and _has_matrix(node)


def _is_convolution(node: ir.Node) -> bool:
    return node.op_type == "Conv" and node.inputs[1] is not None and _constant(node.inputs[1])


def _has_matrix(node: ir.Node) -> bool:
    weight = node.inputs[1]
    return weight is not None and _constant(weight) and len(weight.shape or ()) == 2


def _constant(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None


def _describe(node: ir.Node, role: Role, block: int | None) -> Projection:
    x, weight = operand(node, 0), operand(node, 1)
    axis = 0 if node.op_type == "Conv" else 1
    if node.op_type == "Gemm":
        transposed = node.attributes.get("transB")
        axis = 0 if transposed is not None and transposed.as_int() else 1
    return Projection(role, block, node.name or "", x.name or "", weight.name or "", axis)
