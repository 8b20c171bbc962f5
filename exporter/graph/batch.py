"""Show from a graph's operators that no image of a batch changes another's result.

Axis 0 of each value that depends on the images has to count them, node after node: then row i of
every output depends on image i alone, whatever the size of the batch is. An operator that is not
listed here, or whose axes are computed, is not shown to keep the images apart; it may do so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import suppress

import onnx_ir as ir

from msn_export.errors import GraphError
from msn_export.graph import io
from msn_export.graph.builder import constant_of, sizes_of

# Operators' definitions: onnx.ai/onnx/operators
_BROADCASTING = frozenset(
    ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "Where", "PRelu",
     "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Not",
     "Abs", "Neg", "Exp", "Log", "Sqrt", "Reciprocal", "Sign", "Floor", "Ceil", "Round",
     "Erf", "Tanh", "Sigmoid", "Gelu", "Relu", "LeakyRelu", "Elu", "Celu", "Selu", "Clip",
     "HardSigmoid", "HardSwish", "Mish", "Softplus", "Softsign", "Swish", "ThresholdedRelu",
     "Cast", "Identity")
)  # fmt: skip


def find_mixing(model: ir.Model) -> str:
    """Name the first node that is not shown to keep the images apart; nothing where all are.

    The graph needs one input, and the shapes that inference gives its values. A fixed batch is
    looked at as an open one: a size alone does not say which axis counts images.
    """
    taken = [value for value in model.graph.inputs if not value.is_initializer()]
    if len(taken) != 1 or not sizes_of(taken[0]):
        return "the graph takes other than one input of images"
    if sizes_of(taken[0])[0] is not None:
        return find_mixing(_opened(model))
    images = set(taken)
    for node in model.graph:
        rule = _RULES.get(node.op_type)
        plain = node.domain == "" and not any(map(_is_graph, node.attributes.values()))
        if not plain or (images.intersection(node.inputs) and not (rule and rule(node, images))):
            return f"{node.op_type} {node.name!r}"
        if images.intersection(node.inputs):
            images.update(node.outputs)
    constant = [value.name for value in model.graph.outputs if value not in images]
    return f"output {constant[0]!r} does not depend on the images" if constant else ""


def _opened(model: ir.Model) -> ir.Model:
    """Give a copy of a graph whose batch is open; values whose shape that leaves open have none."""
    copied = model.clone()
    for node in copied.graph:
        for value in node.outputs:
            value.shape = None
    (taken,) = (value for value in copied.graph.inputs if not value.is_initializer())
    taken.shape = ir.Shape([None, *sizes_of(taken)[1:]])
    with suppress(GraphError):
        io.infer_shapes(copied)
    return copied


def _is_graph(attribute: ir.Attr) -> bool:
    """Recognise a body: it reads values that its node does not list."""
    return attribute.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}


Images = Collection[ir.Value | None]


def _rank(value: ir.Value | None) -> int:
    """Count axes; 0 also where they are unknown, which no rule takes for images."""
    return len(sizes_of(value))


def _stays_behind(value: ir.Value | None, rank: int) -> bool:
    """Check that a constant, spread over ``rank`` axes, is the same for every image."""
    if value is None:
        return True
    if value.shape is None:
        return False
    sizes = sizes_of(value)
    return len(sizes) < rank or (len(sizes) == rank and sizes[0] == 1)


def _broadcast(node: ir.Node, images: Images) -> bool:
    ranks = {_rank(value) for value in node.inputs if value in images}
    (rank,) = ranks if len(ranks) == 1 else (0,)
    others = (value for value in node.inputs if value not in images)
    return rank > 0 and all(_stays_behind(value, rank) for value in others)


def _matmul(node: ir.Node, images: Images) -> bool:
    first, second = node.inputs
    ranks = _rank(first), _rank(second)
    if min(ranks) < 2:
        return False
    if first in images and second in images:
        return ranks[0] == ranks[1] >= 3
    if first in images:
        return ranks == (2, 2) or (ranks[0] >= 3 and _stays_behind(second, ranks[0]))
    return ranks[1] >= 3 and _stays_behind(first, ranks[1])


def _gemm(node: ir.Node, images: Images) -> bool:
    return (
        _only_first(node, images)
        and _rank(node.inputs[0]) == 2
        and not node.attributes.get_int("transA", 0)
        and (len(node.inputs) < 3 or _stays_behind(node.inputs[2], 2))
    )


def _only_first(node: ir.Node, images: Images) -> bool:
    """Check that the images are the first operand and all others constants."""
    return node.inputs[0] in images and not any(value in images for value in node.inputs[1:])


def _conv(node: ir.Node, images: Images) -> bool:
    return _only_first(node, images) and _rank(node.inputs[0]) >= 3


def _attention(node: ir.Node, images: Images) -> bool:
    operands = [value for value in node.inputs if value is not None]
    ranks = {_rank(value) for value in operands}
    return len(operands) == 3 and all(value in images for value in operands) and ranks <= {3, 4}


def _over(default: int) -> Callable[[ir.Node, Images], bool]:
    """Make the rule of operators along the one axis that an attribute names."""

    def rule(node: ir.Node, images: Images) -> bool:
        axis, rank = node.attributes.get_int("axis", default), _rank(node.inputs[0])
        within = 0 < (axis + rank if axis < 0 else axis) < rank
        return within and _only_first(node, images)

    return rule


def _normalise(node: ir.Node, images: Images) -> bool:
    rank = _rank(node.inputs[0])
    return _over(-1)(node, images) and all(_stays_behind(value, rank) for value in node.inputs[1:])


def _concat(node: ir.Node, images: Images) -> bool:
    ranks = {_rank(value) for value in node.inputs}
    (rank,) = ranks if len(ranks) == 1 else (0,)
    axis = node.attributes.get_int("axis", 0)
    return all(value in images for value in node.inputs) and axis % max(rank, 1) > 0


def _quantise(node: ir.Node, images: Images) -> bool:
    scale = node.inputs[1]
    if not _only_first(node, images) or scale is None or scale.shape is None:
        return False
    if node.attributes.get_int("block_size", 0) or len(scale.shape) > 1:
        return False
    return sizes_of(scale) in ([], [1]) or _over(1)(node, images)


def _axes(node: ir.Node, index: int, rank: int) -> list[int] | None:
    """Give the axes of an input or, in older opsets, an attribute; None where not constant."""
    given = node.attributes.get("axes")
    if given is not None:
        return [axis % rank for axis in given.as_ints()]
    held = constant_of(node.inputs[index]) if len(node.inputs) > index else None
    return None if held is None else [int(axis) % rank for axis in held.reshape(-1)]


def _along(index: int) -> Callable[[ir.Node, Images], bool]:
    """Make the rule of operators along several axes, their input ``index``."""

    def rule(node: ir.Node, images: Images) -> bool:
        rank = _rank(node.outputs[0] if node.op_type == "Unsqueeze" else node.inputs[0])
        axes = _axes(node, index, rank) if rank else None
        return _only_first(node, images) and bool(axes) and 0 not in (axes or ())

    return rule


def _pad(node: ir.Node, images: Images) -> bool:
    rank = _rank(node.inputs[0])
    pads = constant_of(node.inputs[1]) if len(node.inputs) in {2, 3} else None
    if not _only_first(node, images) or pads is None or len(pads) != 2 * rank:
        return False
    return bool(pads[0] == 0 and pads[rank] == 0)


def _transpose(node: ir.Node, images: Images) -> bool:
    order = node.attributes.get("perm")
    return _only_first(node, images) and order is not None and order.as_ints()[:1] == (0,)


def _reshape(node: ir.Node, images: Images) -> bool:
    """Check that an image's numbers stay in one row: ``[b, …]`` to ``[b, …]`` of as many."""
    held, sizes = constant_of(node.inputs[1]), sizes_of(node.inputs[0])[1:]
    given = [size for size in sizes if size is not None]
    if held is None or not _only_first(node, images) or len(given) < len(sizes) or not held.size:
        return False
    first, *rest = held.reshape(-1).tolist()
    row = math.prod(given)
    if node.attributes.get_int("allowzero", 0) or 0 in rest or row == 0:
        return False
    if first == 0 and rest.count(-1) == 1:
        return row % math.prod(int(size) for size in rest if size != -1) == 0
    return first in {0, -1} and -1 not in rest and math.prod(map(int, rest)) == row


def _expand(node: ir.Node, images: Images) -> bool:
    held, rank = constant_of(node.inputs[1]), _rank(node.inputs[0])
    if held is None or not _only_first(node, images):
        return False
    return len(held) < rank or (len(held) == rank and held[0] == 1)


def _flatten(node: ir.Node, images: Images) -> bool:
    return _only_first(node, images) and node.attributes.get_int("axis", 1) == 1


_RULES: dict[str, Callable[[ir.Node, Images], bool]] = {
    **dict.fromkeys(_BROADCASTING, _broadcast),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _normalise),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _over(-1)),
    **dict.fromkeys(("Split", "Gather"), _over(0)),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"), _along(1)),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _along(1)),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _quantise),
    "Slice": _along(3),
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Attention": _attention,
    "Concat": _concat,
    "Pad": _pad,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Expand": _expand,
    "Flatten": _flatten,
}
