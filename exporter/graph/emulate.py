"""Write a graph in another arithmetic than its own, to run it where its own has no kernels.

* ``emulate_bf16``: fp32 arithmetic with every bf16 result rounded. onnxruntime's CPU provider has
  no bf16 Conv, MatMul or Attention; a kernel that accumulates in fp32 and writes bf16 computes
  that.
* ``round_values``: an fp32 graph whose every result is rounded to fp16 or bf16, as an engine
  rounds what each kernel writes.
* ``widen``: the fp32 function that a typed or quantised graph approximates.
* ``in_fp64``: what an fp32 graph computes without fp32's own rounding.
"""

from collections.abc import Collection, Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.errors import GraphError
from msn_export.graph.builder import GraphBuilder, operand, producer, replace
from msn_export.graph.io import infer_shapes
from msn_export.spec import Dtype

_MOVES = frozenset(
    (
        "Concat",
        "Expand",
        "Gather",
        "Identity",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    )
)
_BF16, _FLOAT, _DOUBLE = ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE
_HALVES = {Dtype.FP16: ir.DataType.FLOAT16, Dtype.BF16: _BF16}
_NUMPY = {Dtype.FP16: np.float16, Dtype.BF16: ml_dtypes.bfloat16}


def has_bf16(model: ir.Model) -> bool:
    """Whether a graph has bf16 weights."""
    return any(value.dtype == _BF16 for value in model.graph.initializers.values())


def emulate_bf16(model: ir.Model) -> ir.Model:
    """Copy a bf16 graph as an fp32 one whose every value is rounded to bf16."""
    copy = model.clone()
    builder = GraphBuilder(copy.graph)
    for value in copy.graph.initializers.values():
        if value.dtype == _BF16 and value.const_value is not None:
            _store(value, value.const_value.numpy().astype(np.float32))
    for node in list(copy.graph):
        rounded = [value for value in node.outputs if value.dtype == _BF16]
        for value in rounded:
            value.type = ir.TensorType(_FLOAT)
        if node.op_type == "Cast" and rounded:
            node.attributes["to"] = ir.AttrInt64("to", int(_FLOAT))
        if node.op_type not in _MOVES:
            for value in rounded:
                _round(builder, node, value, _BF16)
    infer_shapes(copy)
    return copy


def round_values(model: ir.Model, dtype: Dtype, kept: Collection[str] = ()) -> ir.Model:
    """Copy an fp32 graph as one whose weights and every result are rounded to ``dtype``.

    What a value is rounded to is written out here and not by ``type_graph``: the two can be held
    against each other.

    Args:
        model: an fp32 graph.
        dtype: fp16 or bf16.
        kept: names of values that stay as they are (fp32 islands).
    """
    copy = model.clone()
    infer_shapes(copy)
    builder = GraphBuilder(copy.graph)
    for name, value in copy.graph.initializers.items():
        if value.dtype == _FLOAT and value.const_value is not None and name not in kept:
            with np.errstate(over="ignore"):
                rounded = value.const_value.numpy().astype(_NUMPY[dtype])
            _store(value, rounded.astype(np.float32))
    for node in list(copy.graph):
        if node.op_type in _MOVES or node.op_type == "Cast":
            continue
        for value in list(node.outputs):
            if value.dtype == _FLOAT and value.name not in kept:
                _round(builder, node, value, _HALVES[dtype])
    return copy


