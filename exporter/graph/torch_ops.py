"""Torch calls of the model as ONNX operators, opset 23.

A function here takes a builder and the call's own arguments, tensors being graph values. Names and
defaults are torch's, for a call may name its arguments.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from msn_export.graph.builder import GraphBuilder

# A size is a number, or the batch's name.
Dim = int | ir.SymbolicDim
Shape = tuple[Dim, ...]


def shape_of(value: ir.Value) -> Shape:
    """Give a value's shape, which is known of every value here."""
    assert value.shape is not None
    return tuple(value.shape)


def require_size(dim: Dim) -> int:
    if not isinstance(dim, int):
        raise ValueError(f"the batch {dim} would become a constant")  # noqa: TRY004
    return dim


def weight_of(builder: GraphBuilder, name: str, tensor: Tensor) -> ir.Value:
    """Add a parameter; it shares the model's memory."""
    existing = builder.graph.initializers.get(name)
    return existing or builder.initializer(ir.tensor(tensor.detach().numpy()), name)


def transposed(builder: GraphBuilder, name: str, tensor: Tensor) -> ir.Value:
    """Add a matrix [out, in] as [in, out]; transposed anew when read, so that no copy stays."""
    rows, columns = tensor.shape
    make = partial(_transposed, tensor.detach())
    dtype = ir.tensor(tensor.detach().numpy()).dtype
    lazy = ir.LazyTensor(make, dtype, ir.Shape((columns, rows)))
    return builder.graph.initializers.get(name) or builder.initializer(lazy, name)


def _transposed(matrix: Tensor) -> ir.TensorProtocol:
    return ir.tensor(matrix.t().contiguous().numpy())


def _reshape(builder: GraphBuilder, x: ir.Value, shape: Shape) -> ir.Value:
    return builder.reshape(x, *map(require_size, shape[1:]), shape=shape)


_END = np.iinfo(np.int64).max  # onnx.ai operators, Slice: "to the end"


def flatten(builder: GraphBuilder, x: ir.Value, start_dim: int = 0, end_dim: int = -1) -> ir.Value:
    shape = shape_of(x)
    end = end_dim % len(shape) + 1
    merged = math.prod(require_size(dim) for dim in shape[start_dim:end])
    return _reshape(builder, x, (*shape[:start_dim], merged, *shape[end:]))


def unflatten(builder: GraphBuilder, x: ir.Value, dim: int, sizes: Sequence[int]) -> ir.Value:
    """Split an axis; one size may be -1."""
    shape = shape_of(x)
    axis = dim % len(shape)
    rest = require_size(shape[axis]) // math.prod(size for size in sizes if size != -1)
    split = [rest if size == -1 else size for size in sizes]
    return _reshape(builder, x, (*shape[:axis], *split, *shape[axis + 1 :]))


def permute(builder: GraphBuilder, x: ir.Value, *dims: int) -> ir.Value:
    """Reorder the axes; the batch stays the first."""
    shape = shape_of(x)
    if dims[0] != 0:
        raise ValueError("the batch must stay the first axis")
    return builder.op("Transpose", [x], {"perm": dims}, shape=tuple(shape[dim] for dim in dims))


def transpose(builder: GraphBuilder, x: ir.Value, dim0: int, dim1: int) -> ir.Value:
    dims = list(range(len(shape_of(x))))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return permute(builder, x, *dims)


def chunk(builder: GraphBuilder, x: ir.Value, chunks: int, dim: int = 0) -> Sequence[ir.Value]:
    shape = list(shape_of(x))
    size, left = divmod(require_size(shape[dim]), chunks)
    if left:
        raise ValueError(f"{shape[dim]} rows are no {chunks} equal parts")
    shape[dim] = size
    attributes = {"axis": dim, "num_outputs": chunks}
    return builder.ops("Split", [x], attributes, outputs=chunks, shape=shape)


def cat(builder: GraphBuilder, tensors: Sequence[ir.Value], dim: int = 0) -> ir.Value:
    shape = list(shape_of(tensors[0]))
    shape[dim] = sum(require_size(shape_of(value)[dim]) for value in tensors)
    return builder.op("Concat", list(tensors), {"axis": dim % len(shape)}, shape=shape)


def pad(
    builder: GraphBuilder,
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
    return builder.op("Pad", [x, builder.constant(sizes, f"pad.{name}")], shape=grown)


def getitem(builder: GraphBuilder, x: ir.Value | Sequence[Any], index: Any) -> Any:
    """Index with numbers and slices; what is no graph value is indexed as Python does."""
    if not isinstance(x, ir.Value):
        return operator.getitem(x, index)
    axis = 0
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, int):
            shape = list(shape_of(x))
            del shape[axis]
            at = builder.constant(part, f"row.{part}")
            x = builder.op("Gather", [x, at], {"axis": axis}, shape=shape)
        elif isinstance(part, list):
            shape = [*shape_of(x)[:axis], len(part), *shape_of(x)[axis + 1 :]]
            at = builder.constant(part, "patches.kept")
            x = builder.op("Gather", [x, at], {"axis": axis}, shape=shape)
            axis += 1
        else:
            x = x if part == slice(None) else _slice(builder, x, axis, part)
            axis += 1
    return x


