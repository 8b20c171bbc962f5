"""Write 3-D Attention operators, whose heads lie together, as 4-D ones.

TensorRT compiles the 4-D form into fewer kernels (docs/performance.md), and it is the form in which
cores are matched. Shapes: ``b`` batch, ``n`` tokens, ``h`` heads, ``d`` head size.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.graph.attention import HEADS_FIRST
from msn_export.graph.io import infer_shapes
from msn_export.graph.patch import Patch, replace


def set_heads_apart(model: ir.Model) -> None:
    """Rewrite in place; an operator whose sizes are not known is left as it is."""
    changed = False
    for node in list(model.graph):
        operands = [value for value in node.inputs[:3] if value is not None]
        if node.op_type != "Attention" or len(operands) != 3 or len(node.outputs) != 1:
            continue
        heads = _count(node, "q_num_heads")
        sizes = [_tokens_and_width(value) for value in operands]
        known = heads and all(n and w and w % heads == 0 for n, w in sizes)
        if known and heads == _count(node, "kv_num_heads"):
            _rewrite(model.graph, node, operands, heads)
            changed = True
    if changed:
        RemoveUnusedNodesPass()(model)
        infer_shapes(model)


def _rewrite(graph: ir.Graph, node: ir.Node, operands: Sequence[ir.Value], heads: int) -> None:
    sizes = [_tokens_and_width(value) for value in operands]
    tokens, width = sizes[0]
    patch = Patch(graph, node)
    apart = _packed_apart(patch, operands, heads) or [
        _apart(patch, value, n, heads, w // heads)
        for value, (n, w) in zip(operands, sizes, strict=True)
    ]
    scale = node.attributes.get("scale")
    # onnx.ai operators, Attention: scale is 1 / sqrt(d) where it is left out
    attributes = {"scale": scale.as_float() if scale else (width // heads) ** -0.5}
    attributes |= {
        name: attribute.value
        for name, attribute in node.attributes.items()
        if name not in {"q_num_heads", "kv_num_heads", "scale"}
    }
    attended = patch.op("Attention", [*apart, *node.inputs[3:]], attributes)
    tokens_first = patch.op("Transpose", [attended], {"perm": HEADS_FIRST})
    width = sizes[2][1]
    replace(node.outputs[0], patch.op("Reshape", [tokens_first, _shape(patch, tokens, width)]))


def _packed_apart(
    patch: Patch, operands: Sequence[ir.Value], heads: int
) -> Sequence[ir.Value] | None:
    """Split [b, 3 * h, n, d] where q, k and v are thirds of one [b, n, 3 * h * d] projection."""
    split = operands[0].producer()
    if split is None or split.op_type != "Split" or list(split.outputs) != list(operands):
        return None
    packed = split.inputs[0]
    tokens, width = _tokens_and_width(operands[0])
    axis = split.attributes.get("axis")
    if packed is None or axis is None or axis.as_int() not in {-1, 2}:
        return None
    if _tokens_and_width(packed) != (tokens, 3 * width) or any(
        _tokens_and_width(value) != (tokens, width) for value in operands
    ):
        return None
    apart = _apart(patch, packed, tokens, 3 * heads, width // heads)
    return patch.ops("Split", [apart], {"axis": 1, "num_outputs": 3}, outputs=3)


def _apart(patch: Patch, value: ir.Value, tokens: int, rows: int, size: int) -> ir.Value:
    """[b, n, rows * size] -> [b, rows, n, size]."""
    reshaped = patch.op("Reshape", [value, _shape(patch, tokens, rows, size)])
    return patch.op("Transpose", [reshaped], {"perm": HEADS_FIRST})


def _shape(patch: Patch, *sizes: int) -> ir.Value:
    name = "x".join(str(size) for size in sizes)
    return patch.constant(np.array([-1, *sizes]), f"shape.bx{name}")


def _count(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else 0


def _tokens_and_width(value: ir.Value) -> tuple[int, int]:
    """Read n and h * d off [b, n, h * d]; zeros where they are not known."""
    shape = value.shape
    if shape is None or len(shape) != 3:
        return 0, 0
    tokens, width = shape[1], shape[2]
    return (tokens, width) if isinstance(tokens, int) and isinstance(width, int) else (0, 0)
