"""Recognise an attention core in whatever form an exporter wrote it.

A core is ``softmax(q @ k.T * scale) @ v`` with q, k, v of shape [b, h, n, d] (b batch, h heads,
n tokens, d head size). Three forms occur: the Attention operator of opset 23; MatMul, Softmax,
MatMul with the scale applied to the scores or to q and k; and either with a mask that lets
everything through. In a half precision graph of another tool, softmax may compute in fp32 between
two Casts. Other forms of softmax and keys are rewritten before (msn_export.graph.opset).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from msn_export.graph.builder import constant_of, operand, permuted, producer, producer_of

HEADS_FIRST = (0, 2, 1, 3)  # [b, n, h, d] -> [b, h, n, d]
KEYS_TRANSPOSED = (0, 1, 3, 2)  # [b, h, n, d] -> [b, h, d, n]
KEYS_FROM_TOKENS = (0, 2, 3, 1)  # [b, n, h, d] -> [b, h, d, n]


@dataclass(frozen=True, slots=True)
class AttentionCore:
    """One matched core: its operands, scale, result, and the node that computes the result.

    ``tokens_first`` says that ``k`` is [b, n, h, d] and still has to be transposed, ``transposed``
    that it is [b, h, d, n] (its transposition lies before Q/DQ), and ``widened`` that softmax was
    written in fp32 between half precision products.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    scale: float
    output: ir.Value
    tokens_first: bool = False
    transposed: bool = False
    widened: bool = False

    @property
    def node(self) -> ir.Node:
        return producer(self.output)


def match(node: ir.Node) -> AttentionCore | str:
    """Match the core around a Softmax or Attention node; text says why it is none."""
    return _of_operator(node) if node.op_type == "Attention" else _of_softmax(node)


