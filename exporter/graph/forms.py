"""Write what exporters make of softmax, keys and LayerNorm in the one form that is matched later.

Opset 11 and 12 have no LayerNormalization, and their Softmax flattens its input; exporters that do
not know the rank write it as Exp, ReduceSum and Div. torch below opset 23 transposes keys by way of
three axes. Each is recognised by what it computes, never by a name.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.graph.builder import GraphBuilder, producer_of, replace
from msn_export.graph.io import infer_shapes

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