def _slice(builder: GraphBuilder, x: ir.Value, axis: int, part: slice) -> ir.Value:
    shape = list(shape_of(x))
    start, stop, _ = slice(part.start, part.stop).indices(require_size(shape[axis]))
    shape[axis] = stop - start
    bounds = [start, _END if part.stop is None else stop, axis]
    inputs = [builder.constant([n], f"index.{n}") for n in bounds]
    return builder.op("Slice", [x, *inputs], shape=shape)


_DTYPES = {torch.float32: ir.DataType.FLOAT, torch.uint8: ir.DataType.UINT8}


def conv2d(builder: GraphBuilder, x: ir.Value, module: nn.Conv2d, name: str) -> ir.Value:
    """A convolution without padding or dilation: [b, c, h, w] -> [b, dim, rows, columns]."""
    if module.padding != (0, 0) or module.dilation != (1, 1) or module.groups != 1:
        raise ValueError("a convolution with padding, dilation or groups is none of a ViT")
    kernel, strides = tuple(module.kernel_size), tuple(module.stride)
    batch, _, *pixels = shape_of(x)
    sides = [
        (require_size(side) - size) // step + 1
        for side, size, step in zip(pixels, kernel, strides, strict=True)
    ]
    weights = [weight_of(builder, f"{name}.{part}", p) for part, p in module.named_parameters()]
    attributes = {"kernel_shape": kernel, "strides": strides}
    return builder.op("Conv", [x, *weights], attributes, shape=(batch, module.out_channels, *sides))


def linear(builder: GraphBuilder, x: ir.Value, module: nn.Linear, name: str) -> ir.Value:
    """``x @ weight.T + bias``; one Gemm where x has the two axes that it takes."""
    shape = (*shape_of(x)[:-1], module.out_features)
    parts = dict(module.named_parameters())
    if len(shape) == 2:
        inputs = [weight_of(builder, f"{name}.{part}", p) for part, p in parts.items()]
        return builder.op("Gemm", [x, *inputs], {"transB": 1}, shape=shape)
    weight = transposed(builder, f"{name}.weight", parts["weight"])
    y = builder.op("MatMul", [x, weight], shape=shape)
    if "bias" not in parts:
        return y
    return builder.op("Add", [y, weight_of(builder, f"{name}.bias", parts["bias"])], shape=shape)


def layer_norm(builder: GraphBuilder, x: ir.Value, module: nn.LayerNorm, name: str) -> ir.Value:
    weights = [weight_of(builder, f"{name}.{part}", p) for part, p in module.named_parameters()]
    attributes = {"axis": -1, "epsilon": module.eps}
    return builder.op("LayerNormalization", [x, *weights], attributes, shape=shape_of(x))


def _unary(op_type: str) -> Callable[..., ir.Value]:
    def write(builder: GraphBuilder, x: ir.Value, *, inplace: bool = False) -> ir.Value:  # noqa: ARG001
        return builder.op(op_type, [x], shape=shape_of(x))

    return write


def _binary(op_type: str) -> Callable[..., ir.Value]:
    def write(builder: GraphBuilder, a: ir.Value | float, b: ir.Value | float) -> ir.Value:
        operands = [_operand(builder, a), _operand(builder, b)]
        return builder.op(op_type, operands, shape=_broadcast(*map(shape_of, operands)))

    return write


def _operand(builder: GraphBuilder, x: ir.Value | float) -> ir.Value:
    if isinstance(x, ir.Value):
        return x
    return builder.constant(np.asarray(x, np.float32), f"constant.{float(x):.9g}")


