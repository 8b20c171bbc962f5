"""Read what onnxruntime's optimiser fused: its operators, written as those of ONNX.

Their sources say what each computes: onnxruntime/core/graph/contrib_ops/bert_defs.cc and
contrib_defs.cc; docs/ContribOperators.md lists them. One that holds more than is written here, such
as a mask or a cache, stays as it is.

Shapes: ``b`` batch, ``n`` tokens, ``dim`` hidden size, ``h`` heads, ``d`` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.graph.builder import GraphBuilder, constant_of, operand, replace, sizes_of

DOMAIN = "com.microsoft"
QUICK = 1.702  # attribute alpha of QuickGelu; hendrycks/GELUs, "x * sigmoid(1.702 x)"
_SKIP_EPS = {"SkipLayerNormalization": 1e-12, "SkipSimplifiedLayerNormalization": 1e-6}
_SUM = 3  # of the outputs of SkipLayerNormalization: what it normalises
SHAPED_OUTPUTS = (0, _SUM)  # the results that have the shape of the first
# operators whose results have the type and the shape of the first input
_LIKE_INPUT = frozenset(("BiasAdd", "BiasGelu", "FastGelu", "Gelu", "QuickGelu", *_SKIP_EPS))

Sizes = Sequence[int | None]


def is_plain(node: ir.Node) -> bool:
    """Check whether an operator is ONNX's own."""
    return node.domain in {"", "ai.onnx"}


def shape_of_fused(node: ir.Node, inputs: Sequence[Sizes | None]) -> Sizes | None:
    """Give the shape of a fused operator's first result; None where it is not known.

    Args:
        node: of another domain; its result has the type of its first input.
        inputs: the shapes of what it reads; None where one is open.
    """
    x = inputs[0] if inputs else None
    if node.domain != DOMAIN or x is None:
        return None
    if node.op_type in _LIKE_INPUT:
        return x
    other = inputs[1] if len(inputs) > 1 else None
    if node.op_type == "FusedMatMul" and other is not None and _is_product(node):
        left, right = _turned(node, "transA", x), _turned(node, "transB", other)
        alike = len(left) == len(right) > 1 and left[:-2] == right[:-2]
        return (*left[:-1], right[-1]) if alike else None
    if node.op_type == "Attention" and other is not None and len(x) == 3:
        sizes = node.attributes.get_ints("qkv_hidden_sizes", ())
        width = other[-1]
        third = None if width is None else width // 3
        return (*x[:2], sizes[2] if len(sizes) == 3 else third)
    values = inputs[2] if len(inputs) > 2 else None
    if node.op_type == "MultiHeadAttention" and values is not None and len(values) == len(x) == 3:
        return (*x[:2], values[-1])
    return None


def write_fused(model: ir.Model) -> bool:
    """Write onnxruntime's fused operators as those of opset 23, in place; say whether any was.

    The shapes that were known stay; what is new has none.
    """
    changed = False
    for node in list(model.graph):
        write = _WRITERS.get(node.op_type) if node.domain == DOMAIN else None
        changed |= write is not None and write(GraphBuilder(model.graph, node), node)
    if changed:
        RemoveUnusedNodesPass()(model)
    return changed


