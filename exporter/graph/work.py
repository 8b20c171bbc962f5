"""Count a graph's multiply-adds for one image, from its shapes."""

import math

import onnx_ir as ir

from msn_export.graph.attention import AttentionCore, match

# A product of [m, k] and [k, n] is m * n * k multiply-adds. Element-wise operators, LayerNorm and
# softmax are left out, as the field does (a ViT-B/16 at 224 is 17.5 billion).


def multiply_adds(model: ir.Model) -> int:
    """Sum convolutions, matrix products and attention; a dynamic batch counts as one image."""
    return sum(_of_node(node) for node in model.graph)


def _of_node(node: ir.Node) -> int:
    if node.op_type == "Conv":
        weight = _sizes(node.inputs[1])
        return math.prod(_sizes(node.outputs[0])) * math.prod(weight[1:])
    if node.op_type in {"MatMul", "Gemm"}:
        left = _sizes(node.inputs[0])
        transposed = node.attributes.get("transA")
        depth = left[0 if transposed is not None and transposed.as_int() else -1]
        return math.prod(_sizes(node.outputs[0])) * depth
    if node.op_type == "Attention":
        return _of_attention(node)
    return 0


def _of_attention(node: ir.Node) -> int:
    """Two products: scores [b, h, m, n] over d, and the result [b, h, m, d] over n."""
    core = match(node)
    if isinstance(core, AttentionCore):
        batch, heads, queries, size = _sizes(core.q)
        keys = _sizes(core.k)[1 if core.tokens_first else 3 if core.transposed else 2]
        return 2 * batch * heads * queries * keys * size
    q, k = _sizes(node.inputs[0]), _sizes(node.inputs[1])
    return 2 * q[0] * q[1] * k[1] * q[2] if len(q) == 3 else 0


def _sizes(value: ir.Value | None) -> list[int]:
    if value is None or value.shape is None:
        return [0]
    return [size if isinstance(size, int) else 1 for size in value.shape]
