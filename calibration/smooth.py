"""Move channel outliers from activations into weights, without changing what is computed.

SmoothQuant, arXiv 2211.10438: channel j of a product's input is divided by s_j, row j of its weight
multiplied by it, and the division is folded into what writes the channel: the affine of a
LayerNormalization (norm1 before qkv, norm2 before fc1), or the value columns of the query-key-value
projection (attention mixes tokens and leaves channels apart, so the output projection's input
follows). GELU is not homogeneous: nothing before it can take a factor of fc2's input.

Every s_j is a power of two, which no rounding can touch: the smoothed fp32 graph gives the bytes
that the graph gave before. It costs 6 % of what the error of int8 is anyway (docs/quantization.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.calibration.projections import Projection, Role, find_cores
from msn_export.errors import GraphError

# A channel moves by at most 2**LARGEST_EXPONENT: fp16 weights have room for that.
LARGEST_EXPONENT = 10


@dataclass(frozen=True, slots=True)
class Seam:
    """A place where channels can be scaled: who writes them and who reads them.

    ``name`` is the value whose channels (last axis) are divided. ``written`` are (node, input
    index) of constants whose columns ``columns`` are divided, ``read`` those of weights whose rows
    (input channels) are multiplied; ``axis`` is the axis of input channels, one for each of them.
    """

    name: str
    written: tuple[tuple[str, int], ...]
    columns: tuple[int, int]
    read: tuple[tuple[str, int], ...]
    axis: tuple[int, ...]


def find_seams(model: ir.Model, projections: Sequence[Projection]) -> tuple[Seam, ...]:
    """List the seams of a graph; a value that something else reads too is none."""
    nodes = {node.name: node for node in model.graph}
    inside = {p.node: p for p in projections if p.role not in {Role.PATCH, Role.HEAD}}
    found = []
    for node in model.graph:
        if node.op_type == "LayerNormalization" and node.outputs[0].shape is not None:
            readers = _readers(node.outputs[0], inside)
            if readers:
                written = [(node.name or "", i) for i in range(1, len(node.inputs))]
                width = node.outputs[0].shape[-1]
                found.append(_seam(node.outputs[0], written, (0, width), readers))
    for block, core in enumerate(find_cores(model)):
        out = next(p for p in projections if (p.role, p.block) == (Role.OUT, block))
        value = nodes[out.node].inputs[0]
        written_to = _value_columns(core.v)
        if value is not None and written_to is not None and _only_leads_to(core.output, out.node):
            found.append(_seam(value, *written_to, [out]))
    return tuple(found)


def _seam(value: ir.Value, written: Any, columns: Any, readers: Sequence[Projection]) -> Seam:
    return Seam(
        value.name or "",
        tuple(written),
        columns,
        tuple((p.node, 1) for p in readers),
        tuple(1 - p.axis for p in readers),
    )


def _readers(value: ir.Value, inside: Mapping[str, Projection]) -> list[Projection] | None:
    """Name the projections that read a value, or some of its rows; None if anything else does."""
    found: list[Projection] = []
    for use in value.uses():
        if (use.node.name or "") in inside and use.idx == 0:
            found.append(inside[use.node.name or ""])
        elif use.node.op_type in {"Slice", "Gather"} and use.idx == 0:
            behind = _readers(use.node.outputs[0], inside)
            if behind is None:
                return None
            found += behind
        else:
            return None
    return None if value.is_graph_output() or not found else found


def _only_leads_to(value: ir.Value, node: str) -> bool:
    """Whether one chain of layout operators leads from a core's result to a projection."""
    while len(value.uses()) == 1 and not value.is_graph_output():
        user = next(iter(value.uses())).node
        if user.name == node:
            return True
        if user.op_type not in {"Transpose", "Reshape"}:
            return False
        value = user.outputs[0]
    return False


def _value_columns(v: ir.Value) -> tuple[list[tuple[str, int]], tuple[int, int]] | None:
    """Find weight and bias behind the values, and which of their columns give the values."""
    part, parts = 0, 1
    node = v.producer()
    while node is not None and node.op_type in {"Transpose", "Reshape", "Split"}:
        if node.op_type == "Split":
            if parts > 1 or len({str(o.shape) for o in node.outputs}) > 1:
                return None
            part, parts = list(node.outputs).index(v), len(node.outputs)
        if node.inputs[0] is None:
            return None
        v = node.inputs[0]
        node = v.producer()
    return _affine(node, part, parts)


def _affine(
    node: ir.Node | None, part: int, parts: int
) -> tuple[list[tuple[str, int]], tuple[int, int]] | None:
    """Give the constants of ``x @ weight + bias``; both hold output channels in their last axis."""
    written = []
    if node is not None and node.op_type == "Add":
        index = next(
            (i for i, v in enumerate(node.inputs) if v is not None and v.const_value), None
        )
        if index is None or node.inputs[1 - index] is None:
            return None
        written.append((node.name or "", index))
        other = node.inputs[1 - index]
        node = other.producer() if other is not None else None
    if node is None or node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    shape = node.inputs[1].shape
    if node.inputs[1].const_value is None or shape is None or not isinstance(shape[-1], int):
        return None
    size = shape[-1] // parts
    return [(node.name or "", 1), *written], (part * size, (part + 1) * size)


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
    exponents = np.where(moved, np.clip(np.rint(exponents), -LARGEST_EXPONENT, LARGEST_EXPONENT), 0.0)
    return np.exp2(exponents).astype(np.float32)


def fold(model: ir.Model, seam: Seam, scale: NDArray[np.float32]) -> None:
    """Divide what is written by ``scale`` and multiply what reads it, in place.

    Raises:
        GraphError: the factors are for another number of channels.
    """
    nodes = {node.name: node for node in model.graph}
    first, last = seam.columns
    if (
        last - first != len(scale)
        or not {n for n, _ in (*seam.written, *seam.read)} <= nodes.keys()
    ):
        raise GraphError(f"{len(scale)} factors do not fit {seam.name!r}; collect the ranges again")
    for name, index in seam.written:
        array = _constant(nodes[name], index).copy()
        array[..., first:last] /= scale
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
    if len(value.uses()) > 1:
        value = ir.Value(name=f"{node.name}.{index}.smooth", type=value.type, shape=value.shape)
        model.graph.register_initializer(value)
        node.replace_input_with(index, value)
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
