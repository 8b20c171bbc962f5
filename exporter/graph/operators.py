"""What each torch call of the model is in ONNX, opset 23.

A function here takes the draft and the call's own arguments, tensors being graph values. Names and
defaults are torch's, for a call may name its arguments.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from msn_export.graph import move
from msn_export.graph.draft import Dim, Draft, Shape, require_size, shape_of

_DTYPES = {torch.float32: ir.DataType.FLOAT, torch.uint8: ir.DataType.UINT8}


def conv2d(draft: Draft, x: ir.Value, module: nn.Conv2d, name: str) -> ir.Value:
    """A convolution without padding or dilation: [b, c, h, w] -> [b, dim, rows, columns]."""
    if module.padding != (0, 0) or module.dilation != (1, 1) or module.groups != 1:
        raise ValueError("a convolution with padding, dilation or groups is none of a ViT")
    kernel, strides = tuple(module.kernel_size), tuple(module.stride)
    batch, _, *pixels = shape_of(x)
    sides = [
        (require_size(side) - size) // step + 1
        for side, size, step in zip(pixels, kernel, strides, strict=True)
    ]
    weights = [draft.weight(f"{name}.{part}", p) for part, p in module.named_parameters()]
    attributes = {"kernel_shape": kernel, "strides": strides}
    return draft.op("Conv", [x, *weights], (batch, module.out_channels, *sides), attributes)


def linear(draft: Draft, x: ir.Value, module: nn.Linear, name: str) -> ir.Value:
    """``x @ weight.T + bias``; one Gemm where x has the two axes that it takes."""
    shape = (*shape_of(x)[:-1], module.out_features)
    parts = dict(module.named_parameters())
    if len(shape) == 2:
        inputs = [draft.weight(f"{name}.{part}", p) for part, p in parts.items()]
        return draft.op("Gemm", [x, *inputs], shape, {"transB": 1})
    y = draft.op("MatMul", [x, draft.transposed(f"{name}.weight", parts["weight"])], shape)
    if "bias" not in parts:
        return y
    return draft.op("Add", [y, draft.weight(f"{name}.bias", parts["bias"])], shape)


def layer_norm(draft: Draft, x: ir.Value, module: nn.LayerNorm, name: str) -> ir.Value:
    """LayerNorm over the last axis."""
    weights = [draft.weight(f"{name}.{part}", p) for part, p in module.named_parameters()]
    attributes = {"axis": -1, "epsilon": module.eps}
    return draft.op("LayerNormalization", [x, *weights], shape_of(x), attributes)


def _unary(op_type: str) -> Callable[..., ir.Value]:
    def write(draft: Draft, x: ir.Value, *, inplace: bool = False) -> ir.Value:  # noqa: ARG001
        return draft.op(op_type, [x], shape_of(x))

    return write


def _binary(op_type: str) -> Callable[..., ir.Value]:
    def write(draft: Draft, a: ir.Value | float, b: ir.Value | float) -> ir.Value:
        operands = [_operand(draft, a), _operand(draft, b)]
        return draft.op(op_type, operands, _broadcast(*map(shape_of, operands)))

    return write


def _operand(draft: Draft, x: ir.Value | float) -> ir.Value:
    if isinstance(x, ir.Value):
        return x
    return draft.constant(np.asarray(x, np.float32), f"constant.{float(x):.9g}")


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


def _gelu(draft: Draft, x: ir.Value, approximate: str = "none") -> ir.Value:
    return draft.op("Gelu", [x], shape_of(x), {"approximate": approximate})


def _leaky_relu(draft: Draft, x: ir.Value, negative_slope: float = 0.01, **_: bool) -> ir.Value:
    return draft.op("LeakyRelu", [x], shape_of(x), {"alpha": negative_slope})


def _silu(draft: Draft, x: ir.Value, **_: bool) -> ir.Value:
    return draft.op("Mul", [x, draft.op("Sigmoid", [x], shape_of(x))], shape_of(x))


def _square(draft: Draft, x: ir.Value) -> ir.Value:
    return draft.op("Mul", [x, x], shape_of(x))


def _clamp(draft: Draft, x: ir.Value, min: float, max: float) -> ir.Value:
    bounds = [_operand(draft, min), _operand(draft, max)]
    return draft.op("Clip", [x, *bounds], shape_of(x))


def _relu6(draft: Draft, x: ir.Value, **_: bool) -> ir.Value:
    return _clamp(draft, x, 0, 6)


def _softmax(draft: Draft, x: ir.Value, dim: int, dtype: torch.dtype | None = None) -> ir.Value:
    x = x if dtype is None else _to(draft, x, dtype)
    return draft.op("Softmax", [x], shape_of(x), {"axis": dim})


def _attention(draft: Draft, q: ir.Value, k: ir.Value, v: ir.Value) -> ir.Value:
    return draft.op("Attention", [q, k, v], (*shape_of(q)[:-1], shape_of(v)[-1]))


def _matmul(draft: Draft, a: ir.Value, b: ir.Value) -> ir.Value:
    left, right = shape_of(a), shape_of(b)
    shape = (*_broadcast(left[:-2], right[:-2]), left[-2], right[-1])
    return draft.op("MatMul", [a, b], shape)


def _mean(draft: Draft, x: ir.Value, dim: int) -> ir.Value:
    shape = list(shape_of(x))
    del shape[dim]
    axes = draft.constant(np.array([dim]), f"index.{dim}")
    return draft.op("ReduceMean", [x, axes], tuple(shape), {"keepdims": 0})


def _normalize(
    draft: Draft, x: ir.Value, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **_: None
) -> ir.Value:
    """``x / max(norm, eps)``; by the mean of squares, whose sum may pass fp16's largest number."""
    shape = shape_of(x)
    if p != 2.0 or dim % len(shape) != len(shape) - 1:
        raise ValueError(f"norm {p} along axis {dim} instead of 2 along the last")
    axes = draft.constant(np.array([-1]), "index.-1")
    squares = _square(draft, x)
    mean = draft.op("ReduceMean", [squares, axes], (*shape[:-1], 1), {"keepdims": 1})
    root = draft.op("Sqrt", [mean], shape_of(mean))
    norm = _binary("Mul")(draft, root, require_size(shape[-1]) ** 0.5)
    bounded = draft.op("Max", [norm, _operand(draft, eps)], shape_of(norm))
    return _binary("Div")(draft, x, bounded)


