"""Move channel outliers from activations into weights, without changing what is computed.

Exporters pack queries, keys and values in several orders: (3, h, d) as here and in timm, (h, 3, d)
elsewhere. Carrying the number of each column along finds the right one in all of them.

SmoothQuant, arXiv 2211.10438: channel j of a product's input is divided by s_j, row j of its weight
multiplied by it, and the division is folded into what writes the channel: the affine of a
LayerNormalization (norm1 before qkv, norm2 before fc1), or the value columns of the query-key-value
projection (attention mixes tokens and leaves channels apart, so the output projection's input
follows). GELU is not homogeneous: nothing before it can take a factor of fc2's input.

Every s_j is a power of two, which no rounding can touch: the smoothed fp32 graph gives the bytes
that the graph gave before, and each s_j is within a factor of the square root of 2 of the paper's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.calibration.qdq import Projection, Role, find_cores
from msn_export.errors import GraphError
from msn_export.graph.attention import AttentionCore
from msn_export.graph.builder import GraphBuilder, array_of, constant_of, operand, sizes_of

# b batch, n tokens, c channels

_MOVES = frozenset({"Reshape", "Transpose", "Split", "Squeeze"})


def columns_behind(
    core: AttentionCore, reader: ir.Node
) -> tuple[ir.Value, NDArray[np.int64]] | None:
    """Find which columns of which product are the channels that ``reader`` reads.

    ``core`` mixes tokens and leaves the heads and channels of v apart; ``reader``'s first input
    [b, n, c] comes from it. Returns the value [b, n, columns] that v is a rearrangement of, and for
    each channel its column there; None where that is not known, or others read it too.
    """
    back, forth = _chain(core.v), _chain(reader.inputs[0])
    if not back or not forth or forth[0].inputs[0] is not core.output:
        return None
    source, read = back[0].inputs[0], reader.inputs[0]
    if source is None or read is None:
        return None
    if not _only_lead_to(back, core.v, core.node) or not _only_lead_to(forth, read, reader):
        return None
    sizes, tokens = _sizes(source), _sizes(core.output)[-2:-1]
    if len(sizes) != 3 or -1 in (*sizes[1:], *tokens):
        return None
    columns = np.broadcast_to(np.arange(sizes[2]), (1, *sizes[1:]))
    v = _carried(back, source, columns, core.v)
    if v is None or (v != v[..., :1, :]).any():  # they depend on the token
        return None
    attended = np.repeat(v[..., :1, :], tokens[0], axis=-2)
    found = _carried(forth, core.output, attended, read)
    if found is None:
        return None
    rows = found.reshape(-1, found.shape[-1])
    whole = (rows == rows[0]).all() and len(np.unique(rows[0])) == len(rows[0])
    return (source, rows[0]) if whole else None


def _sizes(value: ir.Value) -> list[int]:
    """A shape with -1 for what is dynamic."""
    return [size if isinstance(size, int) else -1 for size in value.shape or ()]


def _chain(value: ir.Value | None) -> list[ir.Node]:
    found: list[ir.Node] = []
    while value is not None:
        node = value.producer()
        if node is None or node.op_type not in _MOVES:
            break
        found.insert(0, node)
        value = node.inputs[0]
    return found


def _only_lead_to(chain: list[ir.Node], value: ir.Value, reader: ir.Node) -> bool:
    """True where only the chain and ``reader`` see the values on the way to ``value``."""
    values = [*(node.inputs[0] for node in chain), value]
    return all(
        seen is not None
        and not seen.is_graph_output()
        and [use.node for use in seen.uses()] == [node]
        for seen, node in zip(values, [*chain, reader], strict=True)
    )


def _carried(
    chain: list[ir.Node], source: ir.Value, array: NDArray[Any], wanted: ir.Value
) -> NDArray[Any] | None:
    """Move an array as the chain moves ``source``; None where its shapes do not say how."""
    held: dict[ir.Value, NDArray[Any]] = {source: array}
    for node in chain:
        value = node.inputs[0]
        moved = _MOVERS[node.op_type](node, held[value]) if value in held else None
        if moved is None:
            return None
        held = dict(zip(node.outputs, moved, strict=True))
    return held.get(wanted)


def _reshaped(node: ir.Node, array: NDArray[Any]) -> list[NDArray[Any]] | None:
    shape = _sizes(node.outputs[0])
    product = int(np.prod([size for size in shape if size != -1]))
    whole = array.size == product if -1 not in shape else product and array.size % product == 0
    return [array.reshape(shape)] if whole and shape.count(-1) < 2 else None


def _transposed(node: ir.Node, array: NDArray[Any]) -> list[NDArray[Any]] | None:
    order = node.attributes.get_ints("perm", tuple(range(array.ndim))[::-1])
    return [array.transpose(order)] if len(order) == array.ndim else None


def _split(node: ir.Node, array: NDArray[Any]) -> list[NDArray[Any]] | None:
    axis = node.attributes.get_int("axis", 0)
    sizes = [_sizes(output) for output in node.outputs]
    if any(len(size) != array.ndim or size[axis] < 0 for size in sizes):
        return None
    ends = np.cumsum([size[axis] for size in sizes])
    return np.split(array, ends[:-1], axis) if ends[-1] == array.shape[axis] else None


def _squeezed(node: ir.Node, array: NDArray[Any]) -> list[NDArray[Any]] | None:
    axes = constant_of(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or any(array.shape[axis] != 1 for axis in axes):
        return None
    return [array.squeeze(tuple(int(axis) for axis in axes))]


_MOVERS: Mapping[str, Any] = {
    "Reshape": _reshaped,
    "Transpose": _transposed,
    "Split": _split,
    "Squeeze": _squeezed,
}


def keeps_channels(node: ir.Node) -> bool:
    """True where a Slice or Gather picks rows (tokens, images), the last axis whole."""
    rank = len(sizes_of(node.inputs[0]))
    if node.op_type == "Gather":
        return rank > 1 and node.attributes.get_int("axis", 0) % rank != rank - 1
    axes = constant_of(node.inputs[3]) if len(node.inputs) > 3 else None
    if node.op_type != "Slice" or axes is None or not rank:
        return False
    return all(int(axis) % rank != rank - 1 for axis in axes)


# A channel moves by at most 2**LARGEST_EXPONENT: fp16 weights can hold that.
LARGEST_EXPONENT = 10


@dataclass(frozen=True, slots=True)
class SmoothingSite:
    """A value whose channels can be scaled: who writes them and who reads them.

    ``name`` is the value whose channels (last axis) are divided. ``written`` are (node, input
    index) of constants; in their last axis ``columns`` has the index of each channel. ``read`` are
    those of weights whose rows (input channels, axis ``axis``) are multiplied.
    """

    name: str
    written: tuple[tuple[str, int], ...]
    columns: tuple[int, ...]
    read: tuple[tuple[str, int], ...]
    axis: tuple[int, ...]


def find_smoothing_sites(
    model: ir.Model, projections: Sequence[Projection]
) -> tuple[SmoothingSite, ...]:
    """List a graph's smoothing sites; a value that something else reads too is none."""
    nodes = {node.name: node for node in model.graph}
    inside = {p.node: p for p in projections if p.role not in {Role.PATCH, Role.HEAD}}
    found = [_behind_norm(node, inside) for node in model.graph]
    for block, core in enumerate(find_cores(model)):
        out = next((p for p in projections if (p.role, p.block) == (Role.OUT, block)), None)
        if out is not None:
            found.append(_behind_attention(core, nodes[out.node], out))
    return tuple(site for site in found if site is not None)


