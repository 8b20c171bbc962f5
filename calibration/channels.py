"""Follow channels through operators that only move elements, by moving their numbers the same way.

Exporters pack queries, keys and values in several orders: (3, h, d) as here and in timm, (h, 3, d)
elsewhere. Carrying the number of each column along finds the right one in all of them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.graph.attention import AttentionCore

# b batch, n tokens, c channels

_MOVES = frozenset({"Reshape", "Transpose", "Split", "Squeeze"})


def columns_behind(
    core: AttentionCore, reader: ir.Node
) -> tuple[ir.Value, NDArray[np.int64]] | None:
    """Find which columns of which product are the channels that ``reader`` reads.

    Args:
        core: an attention core; it mixes tokens and leaves the heads and channels of v apart.
        reader: the node whose first input [b, n, c] comes from the core.

    Returns:
        The value [b, n, columns] that v is a rearrangement of, and for each channel that
        ``reader`` reads its column there; None where that is not known, or others read it too.
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
    """Give a shape with -1 for what is dynamic."""
    return [size if isinstance(size, int) else -1 for size in value.shape or ()]


def _chain(value: ir.Value | None) -> list[ir.Node]:
    """List the moving nodes that lead to a value, the first first."""
    found: list[ir.Node] = []
    while value is not None:
        node = value.producer()
        if node is None or node.op_type not in _MOVES:
            break
        found.insert(0, node)
        value = node.inputs[0]
    return found


def _only_lead_to(chain: list[ir.Node], value: ir.Value, reader: ir.Node) -> bool:
    """Whether nothing but the chain and ``reader`` sees the values on the way to ``value``."""
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
    known = int(np.prod([size for size in shape if size != -1]))
    whole = array.size == known if -1 not in shape else known and array.size % known == 0
    return [array.reshape(shape)] if whole and shape.count(-1) < 2 else None


def _transposed(node: ir.Node, array: NDArray[Any]) -> list[NDArray[Any]] | None:
    perm = node.attributes.get("perm")
    order = list(perm.as_ints()) if perm is not None else list(range(array.ndim))[::-1]
    return [array.transpose(order)] if len(order) == array.ndim else None


def _split(node: ir.Node, array: NDArray[Any]) -> list[NDArray[Any]] | None:
    axis = _axis(node)
    sizes = [_sizes(output) for output in node.outputs]
    if any(len(size) != array.ndim or size[axis] < 0 for size in sizes):
        return None
    ends = np.cumsum([size[axis] for size in sizes])
    return np.split(array, ends[:-1], axis) if ends[-1] == array.shape[axis] else None


def _squeezed(node: ir.Node, array: NDArray[Any]) -> list[NDArray[Any]] | None:
    axes = node.inputs[1].const_value if len(node.inputs) > 1 and node.inputs[1] else None
    if axes is None or any(array.shape[axis] != 1 for axis in axes.numpy()):
        return None
    return [array.squeeze(tuple(int(axis) for axis in axes.numpy()))]


def _axis(node: ir.Node) -> int:
    axis = node.attributes.get("axis")
    return axis.as_int() if axis is not None else 0


_MOVERS: Mapping[str, Any] = {
    "Reshape": _reshaped,
    "Transpose": _transposed,
    "Split": _split,
    "Squeeze": _squeezed,
}


def keeps_channels(node: ir.Node) -> bool:
    """Whether a Slice or Gather picks rows (tokens, images) and leaves the last axis whole."""
    value = node.inputs[0]
    rank = len(value.shape) if value is not None and value.shape is not None else 0
    if node.op_type == "Gather":
        return rank > 1 and _axis(node) % rank != rank - 1
    axes = node.inputs[3].const_value if len(node.inputs) > 3 and node.inputs[3] else None
    if node.op_type != "Slice" or axes is None or not rank:
        return False
    return all(int(axis) % rank != rank - 1 for axis in axes.numpy())
