"""Make a bf16 graph run where no bf16 kernels exist: fp32 arithmetic, every result rounded.

onnxruntime's CPU provider has no bf16 Conv, MatMul or Attention. A kernel that accumulates in fp32
and writes bf16, as TensorRT's do, computes what fp32 arithmetic followed by a rounding computes.
"""

import numpy as np
import onnx_ir as ir

from msn_export.graph.io import infer_shapes
from msn_export.graph.patch import Names

_MOVES = frozenset(
    (
        "Concat",
        "Expand",
        "Gather",
        "Pad",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    )
)
_BF16, _FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def has_bf16(model: ir.Model) -> bool:
    """Whether a graph has bf16 weights."""
    return any(value.dtype == _BF16 for value in model.graph.initializers.values())


def emulate_bf16(model: ir.Model) -> ir.Model:
    """Copy a bf16 graph as an fp32 one whose every value is rounded to bf16."""
    copy = model.clone()
    names = Names(copy.graph)
    for value in copy.graph.initializers.values():
        if value.dtype == _BF16 and value.const_value is not None:
            widened = value.const_value.numpy().astype(np.float32)
            value.const_value = ir.tensor(widened, name=value.name)
            value.type = ir.TensorType(_FLOAT)
    for node in list(copy.graph):
        rounded = [value for value in node.outputs if value.dtype == _BF16]
        for value in rounded:
            value.type = ir.TensorType(_FLOAT)
        if node.op_type == "Cast" and rounded:
            node.attributes["to"] = ir.AttrInt64("to", int(_FLOAT))
        if node.op_type not in _MOVES:
            for value in rounded:
                _round(copy.graph, names, node, value)
    infer_shapes(copy)
    return copy


def _round(graph: ir.Graph, names: Names, node: ir.Node, value: ir.Value) -> None:
    down = ir.node("Cast", [value], {"to": int(_BF16)})
    up = ir.node("Cast", down.outputs, {"to": int(_FLOAT)})
    for cast, ending in ((down, "bf16"), (up, "rounded")):
        cast.name = cast.outputs[0].name = names.free(f"{value.name}.{ending}")
    value.replace_all_uses_with(up.outputs[0], replace_graph_outputs=True)
    down.replace_input_with(0, value)
    graph.insert_after(node, [down, up])
