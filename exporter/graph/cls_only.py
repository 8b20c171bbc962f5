"""Compute only what the outputs need: the last block for the [CLS] token alone.

An output that reads one token of the final LayerNorm needs keys and values of every token, and
of everything else in the last block one row. The result is the same numbers: each row of a
token-wise operator depends on that row only.

Shapes: ``b`` batch, ``n`` tokens, ``h`` heads, ``d`` head size, ``c`` channels.
"""

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.graph.attention import HEADS_FIRST
from msn_export.graph.builder import (
    GraphBuilder,
    array_of,
    constant_of,
    operand,
    permuted,
    producer_of,
    sizes_of,
)
from msn_export.graph.io import infer_shapes

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
        return operand(self.product, 1)


def find_packed(split: ir.Node | None) -> PackedProjection | None:
    """Match the projection behind a Split into q, k and v."""
    if split is None or split.op_type != "Split" or len(split.outputs) != 3:
        return None
    transpose = _only_producer(split.inputs[0], "Transpose")
    reshape = _only_producer(permuted(split.inputs[0], HEADS_FIRST), "Reshape")
    if transpose is None or reshape is None:
        return None
    added = _only_producer(reshape.inputs[0], "Add")
    bias = _constant_of(added)
    product = _only_producer(reshape.inputs[0] if added is None else _variable_of(added), "MatMul")
    if product is None or product.inputs[0] is None or product.inputs[1] is None:
        return None
    if product.inputs[1].const_value is None or (added is not None and bias is None):
        return None
    return PackedProjection(product.inputs[0], product, bias, reshape, split)


def split_queries(graph: ir.Graph) -> None:
    """Project queries for the first token alone, where only its query is read."""
    for node in graph:
        if node.op_type != "Slice" or node.inputs[0] is None:
            continue
        split = node.inputs[0].producer()
        packed = find_packed(split)
        if packed is None or node.inputs[0] is not packed.split.outputs[0]:
            continue
        if len(node.inputs[0].uses()) == 1:
            _rewrite(graph, packed, node)
            return


def _rewrite(graph: ir.Graph, packed: PackedProjection, sliced: ir.Node) -> None:
    weight = array_of(packed.weight)
    bias = constant_of(packed.bias)
    tokens, rows, size = array_of(operand(packed.reshape, 1)).tolist()[1:]
    dim, heads = weight.shape[1] // 3, rows // 3
    builder = GraphBuilder(graph, packed.product)
    zero, one = builder.constant([0], "index.0"), builder.constant([1], "index.1")
    first = builder.op("Slice", [packed.x, zero, one, one])
    base = (packed.weight.name or "qkv").removesuffix(".weight")

    def project(x: ir.Value, columns: slice, name: str, shape: tuple[int, ...]) -> ir.Value:
        held = builder.constant(weight[:, columns], f"{base}.{name}.weight")
        y = builder.op("MatMul", [x, held])
        if bias is not None:
            y = builder.op("Add", [y, builder.constant(bias[columns], f"{base}.{name}.bias")])
        return builder.op("Transpose", [builder.reshape(y, *shape)], {"perm": HEADS_FIRST})

    q = project(first, slice(0, dim), "q", (1, heads, size))
    kv = project(packed.x, slice(dim, 3 * dim), "kv", (tokens, 2 * heads, size))
    k, v = builder.ops("Split", [kv], {"axis": 1, "num_outputs": 2}, outputs=2)
    for old, new in ((sliced.outputs[0], q), (packed.split.outputs[1], k),
                     (packed.split.outputs[2], v)):  # fmt: skip
        new.type = old.type
        old.replace_all_uses_with(new)


def _only_producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = producer_of(value, op_type)
    return node if node is not None and len(node.outputs[0].uses()) == 1 else None


def _constant_of(added: ir.Node | None) -> ir.Value | None:
    operands = [] if added is None else added.inputs
    return next((v for v in operands if v is not None and v.const_value is not None), None)


def _variable_of(added: ir.Node) -> ir.Value | None:
    return next((v for v in added.inputs if v is not None and v.const_value is None), None)


_ROWWISE = frozenset(
    """
    Abs Add Cast Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish Identity LeakyRelu Log Max Min
    Mish Mul Neg Pow Reciprocal Relu Sigmoid Softplus Softsign Sqrt Sub Tanh Where Greater Less
    """.split()  # noqa: SIM905
)


def narrow_to_first_token(model: ir.Model, *, split_projection: bool = True) -> int:
    """Rewrite in place; a graph whose outputs read more than the first token is left alone.

    Args:
        model: changed in place.
        split_projection: take queries out of the packed projection too, and compute one; fewer
            multiply-adds, one matrix product more.

    Returns:
        How many nodes now compute one row instead of all tokens.
    """
    infer_shapes(model)
    chosen = _rows_needed(model.graph)
    if not chosen:
        return 0
    cut: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in list(model.graph):
        if node in chosen:
            _take_rows(model.graph, node, chosen, cut)
    if split_projection:
        split_queries(model.graph)
    RemoveUnusedNodesPass()(model)
    infer_shapes(model)
    return len(chosen)


