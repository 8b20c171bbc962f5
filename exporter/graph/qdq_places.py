"""Places of a graph's Q/DQ pairs beside those in front of products: behind them, or elsewhere."""

from collections.abc import Set

import numpy as np
import onnx_ir as ir

from msn_export.errors import GraphError
from msn_export.graph.builder import GraphBuilder, constant_of, operand, producer_of, replace


def output_scale(product: ir.Node, *, biased: bool) -> float | None:
    """Give the scale of the pair behind a product, ``biased`` or before its bias; None if none."""
    rounded = _rounded(product, biased=biased)
    pairs = _readers(rounded.outputs[0]) if rounded is not None else []
    scales = [constant_of(operand(pair, 1)) for pair in pairs if pair.op_type == "DequantizeLinear"]
    if not pairs:
        return None
    if len(scales) < len(pairs) or any(scale is None or scale.size != 1 for scale in scales):
        raise GraphError(f"the result of {product.name!r} is not quantised with one constant scale")
    return float(np.max([scale for scale in scales if scale is not None]))


def result_of(product: ir.Node, *, biased: bool) -> ir.Value:
    """Give the result of a product, ``biased`` or before its bias: a Gemm is taken apart for it."""
    value = product.outputs[0]
    if _holds_bias(product) is biased:
        return value
    if biased:
        added = _addition(value)
        if added is None:
            raise GraphError(f"no bias is added behind {product.name!r}")
        return added.outputs[0]
    graph = product.graph
    plain = {"alpha", "beta"}.isdisjoint(product.attributes)
    if product.op_type != "Gemm" or not plain or not isinstance(graph, ir.Graph):
        raise GraphError(f"the bias of {product.name!r} cannot be taken out of it")
    bias = operand(product, 2)
    product.resize_inputs(2)
    builder = GraphBuilder(graph).after(product)
    added_bias = builder.op("Add", [value, bias], name=f"{product.name}.bias")
    replace(value, added_bias)
    added_bias.producer().replace_input_with(0, value)  # type: ignore[union-attr]
    return value


def require_matched(model: ir.Model, products: Set[ir.Node]) -> None:
    """Require that each pair stands in front of one of ``products``, or behind it."""
    behind = {_rounded(node, biased=biased) for node in products for biased in (False, True)}
    for node in model.graph:
        if node.op_type != "DequantizeLinear":
            continue
        rounded = producer_of(node.inputs[0], "QuantizeLinear")
        held = operand(node, 0).is_initializer()
        result = node.outputs[0]
        matched = not result.is_graph_output() and products >= set(_readers(result))
        matched |= rounded is not None and rounded in behind
        if not matched or (rounded is None and not held):
            source = rounded if rounded is not None else node
            raise GraphError(
                f"the candidate also quantises {operand(source, 0).name!r}, where the reference "
                "cannot be quantised alike"
            )


def _holds_bias(product: ir.Node) -> bool:
    return len(product.inputs) > 2 and product.inputs[2] is not None


def _rounded(product: ir.Node, *, biased: bool) -> ir.Node | None:
    """Find the QuantizeLinear that alone reads a product's result, ``biased`` or before that."""
    value = product.outputs[0]
    if _holds_bias(product) is not biased:
        added = _addition(value) if biased else None
        if added is None:
            return None
        value = added.outputs[0]
    readers = _readers(value)
    alone = len(readers) == 1 and readers[0].op_type == "QuantizeLinear"
    return readers[0] if alone and not value.is_graph_output() else None


def _addition(value: ir.Value) -> ir.Node | None:
    """Find the Add of a constant vector that alone reads a value, or reads the pair behind it."""
    readers = _readers(value)
    while len(readers) == 1 and readers[0].op_type in {"QuantizeLinear", "DequantizeLinear"}:
        readers = _readers(readers[0].outputs[0])
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    constants = [constant_of(each) for each in readers[0].inputs]
    return readers[0] if any(held is not None and held.ndim == 1 for held in constants) else None


def _readers(value: ir.Value) -> list[ir.Node]:
    """List the nodes that read the numbers of a value: Shape reads none."""
    return list(dict.fromkeys(use.node for use in value.uses() if use.node.op_type != "Shape"))
