"""Write a graph for a parser that ends at an earlier opset, and raise an older one to 23.

Opset 11 and 12 have no LayerNormalization, and their Softmax flattens its input; exporters that do
not know the rank write it as Exp, ReduceSum and Div. torch below opset 23 transposes keys by way of
three axes. Each is recognised by what it computes, never by a name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.errors import GraphError
from msn_export.graph.builder import GraphBuilder, producer_of, replace
from msn_export.graph.io import infer_shapes, refill, skeleton

NEWEST = 23  # the opset every step here reads and writes

# onnx/docs/Versioning.md: the IR version that came with each opset
_IR_VERSIONS = {17: 8, 20: 9, 23: 11}

# Operators of a ViT graph that mean the same from opset 17 to 23, apart from the attributes and
# forms written below; anything else is refused rather than relabelled.
_UNCHANGED = frozenset(
    """
    Abs Add Cast Clip Concat Constant Conv Div Elu Equal Erf Exp Expand Gather Gelu Gemm
    HardSigmoid HardSwish Identity LayerNormalization LeakyRelu Log MatMul Max Min Mish Mul Neg
    Pad Pow Reciprocal ReduceMean Relu Reshape Shape Sigmoid Slice Softmax Softplus Softsign Split
    Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where
    """.split()  # noqa: SIM905  fifty quoted words would be five times as long
)
_QUANTISATION = frozenset({"QuantizeLinear", "DequantizeLinear"})


def lower_opset(model: ir.Model, opset: int) -> None:
    """Rewrite ``model`` in place to opset 17, 20 or 23; below 23, attention must be plain."""
    strange = {
        node.op_type
        for node in model.graph
        if node.op_type not in _UNCHANGED
        and not _is_attention(node, opset)
        and not _is_quantisation(node, opset)
    }
    if strange:
        raise GraphError(f"opset {opset} has no form of {', '.join(sorted(strange))} written here")
    for node in list(model.graph):
        if node.op_type == "Gelu" and opset < 20:
            _write_gelu(model.graph, node)
        elif node.op_type == "Split" and opset < 18:
            node.attributes.pop("num_outputs", None)  # new in 18; equal parts before
        elif node.op_type in _QUANTISATION and opset < 19:
            for name in ("saturate", "output_dtype", "block_size", "precision"):
                node.attributes.pop(name, None)  # new in 19 to 23, and of no meaning here
        elif node.op_type == "ReduceMean" and opset < 18:
            _write_reduce_mean(node)
    model.graph.opset_imports[""] = opset
    model.ir_version = _IR_VERSIONS[opset]
    RemoveUnusedNodesPass()(model)
    infer_shapes(model)


def _is_attention(node: ir.Node, opset: int) -> bool:
    """Whether a node is an Attention of opset 23; 24 added an input, the number of valid keys."""
    return node.op_type == "Attention" and opset >= 23 and not any(node.inputs[6:])


def _is_quantisation(node: ir.Node, opset: int) -> bool:
    """Whether Q or DQ means the same: with fp16 scales and with fp8 since 19, else int8 or int32.

    onnx.ai operators, version history of QuantizeLinear.
    """
    if node.op_type not in _QUANTISATION or opset >= 19:
        return node.op_type in _QUANTISATION
    x, scale = node.inputs[:2]
    held = node.outputs[0] if node.op_type == "QuantizeLinear" else x
    integers = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32}
    floats = scale is not None and scale.dtype is ir.DataType.FLOAT
    return floats and held is not None and held.dtype in integers


def raise_opset(model: ir.Model, opset: int = NEWEST) -> ir.Model:
    """Convert a graph to ``opset`` with onnx's version converter; same graph if it is there."""
    held = model.graph.opset_imports.get("", 0)
    if held >= opset:
        return model
    try:
        return refill(onnx.version_converter.convert_version(skeleton(model), opset), model)
    except Exception as error:  # onnx raises several of its own, and C++'s, for one that is wrong
        reason = " ".join(str(error).split())
        raise GraphError(f"opset {held} cannot be converted to {opset}: {reason}") from error