def _broadcast(a: Shape, b: Shape) -> Shape:
    rank = max(len(a), len(b))
    pairs = zip((1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b, strict=True)
    return tuple(_common(x, y) for x, y in pairs)


def _common(a: Dim, b: Dim) -> Dim:
    if b in (a, 1):
        return a
    if a == 1:
        return b
    raise ValueError(f"sizes {a} and {b} do not broadcast")


def _gelu(builder: GraphBuilder, x: ir.Value, approximate: str = "none") -> ir.Value:
    return builder.op("Gelu", [x], {"approximate": approximate}, shape=shape_of(x))


def _leaky_relu(
    builder: GraphBuilder, x: ir.Value, negative_slope: float = 0.01, **_: bool
) -> ir.Value:
    return builder.op("LeakyRelu", [x], {"alpha": negative_slope}, shape=shape_of(x))


def _silu(builder: GraphBuilder, x: ir.Value, **_: bool) -> ir.Value:
    return builder.op("Mul", [x, builder.op("Sigmoid", [x], shape=shape_of(x))], shape=shape_of(x))


def _square(builder: GraphBuilder, x: ir.Value) -> ir.Value:
    return builder.op("Mul", [x, x], shape=shape_of(x))


def _clamp(builder: GraphBuilder, x: ir.Value, min: float, max: float) -> ir.Value:
    bounds = [_operand(builder, min), _operand(builder, max)]
    return builder.op("Clip", [x, *bounds], shape=shape_of(x))


def _relu6(builder: GraphBuilder, x: ir.Value, **_: bool) -> ir.Value:
    return _clamp(builder, x, 0, 6)


def _softmax(
    builder: GraphBuilder, x: ir.Value, dim: int, dtype: torch.dtype | None = None
) -> ir.Value:
    x = x if dtype is None else _to(builder, x, dtype)
    return builder.op("Softmax", [x], {"axis": dim}, shape=shape_of(x))


def _attention(builder: GraphBuilder, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
    return builder.op("Attention", [q, k, v], shape=(*shape_of(q)[:-1], shape_of(v)[-1]))


def _matmul(builder: GraphBuilder, a: ir.Value, b: ir.Value) -> ir.Value:
    left, right = shape_of(a), shape_of(b)
    shape = (*_broadcast(left[:-2], right[:-2]), left[-2], right[-1])
    return builder.op("MatMul", [a, b], shape=shape)


def _mean(builder: GraphBuilder, x: ir.Value, dim: int) -> ir.Value:
    shape = list(shape_of(x))
    del shape[dim]
    axes = builder.constant([dim], f"index.{dim}")
    return builder.op("ReduceMean", [x, axes], {"keepdims": 0}, shape=shape)


def _layer_norm(
    builder: GraphBuilder,
    x: ir.Value,
    normalized_shape: Sequence[int],
    eps: float = 1e-5,
    **_: None,
) -> ir.Value:
    """Normalise without gain and bias; the operator takes a gain all the same."""
    ones = builder.constant(np.ones(tuple(normalized_shape), np.float32), "ones")
    attributes = {"axis": -1, "epsilon": eps}
    return builder.op("LayerNormalization", [x, ones], attributes, shape=shape_of(x))


def _normalize(
    builder: GraphBuilder, x: ir.Value, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **_: None
) -> ir.Value:
    """``x / max(norm, eps)``; by the mean of squares, whose sum may pass fp16's largest number."""
    shape = shape_of(x)
    if p != 2.0 or dim % len(shape) != len(shape) - 1:
        raise ValueError(f"norm {p} along axis {dim} instead of 2 along the last")
    axes = builder.constant([-1], "index.-1")
    squares = _square(builder, x)
    mean = builder.op("ReduceMean", [squares, axes], {"keepdims": 1}, shape=(*shape[:-1], 1))
    root = builder.op("Sqrt", [mean], shape=shape_of(mean))
    norm = _binary("Mul")(builder, root, require_size(shape[-1]) ** 0.5)
    bounded = builder.op("Max", [norm, _operand(builder, eps)], shape=shape_of(norm))
    return _binary("Div")(builder, x, bounded)


def _to(builder: GraphBuilder, x: ir.Value, dtype: torch.dtype | ir.DataType) -> ir.Value:
    wanted = _DTYPES[dtype] if isinstance(dtype, torch.dtype) else dtype
    return x if wanted == x.dtype else builder.cast(x, wanted)


def _getattr(_builder: GraphBuilder, x: ir.Value, name: str) -> Shape | ir.DataType | None:
    return {"shape": shape_of(x), "dtype": x.dtype}[name]


MODULES: Mapping[type[nn.Module], Callable[..., ir.Value]] = {
    nn.Conv2d: conv2d,
    nn.Linear: linear,
    nn.LayerNorm: layer_norm,
}

# By the name of the function or method: Tensor.sqrt and torch.sqrt are one thing.
CALLS: Mapping[str, Callable[..., Any]] = {
    "add": _binary("Add"),
    "cat": cat,
    "chunk": chunk,
    "clamp": _clamp,
    "erf": _unary("Erf"),
    "flatten": flatten,
    "gelu": _gelu,
    "getattr": _getattr,
    "getitem": getitem,
    "hardswish": _unary("HardSwish"),
    "layer_norm": _layer_norm,
    "leaky_relu": _leaky_relu,
    "matmul": _matmul,
    "mean": _mean,
    "mish": _unary("Mish"),
    "mul": _binary("Mul"),
    "normalize": _normalize,
    "pad": pad,
    "permute": permute,
    "relu": _unary("Relu"),
    "relu6": _relu6,
    "scaled_dot_product_attention": _attention,
    "sigmoid": _unary("Sigmoid"),
    "silu": _silu,
    "softmax": _softmax,
    "softplus": _unary("Softplus"),
    "sqrt": _unary("Sqrt"),
    "square": _square,
    "sub": _binary("Sub"),
    "tanh": _unary("Tanh"),
    "to": _to,
    "transpose": transpose,
    "truediv": _binary("Div"),
    "unflatten": unflatten,
}