def _to(draft: Draft, x: ir.Value, dtype: torch.dtype | ir.DataType) -> ir.Value:
    wanted = _DTYPES[dtype] if isinstance(dtype, torch.dtype) else dtype
    return x if wanted == x.dtype else draft.op("Cast", [x], shape_of(x), {"to": wanted}, wanted)


def _getattr(_draft: Draft, x: ir.Value, name: str) -> Shape | ir.DataType | None:
    return {"shape": shape_of(x), "dtype": x.dtype}[name]


MODULES: Mapping[type[nn.Module], Callable[..., ir.Value]] = {
    nn.Conv2d: conv2d,
    nn.Linear: linear,
    nn.LayerNorm: layer_norm,
}

# By the name of the function or method: Tensor.sqrt and torch.sqrt are one thing.
CALLS: Mapping[str, Callable[..., Any]] = {
    "add": _binary("Add"),
    "cat": move.cat,
    "chunk": move.chunk,
    "clamp": _clamp,
    "erf": _unary("Erf"),
    "flatten": move.flatten,
    "gelu": _gelu,
    "getattr": _getattr,
    "getitem": move.getitem,
    "hardswish": _unary("HardSwish"),
    "leaky_relu": _leaky_relu,
    "matmul": _matmul,
    "mean": _mean,
    "mish": _unary("Mish"),
    "mul": _binary("Mul"),
    "normalize": _normalize,
    "pad": move.pad,
    "permute": move.permute,
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
    "transpose": move.transpose,
    "truediv": _binary("Div"),
    "unflatten": move.unflatten,
}