def _rows_needed(graph: ir.Graph) -> dict[ir.Node, int]:
    """Find the nodes of whose result only the first row is read, each with the axis of tokens."""
    chosen: dict[ir.Node, int] = {}
    for node in reversed(graph):
        axis = _selected_axis(node, chosen)
        if axis is not None:
            chosen[node] = axis
    return chosen


def _selected_axis(node: ir.Node, chosen: dict[ir.Node, int]) -> int | None:
    if len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return None
    axes = {_axis_read(use.node, use.idx, chosen) for use in node.outputs[0].uses()}
    if len(axes) != 1 or (axis := axes.pop()) is None:
        return None
    return axis if _passes_rows(node, axis) else None


def _axis_read(reader: ir.Node, index: int, chosen: dict[ir.Node, int]) -> int | None:
    """Find the axis along which ``reader`` takes only the first row of its input, if it does."""
    if _takes_first(reader) and index == 0:
        return 1
    if reader not in chosen:
        return None
    axis = chosen[reader]
    if reader.op_type == "Transpose":
        return int(reader.attributes["perm"].as_ints()[axis])
    if reader.op_type in {"MatMul", "LayerNormalization", "Reshape", "Attention"} and index > 0:
        return None  # weights, shapes, keys and values are read whole
    return axis


def _takes_first(node: ir.Node) -> bool:
    """Check whether a node reads row 0 of axis 1 and nothing else."""
    if node.op_type == "Gather":
        indices = constant_of(node.inputs[1])
        at_tokens = node.attributes.get_int("axis", 0) == 1
        return at_tokens and indices is not None and not indices.any()
    if node.op_type == "Slice" and len(node.inputs) >= 4:
        bounds = [constant_of(value) for value in node.inputs[1:4]]
        return [None if b is None else b.tolist() for b in bounds] == [[0], [1], [1]]
    return False


def _passes_rows(node: ir.Node, axis: int) -> bool:
    """Check whether row 0 of the output along ``axis`` depends on row 0 of the input alone."""
    shape = node.outputs[0].shape
    if shape is None or axis >= len(shape) - 1:
        return False
    if node.op_type == "MatMul":
        right = node.inputs[1]
        return right is not None and right.const_value is not None and len(right.shape or ()) == 2
    if node.op_type == "LayerNormalization":
        return node.attributes["axis"].as_int() in {-1, len(shape) - 1}
    if node.op_type == "Attention":
        return axis == 2 and len(shape) == 4 and len(node.inputs) == 3
    if node.op_type == "Transpose":
        return tuple(node.attributes["perm"].as_ints()) == HEADS_FIRST
    if node.op_type == "Reshape":
        return _merges_last(node) and axis == 1
    return node.op_type in _ROWWISE


def _merges_last(node: ir.Node) -> bool:
    """Check whether a Reshape is [b, n, h, d] -> [b, n, h * d] with a constant shape."""
    sizes, target = sizes_of(node.inputs[0]), constant_of(node.inputs[1])
    return len(sizes) == 4 and target is not None and len(target) == 3 and sizes[1] == target[1]


def _take_rows(
    graph: ir.Graph,
    node: ir.Node,
    chosen: dict[ir.Node, int],
    cut: dict[tuple[ir.Value, int], ir.Value],
) -> None:
    """Feed ``node`` rows instead of tokens where its producers do not already give rows."""
    axis = chosen[node]
    sizes = list(node.outputs[0].shape or ())
    rank, sizes[axis] = len(sizes), 1
    node.outputs[0].shape = ir.Shape(sizes)
    for index, value in enumerate(node.inputs):
        if value is None or value.producer() in chosen:
            continue
        read = _axis_read(node, index, chosen)
        shape = value.shape
        if read is None or shape is None:
            continue
        position = read - rank + len(shape)  # broadcasting aligns the last axes
        # a weight has one value for every row
        weight = value.const_value is not None and node.op_type in {"MatMul", "LayerNormalization"}
        if position >= 0 and shape[position] != 1 and not weight:
            node.replace_input_with(index, _cut(graph, node, value, position, cut))
    if node.op_type == "Reshape":
        wanted = array_of(operand(node, 1)).copy()
        wanted[axis] = 1
        name = "x".join(str(size) for size in wanted.tolist()).replace("-1", "b")
        node.replace_input_with(1, GraphBuilder(graph).constant(wanted, f"shape.{name}"))


def _cut(
    graph: ir.Graph,
    node: ir.Node,
    value: ir.Value,
    axis: int,
    cut: dict[tuple[ir.Value, int], ir.Value],
) -> ir.Value:
    """Take row 0 of ``value`` along ``axis``, keeping the axis; once per value."""
    if (value, axis) not in cut:
        builder = GraphBuilder(graph, node)
        bounds = [builder.constant([number], f"index.{number}") for number in (0, 1, axis)]
        cut[value, axis] = builder.op("Slice", [value, *bounds])
    return cut[value, axis]
