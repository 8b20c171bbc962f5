"""Read a quantised graph: what is quantised to what, and which nodes compute in 8 bits.

TensorRT builds strongly typed networks: the precision of an engine is the precision written in
its graph, and onnxruntime runs that very graph.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.errors import GraphError
from msn_export.graph.builder import (
    GraphBuilder,
    array_of,
    constant_of,
    only_reader,
    operand,
    producer,
    producer_of,
)
from msn_export.graph.io import infer_shapes
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
WEIGHTED_PRODUCTS = frozenset({"MatMul", "Gemm", "Conv"})


def quantised_dtype(model: ir.Model) -> Dtype | None:
    """Read what a graph's Q/DQ pairs quantise to; None if it has none."""
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
        zero = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        if zero is not None and zero.any():
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
    return ir.DataType(node.attributes.get_int("output_dtype", 0) or _DEFAULT)


def type_beside(model: ir.Model) -> Dtype:
    """Find the float type that most of a quantised graph's values are dequantised to."""
    counts: dict[Dtype, int] = {Dtype.FP32: 0}
    for node in model.graph:
        scale = node.inputs[1] if node.op_type == "DequantizeLinear" else None
        dtype = None if scale is None or scale.dtype is None else _FLOATS.get(scale.dtype)
        if dtype is not None:
            counts[dtype] = counts.get(dtype, 0) + 1
    return max(counts, key=lambda dtype: counts[dtype])


def quantised_products(model: ir.Model) -> tuple[str, ...]:
    """Name the matrix products and convolutions that compute in 8 bits: input and weight are."""
    return tuple(
        node.name or ""
        for node in model.graph
        if _has_quantised_weight(node) and _is_dequantised(node.inputs[0])
    )


def products_of_quantised_weights(model: ir.Model) -> tuple[str, ...]:
    """Name the products with a dequantised weight, those of a float input too."""
    return tuple(node.name or "" for node in model.graph if _has_quantised_weight(node))


def _has_quantised_weight(node: ir.Node) -> bool:
    weight = (
        producer_of(node.inputs[1], "DequantizeLinear")
        if node.op_type in WEIGHTED_PRODUCTS
        else None
    )
    return weight is not None and weight.inputs[0] is not None and weight.inputs[0].is_initializer()