def _round(builder: GraphBuilder, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> None:
    builder.after(node)
    half = builder.cast(value, dtype, f"{value.name}.half")
    replace(value, builder.cast(half, _FLOAT, f"{value.name}.rounded"))
    producer(half).replace_input_with(0, value)


def widen(model: ir.Model) -> ir.Model:
    """Copy a graph as the fp32 function of its weights: no 8 bits, no half precision.

    A Q/DQ pair passes on what it is given, an 8-bit weight becomes the float it stands for.
    """
    copy = model.clone()
    infer_shapes(copy)
    _strip_quantisation(copy)
    _retype(copy, {ir.DataType.FLOAT16, _BF16}, _FLOAT)
    RemoveUnusedNodesPass()(copy)
    return copy


def _strip_quantisation(model: ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            continue
        held, written = node.inputs[0], node.inputs[0].producer()
        if held.is_initializer() and held.const_value is not None:
            builder = GraphBuilder(model.graph)
            weight = builder.constant(_dequantised(node), f"{held.name}.widened")
            replace(node.outputs[0], weight)
            weight.type = ir.TensorType(_FLOAT)
        elif written is not None and written.op_type == "QuantizeLinear" and written.inputs[0]:
            replace(node.outputs[0], written.inputs[0])
    RemoveUnusedNodesPass()(model)


def _dequantised(node: ir.Node) -> np.ndarray:
    """Compute (x - zero point) * scale: onnx.ai operators, DequantizeLinear."""
    arrays = [None if v is None or v.const_value is None else v.const_value.numpy()
              for v in node.inputs]  # fmt: skip
    held, scale = arrays[:2]
    if held is None or scale is None:
        raise GraphError(f"node {node.name!r} has a scale that is not constant")
    values = held.astype(np.float32)
    axis = node.attributes.get_int("axis", 1)
    shape = [1] * values.ndim
    if scale.ndim == 1 and values.ndim:
        shape[axis] = -1
    zero = arrays[2] if len(arrays) > 2 else None
    if zero is not None:
        values = values - zero.astype(np.float32).reshape(shape if zero.ndim else ())
    return values * scale.astype(np.float32).reshape(shape if scale.ndim else ())


def in_fp64(model: ir.Model) -> ir.Model:
    """Copy an fp32 graph as one that computes in fp64; it takes what the graph takes.

    onnxruntime's CPU provider has no fp64 Conv and Erf: a convolution whose patches do not overlap
    is written as a matrix product, and Erf stays fp32, whose error is that of one rounding.
    """
    copy = model.clone()
    infer_shapes(copy)
    images = copy.graph.inputs[0]
    taken = images.dtype
    _retype(copy, {_FLOAT}, _DOUBLE)
    images.type = ir.TensorType(taken) if taken is not None else None
    if taken == _FLOAT:
        widened = GraphBuilder(copy.graph, copy.graph[0]).cast(images, _DOUBLE)
        cast = widened.producer()
        for use in list(images.uses()):
            if use.node is not cast:
                use.node.replace_input_with(use.idx, widened)
    for node in list(copy.graph):
        builder = GraphBuilder(copy.graph, node)
        if node.op_type == "Conv":
            replace(node.outputs[0], _as_product(builder, node))
        elif node.op_type == "Gelu" and node.attributes.get_string("approximate", "none") == "none":
            replace(node.outputs[0], _exact_gelu(builder, operand(node, 0)))
        elif node.op_type == "Erf":
            replace(node.outputs[0], _erf(builder, operand(node, 0)))
    RemoveUnusedNodesPass()(copy)
    infer_shapes(copy)
    return copy


def _erf(builder: GraphBuilder, x: ir.Value) -> ir.Value:
    return builder.cast(builder.op("Erf", [builder.cast(x, _FLOAT)]), _DOUBLE)


def _exact_gelu(builder: GraphBuilder, x: ir.Value) -> ir.Value:
    """Gelu as onnx.ai operators, Gelu, writes it: x / 2 * (1 + erf(x / sqrt(2)))."""
    root, one, half = (
        builder.constant(np.asarray(number, np.float64), f"fp64.{name}")
        for number, name in ((np.sqrt(0.5), "sqrt_half"), (1.0, "one"), (0.5, "half"))
    )
    bend = builder.op("Add", [_erf(builder, builder.op("Mul", [x, root])), one])
    return builder.op("Mul", [builder.op("Mul", [x, half]), bend])


def _as_product(builder: GraphBuilder, node: ir.Node) -> ir.Value:
    """Write a convolution [b, c, h, w] to [b, dim, rows, columns] as a product over its patches."""
    x, weight = node.inputs[:2]
    kernel = weight.const_value.numpy() if weight is not None and weight.const_value else None
    shape = list(x.shape or ()) if x is not None else []
    if kernel is None or kernel.ndim != 4 or len(shape) != 4 or not _is_patching(node, kernel):
        raise GraphError(f"node {node.name!r} is a convolution that has no fp64 form here")
    dim, channels, high, wide = kernel.shape
    height, width = shape[2:]
    if not isinstance(height, int) or not isinstance(width, int):
        raise GraphError(f"node {node.name!r} takes images of no fixed size")
    rows, columns = height // high, width // wide

    def reshaped(value: ir.Value, *sizes: int) -> ir.Value:
        name = "fp64.shape." + ".".join(map(str, sizes)).replace("-", "m")
        return builder.op("Reshape", [value, builder.constant(np.asarray(sizes, np.int64), name)])

    split = reshaped(x, -1, channels, rows, high, columns, wide)  # type: ignore[arg-type]
    moved = builder.op("Transpose", [split], {"perm": [0, 2, 4, 1, 3, 5]})
    patches = reshaped(moved, -1, rows * columns, channels * high * wide)
    matrix = builder.constant(kernel.reshape(dim, -1).T, f"{node.name}.fp64.weight")
    product = builder.op("MatMul", [patches, matrix])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        product = builder.op("Add", [product, node.inputs[2]])
    return reshaped(builder.op("Transpose", [product], {"perm": [0, 2, 1]}), -1, dim, rows, columns)


def _is_patching(node: ir.Node, kernel: np.ndarray) -> bool:
    strides = node.attributes.get_ints("strides", [1, 1])
    pads, dilations = (
        node.attributes.get_ints("pads", []),
        node.attributes.get_ints("dilations", []),
    )
    return (
        tuple(strides) == kernel.shape[2:]
        and not any(pads)
        and all(step == 1 for step in dilations)
        and node.attributes.get_int("group", 1) == 1
    )


def _retype(model: ir.Model, held: set[ir.DataType], to: ir.DataType) -> None:
    """Give every value, constant and cast of the types ``held`` another type, in place."""
    for value in _values(model):
        if value.dtype in held:
            if value.const_value is not None:
                _store(value, value.const_value.numpy().astype(to.numpy()))
            value.type = ir.TensorType(to)
    for node in model.graph:
        cast = node.attributes.get("to") if node.op_type == "Cast" else None
        if cast is not None and ir.DataType(cast.as_int()) in held:
            node.attributes["to"] = ir.AttrInt64("to", int(to))
        constant = node.attributes.get("value") if node.op_type.startswith("Constant") else None
        if constant is not None and constant.as_tensor().dtype in held:
            array = constant.as_tensor().numpy().astype(to.numpy())
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _store(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.tensor(np.asarray(array, order="C"), name=value.name)
    value.type = ir.TensorType(value.const_value.dtype)
