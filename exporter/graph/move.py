"""What torch calls that move data, and compute nothing, are in ONNX, opset 23.

See ``msn_export.graph.operators``.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from msn_export.graph.draft import Draft, require_size, shape_of

_END = np.iinfo(np.int64).max  # onnx.ai operators, Slice: "to the end"


def flatten(draft: Draft, x: ir.Value, start_dim: int = 0, end_dim: int = -1) -> ir.Value:
    """Merge neighbouring axes."""
    shape = shape_of(x)
    end = end_dim % len(shape) + 1
    merged = math.prod(require_size(dim) for dim in shape[start_dim:end])
    return draft.reshape(x, (*shape[:start_dim], merged, *shape[end:]))


def unflatten(draft: Draft, x: ir.Value, dim: int, sizes: Sequence[int]) -> ir.Value:
    """Split an axis; one size may be -1."""
    shape = shape_of(x)
    axis = dim % len(shape)
    rest = require_size(shape[axis]) // math.prod(size for size in sizes if size != -1)
    split = [rest if size == -1 else size for size in sizes]
    return draft.reshape(x, (*shape[:axis], *split, *shape[axis + 1 :]))


def permute(draft: Draft, x: ir.Value, *dims: int) -> ir.Value:
    """Reorder the axes; the batch stays the first."""
    shape = shape_of(x)
    if dims[0] != 0:
        raise ValueError("the batch must stay the first axis")
    return draft.op("Transpose", [x], tuple(shape[dim] for dim in dims), {"perm": dims})


def transpose(draft: Draft, x: ir.Value, dim0: int, dim1: int) -> ir.Value:
    """Swap two axes."""
    dims = list(range(len(shape_of(x))))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return permute(draft, x, *dims)


def chunk(draft: Draft, x: ir.Value, chunks: int, dim: int = 0) -> Sequence[ir.Value]:
    """Cut an axis in equal parts."""
    shape = list(shape_of(x))
    size, left = divmod(require_size(shape[dim]), chunks)
    if left:
        raise ValueError(f"{shape[dim]} rows are no {chunks} equal parts")
    shape[dim] = size
    attributes = {"axis": dim, "num_outputs": chunks}
    return draft.ops("Split", [x], [tuple(shape)] * chunks, attributes)


def cat(draft: Draft, tensors: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    """Join values along an axis."""
    shape = list(shape_of(tensors[0]))
    shape[dim] = sum(require_size(shape_of(value)[dim]) for value in tensors)
    return draft.op("Concat", list(tensors), tuple(shape), {"axis": dim % len(shape)})


def pad(
    draft: Draft,
    x: ir.Value,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> ir.Value:
    """Add zeros before and after; ``pad`` are pairs, the last axis first."""
    if mode != "constant" or value:
        raise ValueError(f"{mode} {value or 0} instead of zeros")
    shape = shape_of(x)
    pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    pairs = [(0, 0)] * (len(shape) - len(pairs)) + pairs
    grown = tuple(
        dim if before == after == 0 else require_size(dim) + before + after
        for dim, (before, after) in zip(shape, pairs, strict=True)
    )
    sizes = [before for before, _ in pairs] + [after for _, after in pairs]
    name = "x".join(str(size) for size in sizes)
    return draft.op("Pad", [x, draft.constant(np.array(sizes), f"pad.{name}")], grown)


def getitem(draft: Draft, x: ir.Value | Sequence[Any], index: Any) -> Any:
    """Index with numbers and slices; what is no graph value is indexed as Python does."""
    if not isinstance(x, ir.Value):
        return operator.getitem(x, index)
    axis = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int):
            shape = list(shape_of(x))
            del shape[axis]
            at = draft.constant(np.array(part), f"row.{part}")
            x = draft.op("Gather", [x, at], tuple(shape), {"axis": axis})
        else:
            x = x if part == slice(None) else _slice(draft, x, axis, part)
            axis += 1
    return x


def _slice(draft: Draft, x: ir.Value, axis: int, part: slice) -> ir.Value:
    shape = list(shape_of(x))
    start, stop, _ = slice(part.start, part.stop).indices(require_size(shape[axis]))
    shape[axis] = stop - start
    bounds = [start, _END if part.stop is None else stop, axis]
    inputs = [draft.constant(np.array([n]), f"index.{n}") for n in bounds]
    return draft.op("Slice", [x, *inputs], tuple(shape))
