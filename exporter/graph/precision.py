"""Type a graph as fp16 or bf16; what cannot live there stays fp32.

TensorRT builds strongly typed networks: the precision of an engine is the precision written in
its graph, and onnxruntime runs that very graph.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.errors import GraphError
from msn_export.graph.builder import GraphBuilder, array_of, operand, producer
from msn_export.graph.io import infer_shapes
from msn_export.graph.quantised import quantised_dtype
from msn_export.spec import Dtype

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
    """What typing did: values and weights that stay fp32, and the nodes that compute in it.

    ``weights`` are those that overflow, each with its largest absolute value.
    """

    islands: tuple[str, ...]
    weights: dict[str, float]
    fp32_nodes: tuple[str, ...]
    casts: int


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

    Raises:
        GraphError: an island is no value of this graph, the graph is not fp32, or has an operator
            whose inputs cannot be retyped.
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
    casts = sum(node.op_type == "Cast" for node in model.graph)
    return Typed(tuple(sorted(wanted)), weights, tuple(typing.fp32_nodes), casts)


def attention_in_bf16(model: ir.Model, nodes: Collection[str]) -> None:
    """Cast what the named ``Attention`` nodes read to bf16, and their results back, in place.

    Raises:
        GraphError: the graph has no Attention node of a name.
    """
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
    """Name the results of the products that read any of ``weights``."""
    return {
        node.outputs[0].name or ""
        for node in model.graph
        if node.op_type in PRODUCTS
        and any(value is not None and value.name in weights for value in node.inputs)
    }


def graph_dtype(model: ir.Model) -> Dtype:
    """Say how a graph's weights are typed, by number; one with Q/DQ is of their type.

    Raises:
        GraphError: it is quantised in a way that TensorRT does not compile.
    """
    quantised = quantised_dtype(model)
    if quantised is not None:
        return quantised
    held: dict[Dtype, int] = dict.fromkeys(Dtype, 0)
    names = {_FLOAT: Dtype.FP32, **{onnx: dtype for dtype, onnx in _ONNX.items()}}
    for value in model.graph.initializers.values():
        if value.dtype in names and value.const_value is not None:
            held[names[value.dtype]] += value.const_value.size
    return max(held, key=lambda dtype: held[dtype])


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
        """Cast the graph's outputs back to the types they had."""
        for index, value in enumerate(self.graph.outputs):
            wanted = self.outputs[index]
            if wanted is None or value.dtype == wanted:
                continue
            name = value.name or ""
            value.name = self.builder.free(f"{name}.typed")
            casted = self.builder.after(self.graph[-1]).cast(value, wanted, f"{name}.Cast")
            casted.name = name
            self.graph.outputs[index] = casted
