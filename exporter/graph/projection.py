"""The packed query-key-value projection, and its split where queries are needed for one token."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from msn_export.graph.attention import HEADS_FIRST
from msn_export.graph.patch import Patch

# b batch, n tokens, h heads, d head size, dim hidden size


@dataclass(frozen=True, slots=True)
class PackedProjection:
    """``x @ weight + bias`` [b, n, 3 * h * d], laid out as [b, 3 * h, n, d] and split in three."""

    x: ir.Value
    product: ir.Node
    bias: ir.Value | None
    reshape: ir.Node
    split: ir.Node

    @property
    def weight(self) -> ir.Value:
        """The weight, [dim, 3 * h * d]."""
        weight = self.product.inputs[1]
        assert weight is not None
        return weight


def find_packed(split: ir.Node | None) -> PackedProjection | None:
    """Match the projection behind a Split into q, k and v."""
    if split is None or split.op_type != "Split" or len(split.outputs) != 3:
        return None
    transpose = _only_producer(split.inputs[0], "Transpose")
    if transpose is None or tuple(transpose.attributes["perm"].as_ints()) != HEADS_FIRST:
        return None
    reshape = _only_producer(transpose.inputs[0], "Reshape")
    if reshape is None:
        return None
    added = _only_producer(reshape.inputs[0], "Add")
    bias = _constant_of(added)
    product = _only_producer(reshape.inputs[0] if added is None else _variable_of(added), "MatMul")
    if product is None or product.inputs[0] is None or product.inputs[1] is None:
        return None
    if product.inputs[1].const_value is None or (added is not None and bias is None):
        return None
    return PackedProjection(product.inputs[0], product, bias, reshape, split)


def split_queries(graph: ir.Graph) -> bool:
    """Project queries for the first token alone, where only its query is read.

    Returns:
        Whether there was such a projection.
    """
    for node in graph:
        if node.op_type != "Slice" or node.inputs[0] is None:
            continue
        split = node.inputs[0].producer()
        packed = find_packed(split)
        if packed is None or node.inputs[0] is not packed.split.outputs[0]:
            continue
        if len(node.inputs[0].uses()) == 1:
            _rewrite(graph, packed, node)
            return True
    return False


def _rewrite(graph: ir.Graph, packed: PackedProjection, sliced: ir.Node) -> None:
    assert packed.weight.const_value is not None
    assert packed.reshape.inputs[1] is not None
    weight = packed.weight.const_value.numpy()
    bias = None
    if packed.bias is not None and packed.bias.const_value is not None:
        bias = packed.bias.const_value.numpy()
    target = packed.reshape.inputs[1].const_value
    assert target is not None
    tokens, rows, size = (int(number) for number in target.numpy().tolist()[1:])
    dim, heads = weight.shape[1] // 3, rows // 3
    patch = Patch(graph, packed.product)
    zero, one = patch.constant(np.array([0]), "index.0"), patch.constant(np.array([1]), "index.1")
    first = patch.op("Slice", [packed.x, zero, one, one])
    stem = (packed.weight.name or "qkv").removesuffix(".weight")

    def project(x: ir.Value, columns: slice, name: str, shape: list[int]) -> ir.Value:
        held = patch.constant(np.asarray(weight[:, columns], order="C"), f"{stem}.{name}.weight")
        y = patch.op("MatMul", [x, held])
        if bias is not None:
            y = patch.op("Add", [y, patch.constant(bias[columns], f"{stem}.{name}.bias")])
        label = "x".join(str(number) for number in shape).replace("-1", "b")
        y = patch.op("Reshape", [y, patch.constant(np.array(shape), f"shape.{label}")])
        return patch.op("Transpose", [y], {"perm": HEADS_FIRST})

    q = project(first, slice(0, dim), "q", [-1, 1, heads, size])
    kv = project(packed.x, slice(dim, 3 * dim), "kv", [-1, tokens, 2 * heads, size])
    k, v = patch.ops("Split", [kv], {"axis": 1, "num_outputs": 2}, outputs=2)
    for old, new in ((sliced.outputs[0], q), (packed.split.outputs[1], k),
                     (packed.split.outputs[2], v)):  # fmt: skip
        new.type = old.type
        old.replace_all_uses_with(new)


def _only_producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type or value is None or len(value.uses()) != 1:
        return None
    return node


def _constant_of(added: ir.Node | None) -> ir.Value | None:
    operands = [] if added is None else added.inputs
    return next((v for v in operands if v is not None and v.const_value is not None), None)


def _variable_of(added: ir.Node) -> ir.Value | None:
    return next((v for v in added.inputs if v is not None and v.const_value is None), None)