def has_quantised_activations(model: ir.Model) -> bool:
    """Check whether anything is quantised while the graph runs, and not weights alone."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph)


def is_quantised_core(softmax: ir.Node) -> bool:
    """Check whether a Softmax is an attention core with all four operands quantised.

    ``MatMul(dq(q), dq(k)), Softmax, MatMul(dq(q(probabilities)), dq(v))``: TensorRT's pattern for a
    fused 8-bit attention kernel. With one operand left out it takes the core apart; around the
    Attention operator, Q/DQ only rounds and the kernel stays in fp16 (TensorRT-RTX 1.7, SM 8.9).
    """
    scores = producer_of(softmax.inputs[0], "MatMul")
    if softmax.op_type != "Softmax" or scores is None:
        return False
    product = softmax
    for wanted in ("QuantizeLinear", "DequantizeLinear", "MatMul"):
        reader = only_reader(product.outputs[0], wanted)
        if reader is None:
            return False
        product = reader
    return all(_is_dequantised(value) for value in (*scores.inputs, *product.inputs))


def _is_dequantised(value: ir.Value | None) -> bool:
    return producer_of(value, "DequantizeLinear") is not None


# Largest finite values: IEEE 754 binary16; bfloat16 shares binary32's exponent.
LARGEST = {Dtype.FP16: 65504.0, Dtype.BF16: 3.3895313892515355e38}

_ONNX = {Dtype.FP16: ir.DataType.FLOAT16, Dtype.BF16: ir.DataType.BFLOAT16}
_FLOAT = ir.DataType.FLOAT

PRODUCTS = frozenset({"MatMul", "Gemm", "Conv", "Attention"})
# Operators that move, copy or convert elements and compute nothing
MOVES = frozenset(
    {"Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice",
     "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)  # fmt: skip

# Operators with a float input or attribute that is float32 whatever the data's type
_FIXED = frozenset({"Resize", "Upsample", "NonMaxSuppression", "DynamicQuantizeLinear"})


@dataclass(frozen=True, slots=True)
class Typed:
    """Result of typing: values and weights that stay fp32, and the nodes that compute in it.

    ``weights`` are those that overflow, each with its largest absolute value.
    """

    islands: tuple[str, ...]
    weights: dict[str, float]
    fp32_nodes: tuple[str, ...]


def type_graph(model: ir.Model, dtype: Dtype, islands: Collection[str] = ()) -> Typed:
    """Type ``model`` in place; graph inputs and outputs keep their types.

    A node computes in fp32 if any value it reads or writes is an island: a value too large for
    fp16 must neither be written in it nor be read through it. Weights that overflow are islands,
    and so are the results of the products that read them: TensorRT-RTX computes
    ``Cast(half to float), MatMul(fp32 weight), Cast(half)`` in Half and stores the weight as
    infinity; where the next node reads the result in fp32 it does not.

    Args:
        model: an fp32 graph with every value typed; changed in place.
        dtype: fp16 or bf16.
        islands: names of values that stay fp32.
    """
    infer_shapes(model)
    _require_fp32(model)
    weights = overflowing_weights(model, dtype)
    wanted = set(islands) | weights.keys()
    unknown = wanted - _names(model)
    if unknown:
        raise GraphError(f"island {min(unknown)!r} is no value of this graph; measure them again")
    typing = _Typing(model, dtype, wanted | _products_of(model, weights.keys()))
    for node in list(model.graph):
        typing.type_node(node)
    typing.restore_outputs()
    RemoveUnusedNodesPass()(model)
    return Typed(tuple(sorted(wanted)), weights, tuple(typing.fp32_nodes))


def attention_in_bf16(model: ir.Model, nodes: Collection[str]) -> None:
    """Cast what the named ``Attention`` nodes read to bf16, and their results back, in place."""
    builder = GraphBuilder(model.graph)
    found = {node.name: node for node in model.graph if node.op_type == "Attention"}
    for name in nodes:
        if name not in found:
            raise GraphError(f"the graph has no Attention node {name!r}")
        node = found[name]
        builder.before(node)
        for index in range(3):
            cast = _cast(builder, operand(node, index), ir.DataType.BFLOAT16)
            node.replace_input_with(index, cast)
        result = node.outputs[0]
        back = _cast(builder.after(node), result, result.dtype or _FLOAT)
        result.replace_all_uses_with(back, replace_graph_outputs=True)
        producer(back).replace_input_with(0, result)
        result.type = ir.TensorType(ir.DataType.BFLOAT16)


def _cast(builder: GraphBuilder, value: ir.Value, target: ir.DataType) -> ir.Value:
    return builder.cast(value, target, f"{value.name}.to_{target.name.lower()}")


def overflowing_weights(model: ir.Model, dtype: Dtype) -> dict[str, float]:
    """Find the weights that ``dtype`` cannot hold, each with its largest absolute value."""
    found = {}
    for name, value in model.graph.initializers.items():
        if value.dtype == _FLOAT and value.const_value is not None and value.const_value.size:
            largest = float(np.abs(value.const_value.numpy()).max())
            if not largest <= LARGEST[dtype]:  # NaN is held by no type
                found[name] = largest
    return found


def _products_of(model: ir.Model, weights: Collection[str]) -> set[str]:
    return {
        node.outputs[0].name or ""
        for node in model.graph
        if node.op_type in PRODUCTS
        and any(value is not None and value.name in weights for value in node.inputs)
    }


def graph_dtype(model: ir.Model) -> Dtype:
    """Find the type of most weights that a graph reads; one with Q/DQ is of their type."""
    quantised = quantised_dtype(model)
    if quantised is not None:
        return quantised
    held: dict[Dtype, int] = dict.fromkeys(Dtype, 0)
    names = {_FLOAT: Dtype.FP32, **{onnx: dtype for dtype, onnx in _ONNX.items()}}
    for value in model.graph.initializers.values():
        if value.dtype in names and value.const_value is not None and value.uses():
            held[names[value.dtype]] += value.const_value.size
    return max(held, key=lambda dtype: held[dtype])


def is_typed(model: ir.Model, dtype: Dtype, islands: Collection[str]) -> bool:
    """Check whether products of a graph compute in ``dtype``, all but those of ``islands``.

    Where many values are islands, most of the weights may be fp32: ``graph_dtype`` is fp32 then.
    """
    computed = {node.outputs[0].dtype for node in model.graph if node.op_type in PRODUCTS}
    return _ONNX.get(dtype) in computed and not fp32_products(model, islands)


def fp32_nodes(model: ir.Model) -> tuple[str, ...]:
    """Name the nodes of a typed graph that compute in fp32; casts only convert."""
    return tuple(
        node.name or ""
        for node in model.graph
        if node.op_type != "Cast" and any(value.dtype == _FLOAT for value in node.outputs)
    )


def fp32_products(model: ir.Model, islands: Collection[str]) -> tuple[str, ...]:
    """Name the products of a typed graph that compute in fp32 and touch none of ``islands``."""
    found = []
    for node in model.graph:
        if node.op_type not in PRODUCTS or node.outputs[0].dtype != _FLOAT:
            continue
        touched = {value.name for value in (*node.inputs, *node.outputs) if value is not None}
        if not touched & set(islands):
            found.append(node.name or node.outputs[0].name or "")
    return tuple(found)


def _require_fp32(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type in _FIXED:
            raise GraphError(f"node {node.name!r} ({node.op_type}) cannot be retyped")
        for value in node.outputs:
            if value.dtype in _ONNX.values():
                raise GraphError(f"{value.name!r} is {value.dtype} already; give the fp32 graph")
            if value.dtype is None and value.uses():
                raise GraphError(f"{value.name!r} has no known type; is the graph well formed?")


def _names(model: ir.Model) -> set[str]:
    values = [value for node in model.graph for value in node.outputs]
    return {value.name or "" for value in (*values, *model.graph.initializers.values())}


class _Typing:
    """One pass over the nodes in order, each value at hand in both types once it was asked for."""

    def __init__(self, model: ir.Model, dtype: Dtype, islands: set[str]) -> None:
        self.graph = model.graph
        self.dtype = _ONNX[dtype]
        self.islands = islands
        self.fp32_nodes: list[str] = []
        self.casted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.outputs = [value.dtype for value in model.graph.outputs]
        self.builder = GraphBuilder(model.graph)

    def type_node(self, node: ir.Node) -> None:
        floats = [value for value in node.outputs if value.dtype == _FLOAT]
        read = [value for value in node.inputs if value is not None and value.dtype == _FLOAT]
        stays = any(value.name in self.islands for value in (*floats, *read))
        target = _FLOAT if stays else self.dtype
        if stays:
            self.fp32_nodes.append(node.name or "")
        if node.op_type == "Cast":
            self._type_cast(node, target)
            return
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in {_FLOAT, self.dtype}:
                node.replace_input_with(index, self._as(value, target, node))
        for value in floats:
            value.type = ir.TensorType(target)

    def _type_cast(self, node: ir.Node, target: ir.DataType) -> None:
        """A cast to float is a cast to whatever float is now; from bytes, at no cost."""
        if node.attributes["to"].as_int() == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", target)
            node.outputs[0].type = ir.TensorType(target)

    def _as(self, value: ir.Value, target: ir.DataType, reader: ir.Node) -> ir.Value:
        if value.dtype == target:
            return value
        key = (value, target)
        if key not in self.casted:
            weight = value.is_initializer()
            self.casted[key] = (
                self._weight(value) if weight else _cast(self.builder.before(reader), value, target)
            )
        return self.casted[key]

    def _weight(self, value: ir.Value) -> ir.Value:
        """Round a weight; the fp32 original goes once nobody reads it."""
        array = array_of(value).astype(self.dtype.numpy())
        short = "fp16" if self.dtype == ir.DataType.FLOAT16 else "bf16"
        name = self.builder.free(f"{value.name}.{short}")
        return self.builder.initializer(ir.tensor(array, name=name), name)

    def restore_outputs(self) -> None:
        for index, value in enumerate(self.graph.outputs):
            wanted = self.outputs[index]
            if wanted is None or value.dtype == wanted:
                continue
            name = value.name or ""
            value.name = self.builder.free(f"{name}.typed")
            casted = self.builder.after(self.graph[-1]).cast(value, wanted, f"{name}.Cast")
            casted.name = name
            self.graph.outputs[index] = casted


MAXIMA = "maxima"
_WATCHED = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True, slots=True)
class Observed:
    """A copy of a graph whose one output is ``maxima`` [len(names)], the largest |value| each."""

    model: ir.Model
    names: tuple[str, ...]


def observe(model: ir.Model) -> Observed:
    """Copy ``model`` with one output: the largest absolute value of each of its float values.

    The copy's own outputs go: with them, onnxruntime runs the whole graph first and every
    value stays in memory until its maximum is taken at the end.
    """
    copy = model.clone()
    infer_shapes(copy)
    names = add_maxima(copy)
    maxima = copy.graph[-1].outputs[0]
    copy.graph.outputs.clear()
    copy.graph.outputs.append(maxima)
    return Observed(copy, names)


def floats_of(model: ir.Model) -> tuple[str, ...]:
    """Name the values of fp32 and fp16 that nodes of a graph with types compute."""
    values = (value for node in model.graph for value in node.outputs)
    return tuple(value.name or "" for value in values if value.dtype in _WATCHED)


def add_maxima(model: ir.Model) -> tuple[str, ...]:
    """Add a value ``maxima`` [count] to a graph with types: the largest |value| of each float.

    It becomes no output. Returns the names of the values.
    """
    graph = model.graph
    names = floats_of(model)
    values = {value.name: value for node in graph for value in node.outputs}
    builder = GraphBuilder(graph)
    peaks = [_peak(builder, values[name]) for name in names]
    joined = builder.after(graph[-1]).op("Concat", peaks, {"axis": 0}, name=MAXIMA)
    joined.type, joined.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([len(names)])
    return names


def _peak(builder: GraphBuilder, value: ir.Value) -> ir.Value:
    """Take the largest absolute value [1] right where ``value`` is computed.

    Right there, for onnxruntime takes nodes in the order of the file where it can: at the end of
    the graph they would keep every value of it in memory.
    """
    builder.after(producer(value))
    axes = builder.initializer(ir.tensor(np.array([0])), builder.free(f"{value.name}.axes"))
    largest = builder.op("Abs", [value], name=f"{value.name}.abs")
    scalar = builder.op("ReduceMax", [largest], {"keepdims": 0}, name=f"{value.name}.max")
    vector = builder.op("Unsqueeze", [scalar, axes], name=f"{value.name}.vector")
    return builder.cast(vector, ir.DataType.FLOAT, f"{value.name}.peak")


def choose(
    maxima: Mapping[str, float], dtype: Dtype = Dtype.FP16, *, headroom: float
) -> dict[str, float]:
    """Pick the values that stay fp32, with their measured maxima; a NaN maximum is picked too.

    A value stays when it came above the largest number of ``dtype`` divided by ``headroom``.
    """
    limit = LARGEST[dtype] / headroom
    return {name: peak for name, peak in maxima.items() if not peak <= limit}