def _of_operator(node: ir.Node) -> AttentionCore | str:
    for name in ("is_causal", "softcap"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value:
            return f"its {name} is {attribute.value}, a ViT has none"
    inputs = list(node.inputs)
    q, k, v = inputs[:3]
    if q is None or k is None or v is None:
        return "it lacks an operand"
    if any(value is not None for value in inputs[4:]) or len(node.outputs) > 1:
        return "it caches keys and values, a ViT does not"
    if len(inputs) > 3 and inputs[3] is not None and not _lets_all_through(inputs[3]):
        return f"its mask {inputs[3].name!r} is not known to let every token through"
    if q.shape is None or len(q.shape) != 4:
        rank = None if q.shape is None else len(q.shape)
        return f"its query has rank {rank}; expected 4, [b, h, n, d]"
    if _is_learned(q):
        return _POOLING.format(q=q.name)
    size = q.shape[-1]
    # onnx.ai operators, Attention, attribute scale
    default = float(size) ** -0.5 if isinstance(size, int) else None
    factor = node.attributes.get_float("scale", default)
    if factor is None:
        return f"the head size of {q.name!r} is unknown"
    return AttentionCore(q, k, v, factor, node.outputs[0])


def _of_softmax(softmax: ir.Node) -> AttentionCore | str:
    axis = softmax.attributes.get_int("axis", -1)
    if axis not in {-1, 3}:
        return f"softmax runs over axis {axis}; expected the last"
    scores, scale = _unscaled(_without_mask(_uncast(operand(softmax, 0))))
    scores, outer = _unscaled(_uncast(scores))  # the scale before the Cast, where there is one
    product = scores.producer()
    if product is not None and product.op_type == "DequantizeLinear":
        return f"its scores {scores.name!r} are quantised, which no fused kernel takes"
    if product is None or product.op_type != "MatMul":
        return f"scores {scores.name!r} are not a MatMul's, scaled or masked by constants"
    q, q_scale = _unscaled(operand(product, 0))
    if _is_learned(q):
        return _POOLING.format(q=q.name)
    keys, k_scale = _unscaled(operand(product, 1))
    found = _untransposed(keys)
    transposed = found is None and producer_of(keys, "DequantizeLinear") is not None
    if found is None and not transposed:
        return f"keys {keys.name!r} are not a transposed tensor"
    k, tokens_first = found or (keys, False)
    result = _weighted_sum(softmax.outputs[0])
    if result is None:
        return f"probabilities {softmax.outputs[0].name!r} are not multiplied with values once"
    v = operand(result, 1)
    if len({value.dtype for value in (q, k, v)}) != 1:
        return f"its operands are {q.dtype}, {k.dtype} and {v.dtype}; expected one type"
    return AttentionCore(
        q, k, v, scale * outer * q_scale * k_scale, result.outputs[0], tokens_first=tokens_first,
        transposed=transposed, widened=softmax.outputs[0].dtype != q.dtype,
    )  # fmt: skip


_POOLING = (
    "its query {q!r} is learned, not computed from the image (an attention-pooling head), and no "
    "fused kernel is known for it; export the model without that head"
)
_HALF = frozenset((ir.DataType.FLOAT16, ir.DataType.BFLOAT16))


def _is_learned(query: ir.Value) -> bool:
    """Check whether a query is computed from weights, and the batch size at most."""
    pending, seen = [query], set()
    while pending:
        value = pending.pop()
        node = value.producer()
        if node is None:
            if not value.is_initializer() and value.const_value is None:
                return False  # an input
            continue
        if node in seen or node.op_type in {"Shape", "Size"}:
            continue
        seen.add(node)
        pending += [operand for operand in node.inputs if operand is not None]
    return True


def _uncast(value: ir.Value) -> ir.Value:
    """Step over Casts between fp32 and half precision."""
    while (node := value.producer()) is not None and _is_cast(node):
        value = operand(node, 0)
    return value


def _is_cast(node: ir.Node) -> bool:
    """Check whether a node is a Cast between two floating point types."""
    values = (*node.inputs, *node.outputs)
    return node.op_type == "Cast" and all(
        value is not None and value.dtype in {*_HALF, ir.DataType.FLOAT} for value in values
    )


def _without_mask(value: ir.Value) -> ir.Value:
    """Step over the addition of a mask that lets every token through."""
    node = producer_of(value, "Add")
    if node is not None:
        left, right = operand(node, 0), operand(node, 1)
        if _lets_all_through(right):
            return left
        if _lets_all_through(left):
            return right
    return value


def _lets_all_through(mask: ir.Value) -> bool:
    """Check whether a mask is constant and true (boolean) or zero (added) everywhere."""
    values = constant_of(mask)
    if values is not None:
        return bool(values.all() if values.dtype == np.bool_ else not values.any())
    node = mask.producer()
    if node is None:
        return False
    if node.op_type in {"Expand", "Reshape", "Unsqueeze", "Cast"} and node.inputs[0] is not None:
        return _lets_all_through(node.inputs[0])
    if node.op_type == "Where":  # the condition, and what is taken where it holds
        return all(value is not None and _lets_all_through(value) for value in node.inputs[:2])
    return False


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """Step over multiplications and divisions by a constant, and collect their factor."""
    factor = 1.0
    while (node := value.producer()) is not None and node.op_type in {"Mul", "Div"}:
        left, right = operand(node, 0), operand(node, 1)
        if (constant := _scalar(right)) is not None:
            value, factor = left, factor * (constant if node.op_type == "Mul" else 1 / constant)
        elif node.op_type == "Mul" and (constant := _scalar(left)) is not None:
            value, factor = right, factor * constant
        else:
            break
    return value, factor


def _scalar(value: ir.Value) -> float | None:
    constant = constant_of(value)
    if constant is None or constant.size != 1:
        return None
    number = float(constant.reshape(()))
    return number if np.isfinite(number) and number != 0 else None


def _untransposed(keys: ir.Value) -> tuple[ir.Value, bool] | None:
    """Find k behind k.T; True if it is still [b, n, h, d]."""
    for axes, tokens_first in ((KEYS_TRANSPOSED, False), (KEYS_FROM_TOKENS, True)):
        k = permuted(keys, axes)
        if k is not None:
            return k, tokens_first
    return None


def _weighted_sum(probabilities: ir.Value) -> ir.Node | None:
    """Find the MatMul with v, past the guard torch writes for rows that are masked whole."""
    while True:
        users = [use.node for use in probabilities.uses()]
        guards = [node for node in users if node.op_type == "Where"]
        if guards and all(node.op_type in {"Where", "IsNaN"} for node in users):
            probabilities = guards[0].outputs[0]
        elif len(users) == 1 and _is_cast(users[0]):
            probabilities = users[0].outputs[0]
        else:
            break
    if len(users) != 1 or users[0].op_type != "MatMul" or users[0].inputs[0] is not probabilities:
        return None
    return users[0]
