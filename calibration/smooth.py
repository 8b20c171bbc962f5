"""Move channel outliers from activations into weights, without changing what is computed.

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

from msn_export.calibration.channels import columns_behind, keeps_channels
from msn_export.calibration.projections import Projection, Role, find_cores
from msn_export.errors import GraphError
from msn_export.graph.attention import AttentionCore
from msn_export.graph.patch import Patch

# A channel moves by at most 2**LARGEST_EXPONENT: fp16 weights have room for that.
LARGEST_EXPONENT = 10


@dataclass(frozen=True, slots=True)
class Seam:
    """A place where channels can be scaled: who writes them and who reads them.

    ``name`` is the value whose channels (last axis) are divided. ``written`` are (node, input
    index) of constants, in whose last axis ``columns`` has the place of each channel; ``read`` are
    those of weights whose rows (input channels, axis ``axis``) are multiplied.
    """

    name: str
    written: tuple[tuple[str, int], ...]
    columns: tuple[int, ...]
    read: tuple[tuple[str, int], ...]
    axis: tuple[int, ...]


def find_seams(model: ir.Model, projections: Sequence[Projection]) -> tuple[Seam, ...]:
    """List the seams of a graph; a value that something else reads too is none."""
    nodes = {node.name: node for node in model.graph}
    inside = {p.node: p for p in projections if p.role not in {Role.PATCH, Role.HEAD}}
    found = [_behind_norm(node, inside) for node in model.graph]
    for block, core in enumerate(find_cores(model)):
        out = next((p for p in projections if (p.role, p.block) == (Role.OUT, block)), None)
        if out is not None:
            found.append(_behind_attention(core, nodes[out.node], out))
    return tuple(seam for seam in found if seam is not None)


def _behind_norm(node: ir.Node, inside: Mapping[str, Projection]) -> Seam | None:
    if node.op_type != "LayerNormalization" or len(node.inputs) < 2:
        return None
    readers = _readers(node.outputs[0], inside)
    width = _width(node.inputs[1])
    written = [(node.name or "", i) for i, v in enumerate(node.inputs) if i and v is not None]
    if not readers or not width or any(_width(v) != width for v in node.inputs[1:] if v):
        return None
    return _seam(node.outputs[0], written, range(width), readers)


def _behind_attention(core: AttentionCore, node: ir.Node, out: Projection) -> Seam | None:
    found = columns_behind(core, node)
    if found is None or node.inputs[0] is None:
        return None
    source, columns = found
    written = _affine(source)
    return _seam(node.inputs[0], written, columns, [out]) if written else None


def _seam(
    value: ir.Value, written: Sequence[tuple[str, int]], columns: Any, readers: Sequence[Projection]
) -> Seam:
    return Seam(
        value.name or "",
        tuple(written),
        tuple(int(column) for column in columns),
        tuple((p.node, 1) for p in readers),
        tuple(1 - p.axis for p in readers),
    )


def _readers(value: ir.Value, inside: Mapping[str, Projection]) -> list[Projection] | None:
    """Name the projections that read a value, or some of its rows; None if anything else does."""
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
    """Give the constants of ``x @ weight + bias``; both hold output channels in their last axis.

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
    """Give the last size of a constant."""
    if value is None or value.const_value is None or not len(value.const_value.shape):
        return None
    size = value.const_value.shape[-1]
    return size if isinstance(size, int) else None


def factors(
    model: ir.Model, seam: Seam, maxima: NDArray[np.float32], strength: float
) -> NDArray[np.float32]:
    """Compute s_j = max|X_j| ** strength / max|W_j| ** (1 - strength), as powers of two.

    SmoothQuant, equation 4. A channel that is zero in all images, or in the weights, stays.

    Args:
        model: the graph the seam is of.
        seam: where the factors go.
        maxima: the largest absolute value of each channel of ``seam.name``.
        strength: 0 leaves all outliers to the activations, 1 gives all to the weights.
    """
    nodes = {node.name: node for node in model.graph}
    weights = np.zeros(len(maxima), np.float32)
    for (name, index), axis in zip(seam.read, seam.axis, strict=True):
        rows = np.moveaxis(_constant(nodes[name], index), axis, 0)
        weights = np.maximum(weights, np.abs(rows).reshape(len(rows), -1).max(axis=1))
    moved = (maxima > 0) & (weights > 0)
    exponents = np.zeros(len(maxima))
    exponents[moved] = strength * np.log2(maxima[moved]) - (1 - strength) * np.log2(weights[moved])
    exponents -= np.median(exponents[moved]) if moved.any() else 0.0
    exponents = np.where(
        moved, np.clip(np.rint(exponents), -LARGEST_EXPONENT, LARGEST_EXPONENT), 0.0
    )
    return np.exp2(exponents).astype(np.float32)


def fold(model: ir.Model, seam: Seam, scale: NDArray[np.float32]) -> None:
    """Divide what is written by ``scale`` and multiply what reads it, in place.

    Raises:
        GraphError: the factors are for another number of channels.
    """
    nodes = {node.name: node for node in model.graph}
    if len(seam.columns) != len(scale):
        raise GraphError(f"{len(scale)} factors do not fit {seam.name!r}; collect the ranges again")
    for name, index in seam.written:
        array = _constant(nodes[name], index).copy()
        array[..., list(seam.columns)] /= scale
        _set(model, nodes[name], index, array)
    for (name, index), axis in zip(seam.read, seam.axis, strict=True):
        array = _constant(nodes[name], index)
        shape = [1] * array.ndim
        shape[axis] = -1
        _set(model, nodes[name], index, array * scale.reshape(shape))


def _constant(node: ir.Node, index: int) -> NDArray[Any]:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _set(model: ir.Model, node: ir.Node, index: int, array: NDArray[Any]) -> None:
    """Give a node another constant; one that other nodes read too stays theirs."""
    value = node.inputs[index]
    assert value is not None
    if len(value.uses()) == 1:
        value.const_value = ir.tensor(np.ascontiguousarray(array))
        return
    own = Patch(model.graph, node).constant(array, f"{node.name}.{index}.smooth")
    node.replace_input_with(index, own)