def _write_gelu(graph: ir.Graph, node: ir.Node) -> None:
    """Gelu as operators of opset 17: onnx.ai operators, Gelu, its function body."""
    builder = GraphBuilder(graph, node)
    x = node.inputs[0]
    dtype = x.dtype.numpy() if x is not None and x.dtype is not None else np.float32
    half = builder.constant(np.asarray(0.5, dtype), "gelu.half")
    one = builder.constant(np.asarray(1.0, dtype), "gelu.one")
    approximate = node.attributes.get("approximate")
    if approximate is not None and approximate.as_string() == "tanh":
        cubic = builder.constant(np.asarray(0.044715, dtype), "gelu.cubic")
        factor = builder.constant(np.asarray(np.sqrt(2 / np.pi), dtype), "gelu.factor")
        cube = builder.op("Mul", [builder.op("Mul", [x, x]), x])
        inner = builder.op("Add", [x, builder.op("Mul", [cube, cubic])])
        bend = builder.op("Tanh", [builder.op("Mul", [inner, factor])])
    else:
        root = builder.constant(np.asarray(np.sqrt(2), dtype), "gelu.sqrt2")
        bend = builder.op("Erf", [builder.op("Div", [x, root])])
    halved = builder.op("Mul", [x, half])
    replace(node.outputs[0], builder.op("Mul", [halved, builder.op("Add", [bend, one])]))


def _write_reduce_mean(node: ir.Node) -> None:
    """Opset 18 moved ReduceMean's axes from an attribute to an input."""
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is not None:
        if axes.const_value is None:
            raise GraphError(f"the axes of {node.name!r} are not constant")
        node.attributes.add(ir.AttrInt64s("axes", axes.const_value.numpy().tolist()))
        node.resize_inputs(1)
    node.attributes.pop("noop_with_empty_axes", None)


# b batch, h heads, n tokens, d head size


def write_plainly(model: ir.Model) -> None:
    """Rewrite every such form in place; the graph is of opset 18 or later, its shapes known."""
    changed = False
    for node in list(model.graph):
        rewrite = _REWRITES.get(node.op_type)
        changed |= rewrite is not None and rewrite(model.graph, node)
    if changed:
        RemoveUnusedNodesPass()(model)
        infer_shapes(model)


def _softmax_of_rows(graph: ir.Graph, softmax: ir.Node) -> bool:
    """Softmax over [b * h * n, n] between two Reshapes, as opset 12 defines it."""
    rows, axis = softmax.inputs[0], softmax.attributes.get("axis")
    if rows is None or _rank(rows) != 2 or (axis is not None and axis.as_int() not in {-1, 1}):
        return False
    flat = rows.producer()
    back = _only_user(softmax.outputs[0])
    if flat is None or flat.op_type not in {"Reshape", "Flatten"} or flat.inputs[0] is None:
        return False
    if back is None or back.op_type != "Reshape":
        return False
    scores = flat.inputs[0]
    before, after, columns = _sizes(scores), _sizes(back.outputs[0]), _sizes(rows)
    same = before == after and before.count(None) <= 1 and len(before) > 2
    if not same or before[-1] is None or before[-1] != columns[-1]:
        return False
    builder = GraphBuilder(graph, softmax)
    replace(back.outputs[0], builder.op("Softmax", [scores], {"axis": -1}))
    return True


def _softmax_of_parts(graph: ir.Graph, division: ir.Node) -> bool:
    """exp(x - max x) / sum, or without the maximum, over the last axis."""
    powers, total = division.inputs[:2]
    exp, add_up = producer_of(powers, "Exp"), producer_of(total, "ReduceSum")
    if exp is None or add_up is None or add_up.inputs[0] is not powers or not _over_last(add_up):
        return False
    scores = exp.inputs[0]
    shifted = producer_of(scores, "Sub")
    if shifted is not None:
        largest = producer_of(shifted.inputs[1], "ReduceMax")
        if largest is not None and largest.inputs[0] is shifted.inputs[0] and _over_last(largest):
            scores = shifted.inputs[0]
    builder = GraphBuilder(graph, division)
    replace(division.outputs[0], builder.op("Softmax", [scores], {"axis": -1}))
    return True