def _behind_norm(node: ir.Node, inside: Mapping[str, Projection]) -> SmoothingSite | None:
    if node.op_type != "LayerNormalization" or len(node.inputs) < 2:
        return None
    readers = _readers(node.outputs[0], inside)
    width = _width(node.inputs[1])
    written = [(node.name or "", i) for i, v in enumerate(node.inputs) if i and v is not None]
    if not readers or not width or any(_width(v) != width for v in node.inputs[1:] if v):
        return None
    return _site(node.outputs[0], written, range(width), readers)


def _behind_attention(core: AttentionCore, node: ir.Node, out: Projection) -> SmoothingSite | None:
    found = columns_behind(core, node)
    if found is None or node.inputs[0] is None:
        return None
    source, columns = found
    written = _affine(source)
    return _site(node.inputs[0], written, columns, [out]) if written else None


def _site(
    value: ir.Value, written: Sequence[tuple[str, int]], columns: Any, readers: Sequence[Projection]
) -> SmoothingSite:
    return SmoothingSite(
        value.name or "",
        tuple(written),
        tuple(int(column) for column in columns),
        tuple((p.node, 1) for p in readers),
        tuple(1 - p.axis for p in readers),
    )


def _readers(value: ir.Value, inside: Mapping[str, Projection]) -> list[Projection] | None:
    """Projections that read a value, or some of its rows; None if anything else does."""
    found: list[Projection] = []
    for use in value.uses():
        if (use.node.name or "") in inside and use.idx == 0:
            found.append(inside[use.node.name or ""])
        elif use.idx == 0 and keeps_channels(use.node):
            behind = _readers(use.node.outputs[0], inside)
            if behind is None:
                return None
            found += behind
        else:
            return None
    return None if value.is_graph_output() or not found else found


