"""Read a quantised graph: what is quantised to what, and which nodes compute in 8 bits."""

import onnx_ir as ir

from msn_export.errors import GraphError
from msn_export.spec import Dtype

_QUANTISED = {ir.DataType.INT8: Dtype.INT8, ir.DataType.FLOAT8E4M3FN: Dtype.FP8}
_FLOATS = {
    ir.DataType.FLOAT: Dtype.FP32,
    ir.DataType.FLOAT16: Dtype.FP16,
    ir.DataType.BFLOAT16: Dtype.BF16,
}
_DEFAULT = ir.DataType.UINT8  # what QuantizeLinear gives where nothing is said
# Operators that compute on integers themselves: no TensorRT parser reads them.
_INTEGER = frozenset(
    {"QLinearMatMul", "QLinearConv", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear"}
)
PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})


def quantised_dtype(model: ir.Model) -> Dtype | None:
    """Say what a graph's Q/DQ pairs quantise to; None if it has none.

    Raises:
        GraphError: it is quantised in a way that TensorRT does not compile; the node is named.
    """
    found: dict[Dtype, str] = {}
    for node in model.graph:
        name = node.name or node.outputs[0].name
        if node.op_type in _INTEGER:
            raise GraphError(
                f"node {name!r} is {node.op_type}: int8 without QuantizeLinear and "
                "DequantizeLinear, which no TensorRT parser reads; quantise the fp32 graph with "
                "msn-export calibrate (or onnxruntime's QuantFormat.QDQ, symmetric int8)"
            )
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            continue
        held = _stored_type(node)
        if held is None or held is ir.DataType.INT32:  # a bias, dequantised from sums
            continue
        if held not in _QUANTISED:
            raise GraphError(
                f"node {name!r} quantises to {held.name.lower()}, which TensorRT does not take for "
                "a ViT; quantise symmetrically to int8 or to fp8 E4M3, as msn-export calibrate does"
            )
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is not None and zero.const_value is not None and zero.const_value.numpy().any():
            raise GraphError(
                f"node {name!r} has a zero point other than 0, which TensorRT does not take; "
                "quantise symmetrically, as msn-export calibrate does"
            )
        found[_QUANTISED[held]] = name or ""
    if len(found) > 1:
        raise GraphError(f"the graph mixes int8 and fp8 ({found}); quantise it to one of them")
    return next(iter(found), None)


def _stored_type(node: ir.Node) -> ir.DataType | None:
    """Give the 8-bit type: that of the zero point, else onnx.ai operators, QuantizeLinear."""
    if node.op_type == "DequantizeLinear":
        return node.inputs[0].dtype if node.inputs[0] is not None else None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return node.inputs[2].dtype
    named = node.attributes.get("output_dtype")
    return ir.DataType(named.as_int()) if named is not None and named.as_int() else _DEFAULT


def type_beside(model: ir.Model) -> Dtype:
    """Say which float type the most of a quantised graph's values are dequantised to."""
    counts: dict[Dtype, int] = {Dtype.FP32: 0}
    for node in model.graph:
        scale = node.inputs[1] if node.op_type == "DequantizeLinear" else None
        dtype = None if scale is None or scale.dtype is None else _FLOATS.get(scale.dtype)
        if dtype is not None:
            counts[dtype] = counts.get(dtype, 0) + 1
    return max(counts, key=lambda dtype: counts[dtype])


def quantised_products(model: ir.Model) -> tuple[str, ...]:
    """Name the matrix products and convolutions with a dequantised weight."""
    return tuple(
        node.name or ""
        for node in model.graph
        if node.op_type in PRODUCTS
        and _is_dequantised(node.inputs[0])
        and _is_dequantised(node.inputs[1])
        and _holds_weight(node.inputs[1])
    )


def is_quantised_core(softmax: ir.Node) -> bool:
    """Whether a Softmax is an attention core with all four operands quantised.

    ``MatMul(dq(q), dq(k)), Softmax, MatMul(dq(q(probabilities)), dq(v))``: TensorRT's pattern for a
    fused 8-bit attention kernel. With one operand left out it takes the core apart; around the
    Attention operator, Q/DQ only rounds and the kernel stays in fp16 (TensorRT-RTX 1.7, SM 8.9).
    """
    scores = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
    if softmax.op_type != "Softmax" or scores is None or scores.op_type != "MatMul":
        return False
    product = softmax
    for wanted in ("QuantizeLinear", "DequantizeLinear", "MatMul"):
        users = [use.node for use in product.outputs[0].uses()]
        if len(users) != 1 or users[0].op_type != wanted:
            return False
        product = users[0]
    return all(_is_dequantised(value) for value in (*scores.inputs, *product.inputs))


def _is_dequantised(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.op_type == "DequantizeLinear"


def _holds_weight(value: ir.Value | None) -> bool:
    node = value.producer() if value is not None else None
    return node is not None and node.inputs[0] is not None and node.inputs[0].is_initializer()
