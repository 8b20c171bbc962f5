"""Read a graph that another tool wrote: which forms are taken, and how each becomes one of ours.

``FORMS`` is the list of them; every row has a test in tests/graph/test_foreign_commands.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from msn_export.errors import GraphError
from msn_export.graph.opset import NEWEST, lower_opset, raise_opset, write_plainly
from msn_export.graph.precision import graph_dtype
from msn_export.graph.simplify import fix_image_size, resolve_shapes, simplify


@dataclass(frozen=True, slots=True)
class Form:
    """A form of graph that other tools write: ``verdict`` is what becomes of it, ``done`` how."""

    name: str
    verdict: Literal["read", "noted", "refused"]
    done: str


FORMS = (
    Form("opset 11 and 12", "read", "raised to opset 23; LayerNorm written out becomes one"),
    Form("Softmax as Exp, ReduceSum and Div", "read", "becomes one Softmax"),
    Form("Softmax over [b * h * n, n]", "read", "becomes one Softmax over the last axis"),
    Form("keys transposed as [b * h, n, d]", "read", "become one Transpose"),
    Form("opset 24 and later", "read", "written as opset 23, if its operators are the same there"),
    Form("nodes out of order", "read", "sorted"),
    Form("no value_info, or a wrong one", "read", "types and shapes are computed from the input"),
    Form("shapes computed from the running batch", "read", "become constants"),
    Form("operators on constants (Resize)", "read", "computed once, in onnxruntime"),
    Form("height and width left open (optimum)", "noted",
         "fixed at the size of the position embedding"),
    Form("float16 input", "read", "pictures are fed as float16"),
    Form("fp16 by onnxconverter-common or onnxruntime.transformers", "read", "as it is typed"),
    Form("softmax kept in fp32 (op_block_list)", "noted",
         "a fused kernel computes it in its own precision"),
    Form("symmetric int8 Q/DQ of onnxruntime", "noted", "biases become floats; trt types the rest"),
    Form("Q/DQ inside attention", "refused", "trt --allow-unfused compiles it unfused"),
    Form("asymmetric or uint8 Q/DQ", "refused", "quantise symmetrically to int8"),
    Form("dynamic quantisation", "refused", "quantise the fp32 graph with msn-export calibrate"),
    Form("QOperator quantisation", "refused", "quantise the fp32 graph with msn-export calibrate"),
    Form("attention-pooling head", "refused", "export the model without that head"),
    Form("uint8 [b, c, h, w] input", "refused", "uint8 images are taken as [b, h, w, c]"),
    Form("float [b, h, w, c] input", "refused", "float images are taken as [b, c, h, w]"),
    Form("output of one axis, or of integers", "refused", "export the scores before argmax"),
    Form("operators of onnxruntime (com.microsoft)", "refused",
         "export it again without onnxruntime's optimiser"),
)  # fmt: skip


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
    outcome = simplify(raise_opset(model))
    if outcome.model is not model:
        resolve_shapes(outcome.model)  # what onnxsim took out of an If
    return outcome.model, f"simplification {outcome.reason}"


def raised_where_possible(model: ir.Model) -> ir.Model:
    """Write an understood graph in opset 23, its attention plainly; else give it as it is."""
    try:
        raised = raise_opset(model)
        write_plainly(raised)
    except GraphError:
        return model
    return raised


def require_plain_operators(model: ir.Model) -> None:
    """Refuse operators that only one runtime has."""
    for node in model.graph:
        if node.domain in {"", "ai.onnx"}:
            continue
        hint = "no TensorRT parser reads it; export it again from the checkpoint"
        if node.domain == "com.microsoft":
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