def _affine(value: ir.Value) -> list[tuple[str, int]] | None:
    """Constants of ``x @ weight + bias``; both hold output channels in their last axis.

    The product itself must lead nowhere else, or another reader would see it scaled.
    """
    written = []
    node = value.producer()
    width = value.shape[-1] if value.shape is not None else None
    if node is not None and node.op_type == "Add":
        index = next((i for i, v in enumerate(node.inputs) if _width(v) == width), None)
        product = node.inputs[1 - index] if index is not None else None
        if product is None or len(product.uses()) != 1 or product.is_graph_output():
            return None
        written.append((node.name or "", index or 0))
        node = product.producer()
    if node is None or node.op_type != "MatMul" or _width(node.inputs[1]) != width:
        return None
    return [(node.name or "", 1), *written]


def _width(value: ir.Value | None) -> int | None:
    if value is None or value.const_value is None or not len(value.const_value.shape):
        return None
    size = value.const_value.shape[-1]
    return size if isinstance(size, int) else None


def largest_weights(model: ir.Model, site: SmoothingSite) -> NDArray[np.float32]:
    """Give the largest absolute value of each row (input channel) of all weights that read it."""
    nodes = {node.name: node for node in model.graph}
    largest = np.zeros(len(site.columns), np.float32)
    for (name, index), axis in zip(site.read, site.axis, strict=True):
        rows = np.moveaxis(array_of(operand(nodes[name], index)), axis, 0)
        largest = np.maximum(largest, np.abs(rows).reshape(len(rows), -1).max(axis=1))
    return largest


def factors(
    maxima: NDArray[np.float32], weights: NDArray[np.float32], strength: float
) -> NDArray[np.float32]:
    """Compute s_j = max|X_j| ** strength / max|W_j| ** (1 - strength), as powers of two.

    SmoothQuant, equation 4. A channel that is zero in all images, or in the weights, stays.
    ``maxima`` are the largest absolute values of each channel of a site, ``weights`` those of
    ``largest_weights``. ``strength`` 0 leaves all outliers to the activations, 1 gives all to the
    weights.
    """
    moved = (maxima > 0) & (weights > 0)
    exponents = np.zeros(len(maxima))
    exponents[moved] = strength * np.log2(maxima[moved]) - (1 - strength) * np.log2(weights[moved])
    exponents -= np.median(exponents[moved]) if moved.any() else 0.0
    exponents = np.where(
        moved, np.clip(np.rint(exponents), -LARGEST_EXPONENT, LARGEST_EXPONENT), 0.0
    )
    return np.exp2(exponents).astype(np.float32)


def fold(model: ir.Model, site: SmoothingSite, scale: NDArray[np.float32]) -> None:
    nodes = {node.name: node for node in model.graph}
    if len(site.columns) != len(scale):
        raise GraphError(f"{len(scale)} factors do not fit {site.name!r}; collect the ranges again")
    for name, index in site.written:
        array = array_of(operand(nodes[name], index)).copy()
        array[..., list(site.columns)] /= scale
        _set(model, nodes[name], index, array)
    for (name, index), axis in zip(site.read, site.axis, strict=True):
        array = array_of(operand(nodes[name], index))
        shape = [1] * array.ndim
        shape[axis] = -1
        _set(model, nodes[name], index, array * scale.reshape(shape))


def _set(model: ir.Model, node: ir.Node, index: int, array: NDArray[Any]) -> None:
    """Give a node another constant; one that other nodes read too stays theirs."""
    value = operand(node, index)
    if len(value.uses()) == 1:
        value.const_value = ir.tensor(np.ascontiguousarray(array))
        return
    own = GraphBuilder(model.graph).constant(array, f"{node.name}.{index}.smooth")
    node.replace_input_with(index, own)
