"""What each torch call of the model is in ONNX, opset 23.

See ``msn_export.graph.torch_ops``.

A function here takes the draft and the call's own arguments, tensors being graph values. Names and
defaults are torch's, for a call may name its arguments.
"""

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# A size is a number, or the batch's name.
Dim = int | ir.SymbolicDim
Shape = tuple[Dim, ...]


def shape_of(value: ir.Value) -> Shape:
    """Give a value's shape, which is known of every value here."""
    assert value.shape is not None
    return tuple(value.shape)


class Draft:
    """Nodes and weights so far; ``scope`` is the module that what is added is named after.

    The names matter: the compiler's log repeats them, and by them a kernel is traced to its block.
    """

    def __init__(self) -> None:
        self.scope = ""
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._seen: Counter[str] = Counter()

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shape: Shape,
        attributes: Mapping[str, Any] | None = None,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """Add a node of one output, of its first input's type unless ``dtype`` is another."""
        return self.ops(op_type, inputs, [shape], attributes, dtype)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        shapes: Sequence[Shape],
        attributes: Mapping[str, Any] | None = None,
        dtype: ir.DataType | None = None,
    ) -> Sequence[ir.Value]:
        """Add a node with an output of each shape."""
        node = ir.node(op_type, inputs, attributes, num_outputs=len(shapes))
        stem = f"{self.scope}.{op_type}" if self.scope else op_type
        self._seen[stem] += 1
        node.name = stem if self._seen[stem] == 1 else f"{stem}_{self._seen[stem]}"
        kind = dtype or inputs[0].dtype
        assert kind is not None  # every value here has its type
        for index, (value, shape) in enumerate(zip(node.outputs, shapes, strict=True)):
            value.name = node.name if len(shapes) == 1 else f"{node.name}.{index}"
            value.shape, value.type = ir.Shape(shape), ir.TensorType(kind)
        self.nodes.append(node)
        return node.outputs

    def constant(self, array: NDArray[Any], name: str) -> ir.Value:
        """Add a small constant; ``name`` says what it holds, so one name is one constant."""
        if name not in self.initializers:
            self._hold(ir.tensor(array), name)
        return self.initializers[name]

    def weight(self, name: str, tensor: Tensor) -> ir.Value:
        """Add a parameter; it shares the model's memory."""
        if name not in self.initializers:
            self._hold(ir.tensor(tensor.detach().numpy()), name)
        return self.initializers[name]

    def transposed(self, name: str, tensor: Tensor) -> ir.Value:
        """Add a matrix [out, in] as [in, out]; transposed anew when read, so that no copy stays."""
        if name not in self.initializers:
            rows, columns = tensor.shape
            make = partial(_transposed, tensor.detach())
            dtype = ir.tensor(tensor.detach().numpy()).dtype
            self._hold(ir.LazyTensor(make, dtype, ir.Shape((columns, rows))), name)
        return self.initializers[name]

    def _hold(self, tensor: ir.TensorProtocol, name: str) -> None:
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
        self.initializers[name] = ir.Value(name=name, type=kind, shape=shape, const_value=tensor)

    def reshape(self, x: ir.Value, shape: Shape) -> ir.Value:
        """Add a Reshape that keeps the batch."""
        sizes = [-1, *(require_size(dim) for dim in shape[1:])]
        name = "x".join(str(size) for size in sizes[1:])
        target = self.constant(np.array(sizes), f"shape.bx{name}")
        return self.op("Reshape", [x, target], shape)


def require_size(dim: Dim) -> int:
    """Require a size that is known.

    Raises:
        ValueError: it is the batch, which no operator may be told.
    """
    if not isinstance(dim, int):
        raise ValueError(f"the batch {dim} would become a constant")  # noqa: TRY004
    return dim


def _transposed(matrix: Tensor) -> ir.TensorProtocol:
    return ir.tensor(matrix.t().contiguous().numpy())


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
    "cat": cat,
    "chunk": chunk,
    "clamp": _clamp,
    "erf": _unary("Erf"),
    "flatten": flatten,
    "gelu": _gelu,
    "getattr": _getattr,
    "getitem": getitem,
    "hardswish": _unary("HardSwish"),
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