def _keys_of_three_axes(graph: ir.Graph, reshape: ir.Node) -> bool:
    """[.., n, d] as [b * h, n, d], transposed to [b * h, d, n], as [b, h, d, n]."""
    transpose = producer_of(reshape.inputs[0], "Transpose")
    if transpose is None or tuple(transpose.attributes["perm"].as_ints()) != (0, 2, 1):
        return False
    merged = producer_of(transpose.inputs[0], "Reshape")
    if merged is None or merged.inputs[0] is None:
        return False
    keys, sizes = merged.inputs[0], _sizes(reshape.outputs[0])
    if len(sizes) != 4 or _sizes(merged.outputs[0])[1:] != [sizes[3], sizes[2]]:
        return False
    heads, size, tokens = sizes[1:]
    if heads is None or size is None or tokens is None:
        return False
    builder = GraphBuilder(graph, reshape)
    if _sizes(keys)[1:] != [heads, tokens, size]:
        shape = (sizes[0], heads, tokens, size)
        keys = builder.reshape(keys, heads, tokens, size, shape=shape)
    replace(reshape.outputs[0], builder.op("Transpose", [keys], {"perm": (0, 1, 3, 2)}))
    return True


def _layer_norm(graph: ir.Graph, shift: ir.Node) -> bool:
    """(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * gain + bias, over the last axis."""
    scaled, bias = _with_vector(shift)
    if scaled is None or (gained := producer_of(scaled, "Mul")) is None:
        return False
    quotient, gain = _with_vector(gained)
    division = producer_of(quotient, "Div")
    if division is None:
        return False
    centred, deviation = division.inputs[:2]
    subtraction, root = producer_of(centred, "Sub"), producer_of(deviation, "Sqrt")
    added = None if root is None else producer_of(root.inputs[0], "Add")
    if subtraction is None or added is None:
        return False
    x, average = subtraction.inputs[0], producer_of(subtraction.inputs[1], "ReduceMean")
    variance, epsilon = _with_number(added)
    mean = producer_of(variance, "ReduceMean")
    if x is None or average is None or average.inputs[0] is not x or not _over_last(average):
        return False
    if mean is None or epsilon is None or not _over_last(mean):
        return False
    if not _is_square(mean.inputs[0], centred):
        return False
    builder = GraphBuilder(graph, shift)
    attributes = {"axis": -1, "epsilon": epsilon}
    replace(shift.outputs[0], builder.op("LayerNormalization", [x, gain, bias], attributes))
    return True


def _is_square(value: ir.Value | None, of: ir.Value | None) -> bool:
    power = producer_of(value, "Pow")
    if power is not None:
        exponent = power.inputs[1]
        held = None if exponent is None else exponent.const_value
        return power.inputs[0] is of and held is not None and (held.numpy() == 2).all()
    product = producer_of(value, "Mul")
    return product is not None and all(operand is of for operand in product.inputs)


def _with_vector(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Tell the operand from the constant of one axis that is added to it or multiplies it."""
    for value, held in (node.inputs[:2], node.inputs[1::-1]):
        if value is not None and held is not None and held.const_value is not None:
            last = _sizes(value)[-1:]
            if _sizes(held) == last and last != [None]:
                return value, held
    return None, None


def _with_number(node: ir.Node) -> tuple[ir.Value | None, float | None]:
    for value, held in (node.inputs[:2], node.inputs[1::-1]):
        constant = None if held is None else held.const_value
        if value is not None and constant is not None and constant.size == 1:
            return value, float(constant.numpy().reshape(()))
    return None, None


_REWRITES = {
    "Add": _layer_norm,
    "Div": _softmax_of_parts,
    "Reshape": _keys_of_three_axes,
    "Softmax": _softmax_of_rows,
}


def _over_last(reduction: ir.Node) -> bool:
    """Whether a reduction runs over the last axis alone and keeps it."""
    kept = reduction.attributes.get("keepdims")
    if kept is not None and not kept.as_int():
        return False
    axes: Sequence[int] = ()
    if len(reduction.inputs) > 1 and reduction.inputs[1] is not None:
        held = reduction.inputs[1].const_value
        axes = () if held is None else held.numpy().reshape(-1).tolist()
    elif "axes" in reduction.attributes:
        axes = reduction.attributes["axes"].as_ints()
    rank = _rank(reduction.inputs[0])
    return len(axes) == 1 and (axes[0] == -1 or (rank is not None and axes[0] == rank - 1))


def _only_user(value: ir.Value) -> ir.Node | None:
    users = list(value.uses())
    return users[0].node if len(users) == 1 and not value.is_graph_output() else None


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _sizes(value: ir.Value | None) -> list[int | None]:
    shape = () if value is None or value.shape is None else value.shape
    return [size if isinstance(size, int) else None for size in shape]
