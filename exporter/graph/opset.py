"""Write a graph in another opset: an older one for a parser, 23 for graphs of other tools."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from msn_export.errors import GraphError
from msn_export.graph.builder import GraphBuilder, operand, replace
from msn_export.graph.fuse import write_plainly
from msn_export.graph.fused_operators import DOMAIN, is_plain, write_fused
from msn_export.graph.io import infer_shapes, refill, skeleton
from msn_export.graph.precision import graph_dtype
from msn_export.graph.simplify import fix_image_size, resolve_shapes, simplify

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
    """Match an Attention of opset 23; 24 added an input, the number of valid keys."""
    return node.op_type == "Attention" and opset >= 23 and not any(node.inputs[6:])


def _is_quantisation(node: ir.Node, opset: int) -> bool:
    """Match Q and DQ that mean the same: with fp16 scales and fp8 since 19, else int8 or int32.

    onnx.ai operators, version history of QuantizeLinear.
    """
    if node.op_type not in _QUANTISATION or opset >= 19:
        return node.op_type in _QUANTISATION
    x, scale = node.inputs[:2]
    held = node.outputs[0] if node.op_type == "QuantizeLinear" else x
    integers = {ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT32}
    floats = scale is not None and scale.dtype is ir.DataType.FLOAT
    return floats and held is not None and held.dtype in integers


def raise_opset(model: ir.Model) -> ir.Model:
    """Convert a graph to opset 23 with onnx's version converter; same graph if it is there."""
    held = model.graph.opset_imports.get("", 0)
    if held >= NEWEST:
        return model
    try:
        return refill(onnx.version_converter.convert_version(skeleton(model), NEWEST), model)
    except Exception as error:  # onnx raises several of its own, and C++'s, for one that is wrong
        reason = " ".join(str(error).split())
        raise GraphError(f"opset {held} cannot be converted to {NEWEST}: {reason}") from error


def _write_gelu(graph: ir.Graph, node: ir.Node) -> None:
    """Gelu as operators of opset 17: onnx.ai operators, Gelu, its function body."""
    builder = GraphBuilder(graph, node)
    x = operand(node, 0)
    dtype = x.dtype.numpy() if x.dtype is not None else np.float32
    half = builder.constant(np.asarray(0.5, dtype), "gelu.half")
    one = builder.constant(np.asarray(1.0, dtype), "gelu.one")
    if node.attributes.get_string("approximate", "none") == "tanh":
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


def understand(model: ir.Model) -> tuple[str, ...]:
    """Write image size, types and shapes into a graph, in place; what it computes stays the same.

    Returns:
        Notes on what had to be decided.
    """
    ClearMetadataAndDocStringPass()(model)
    size = fix_image_size(model)
    _forget(model)
    resolve_shapes(model)
    if size is None:
        return ()
    return (f"its image size was dynamic, and is {size} as its position embedding has it",)


def tidy(model: ir.Model) -> tuple[ir.Model, str]:
    """Write an understood graph in opset 23 and simplify it; say what simplification did.

    A quantised graph is not simplified: it would lose its Q/DQ on constants.
    """
    if model.graph.opset_imports[""] > NEWEST:
        lower_opset(model, NEWEST)
    if graph_dtype(model).is_quantised:
        return raise_opset(model), "left as it was quantised"
    simplified, reason = simplify(raise_opset(model))
    if simplified is not model:
        resolve_shapes(simplified)  # what onnxsim took out of an If
    return simplified, f"simplification {reason}"


def raised_where_possible(model: ir.Model) -> ir.Model:
    """Write an understood graph in opset 23, its operators plainly; else give it as it is."""
    try:
        raised = raise_opset(model)
        if write_fused(raised):
            resolve_shapes(raised)
        write_plainly(raised)
    except GraphError:
        return model
    return raised


def require_plain_operators(model: ir.Model) -> None:
    """Refuse operators that only one runtime has."""
    for node in model.graph:
        if is_plain(node):
            continue
        hint = "no TensorRT parser reads it; export it again from the checkpoint"
        if node.domain == DOMAIN:
            hint = "it was optimised by onnxruntime; export it again without"
            if node.op_type.startswith("QLinear"):
                hint = (
                    "it was quantised with onnxruntime's QuantFormat.QOperator, which no TensorRT "
                    "parser reads; quantise the fp32 graph with msn-export calibrate"
                )
        raise GraphError(
            f"node {node.name or node.outputs[0].name!r} is {node.domain}.{node.op_type}: {hint}"
        )


def _forget(model: ir.Model) -> None:
    """Drop types and shapes on the way: converters leave those of the graph they came from."""
    outputs = set(model.graph.outputs)
    for node in model.graph:
        for value in node.outputs:
            if value not in outputs:
                value.type, value.shape = None, None