def _skip_norm(builder: GraphBuilder, node: ir.Node) -> bool:
    """Write x + skip + bias and its norm; the sum may be a result, too."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:_SUM]):
        return False  # mean and deviation, which only training reads
    x, skip, gain = (operand(node, index) for index in range(3))
    centred = node.op_type == "SkipLayerNormalization"
    shift, bias = (
        (_optional(node, 3), _optional(node, 4)) if centred else (None, _optional(node, 3))
    )
    if bias is not None:  # of the product: the other operand is the stream as it is
        if _is_weighted(skip) and not _is_weighted(x):
            skip = builder.op("Add", [skip, bias])
        else:
            x = builder.op("Add", [x, bias])
    total = builder.op("Add", [x, skip])
    epsilon = node.attributes.get_float("epsilon", _SKIP_EPS[node.op_type])
    attributes = {"axis": -1, "epsilon": epsilon}
    norm = "LayerNormalization" if centred else "RMSNormalization"
    read = [total, gain] if shift is None else [total, gain, shift]
    normed = builder.op(norm, read, attributes)
    if len(node.outputs) > _SUM:
        replace(node.outputs[_SUM], total)
    replace(node.outputs[0], normed)
    return True


def _is_weighted(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type in {"Gemm", "MatMul"}


def _bias_add(builder: GraphBuilder, node: ir.Node) -> bool:
    """Write x + bias + skip."""
    biased = builder.op("Add", [operand(node, 0), operand(node, 1)])
    replace(node.outputs[0], builder.op("Add", [biased, operand(node, 2)]))
    return True


def _gelu(builder: GraphBuilder, node: ir.Node) -> bool:
    x, bias = operand(node, 0), _optional(node, 1)
    if bias is not None:
        x = builder.op("Add", [x, bias])
    form = "tanh" if node.op_type == "FastGelu" else "none"
    replace(node.outputs[0], builder.op("Gelu", [x], {"approximate": form}))
    return True


def _quick_gelu(builder: GraphBuilder, node: ir.Node) -> bool:
    """Write x * sigmoid(alpha * x)."""
    x = operand(node, 0)
    if x.dtype is None:
        return False
    scaled = _times(builder, x, node.attributes.get_float("alpha", QUICK), x.dtype)
    replace(node.outputs[0], builder.op("Mul", [x, builder.op("Sigmoid", [scaled])]))
    return True


def _product(builder: GraphBuilder, node: ir.Node) -> bool:
    """Write alpha * (A @ B), either of them transposed."""
    operands = [operand(node, 0), operand(node, 1)]
    alpha = node.attributes.get_float("alpha", 1.0)
    dtype = operands[0].dtype
    if not _is_product(node):
        return False
    for index, side in enumerate(("transA", "transB")):
        if node.attributes.get_int(side, 0):
            rank = len(sizes_of(operands[index]))
            if rank < 2:
                return False
            turned = {"perm": (*range(rank - 2), rank - 1, rank - 2)}
            operands[index] = builder.op("Transpose", [operands[index]], turned)
    result = builder.op("MatMul", operands)
    if alpha != 1:
        result = _times(builder, result, alpha, dtype)
    replace(node.outputs[0], result)
    return True


def _is_product(node: ir.Node) -> bool:
    """Check that a FusedMatMul turns no batch axis."""
    return not any(node.attributes.get_int(f"transBatch{side}", 0) for side in "AB")


def _turned(node: ir.Node, side: str, sizes: Sizes) -> Sizes:
    if not node.attributes.get_int(side, 0) or len(sizes) < 2:
        return sizes
    return (*sizes[:-2], sizes[-1], sizes[-2])


def _times(
    builder: GraphBuilder, x: ir.Value, factor: float, dtype: ir.DataType | None
) -> ir.Value:
    held = np.asarray(factor, np.float32 if dtype is None else dtype.numpy())
    constant = builder.constant(held, f"{builder.scope}.factor")
    if dtype is None:
        constant = builder.op("CastLike", [constant, x])
    return builder.op("Mul", [x, constant])


def _packed_attention(builder: GraphBuilder, node: ir.Node) -> bool:
    """Write the projection to query, key and value and the attention of them."""
    others = [_optional(node, index) for index in (3, 4, 6)]  # mask, cache, length of the cache
    flags = [node.attributes.get_int(name, 0) for name in ("unidirectional", "do_rotary")]
    if any(other is not None for other in others) or any(flags) or _is_read(node.outputs[1:]):
        return False
    packed = builder.op("MatMul", [operand(node, 0), operand(node, 1)])
    bias = _optional(node, 2)
    if bias is not None:
        packed = builder.op("Add", [packed, bias])
    sizes = node.attributes.get_ints("qkv_hidden_sizes", ())
    if sizes:
        parts = builder.constant(np.array(sizes, np.int64), f"{builder.scope}.sizes")
        q, k, v = builder.ops("Split", [packed, parts], {"axis": -1}, outputs=3)
    else:
        q, k, v = builder.ops("Split", [packed], {"axis": -1, "num_outputs": 3}, outputs=3)
    return _attention(builder, node, [q, k, v], _optional(node, 5))


def _heads_attention(builder: GraphBuilder, node: ir.Node) -> bool:
    """Write attention of query, key and value that are [b, n, h * d] each."""
    operands = [_optional(node, index) for index in range(3)]
    mask, kept = _optional(node, 4), node.inputs[6:]
    if mask is not None or any(value is not None for value in kept) or _is_read(node.outputs[1:]):
        return False
    if node.attributes.get_int("unidirectional", 0):
        return False
    widths = [sizes_of(value)[2:] for value in operands]
    if any(len(width) != 1 or width[0] is None for width in widths):
        return False  # packed, or heads apart
    bias, start = _optional(node, 3), 0
    held = constant_of(bias)
    if bias is not None and held is None:
        return False
    read = [value for value in operands if value is not None]
    if held is not None:
        for index, width in enumerate(widths):
            end = start + (width[0] or 0)
            part = builder.constant(held[start:end], f"{builder.scope}.bias.{index}")
            read[index], start = builder.op("Add", [read[index], part]), end
    return _attention(builder, node, read, _optional(node, 5))


def _attention(
    builder: GraphBuilder, node: ir.Node, operands: list[ir.Value], added: ir.Value | None
) -> bool:
    """Write attention of [b, n, h * d]; ``added`` is what is added to the scores."""
    heads, scale = (
        node.attributes.get_int("num_heads", 0),
        node.attributes.get_float("scale", 0.0),  # 0: 1 / sqrt(d), as in ONNX
    )
    attributes: dict[str, int | float] = {"q_num_heads": heads, "kv_num_heads": heads}
    if scale:
        attributes["scale"] = scale
    read = operands if added is None else [*operands, added]
    replace(node.outputs[0], builder.op("Attention", read, attributes))
    return True


def _optional(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_read(values: Sequence[ir.Value]) -> bool:
    return any(value.uses() or value.is_graph_output() for value in values)


_WRITERS: dict[str, Callable[[GraphBuilder, ir.Node], bool]] = {
    "Attention": _packed_attention,
    "BiasAdd": _bias_add,
    "BiasGelu": _gelu,
    "FastGelu": _gelu,
    "FusedMatMul": _product,
    "Gelu": _gelu,
    "MultiHeadAttention": _heads_attention,
    "QuickGelu": _quick_gelu,
    **dict.fromkeys(_SKIP_EPS, _skip_norm),
}
