"""Bring every attention core of a graph into one form, and count.

TensorRT compiles the 4-D form into fewer kernels (docs/performance.md), and it is the form in which
cores are matched.

Opset 11 and 12 have no LayerNormalization, and their Softmax flattens its input; exporters that do
not know the rank write it as Exp, ReduceSum and Div. torch below opset 23 transposes keys by way of
three axes. ``write_plainly`` recognises each by what it computes, never by a name.

Shapes: ``b`` batch, ``n`` tokens, ``h`` heads, ``d`` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.errors import FusionError
from msn_export.graph.attention import (
    HEADS_FIRST,
    KEYS_FROM_TOKENS,
    KEYS_TRANSPOSED,
    AttentionCore,
    match,
)
from msn_export.graph.builder import (
    GraphBuilder,
    constant_of,
    only_reader,
    permuted,
    producer_of,
    replace,
    sizes_of,
)
from msn_export.graph.io import infer_shapes
from msn_export.graph.precision import is_quantised_core
from msn_export.spec import AttentionForm

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
    rows, result = softmax.inputs[0], softmax.outputs[0]
    columns = sizes_of(rows)
    if rows is None or len(columns) != 2 or softmax.attributes.get_int("axis", -1) not in {-1, 1}:
        return False
    flat, back = rows.producer(), only_reader(result, "Reshape")
    if flat is None or flat.op_type not in {"Reshape", "Flatten"} or flat.inputs[0] is None:
        return False
    if back is None or result.is_graph_output():
        return False
    scores = flat.inputs[0]
    before, after = sizes_of(scores), sizes_of(back.outputs[0])
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
    merged = producer_of(permuted(reshape.inputs[0], (0, 2, 1)), "Reshape")
    if merged is None or merged.inputs[0] is None:
        return False
    keys, sizes = merged.inputs[0], sizes_of(reshape.outputs[0])
    if len(sizes) != 4 or sizes_of(merged.outputs[0])[1:] != [sizes[3], sizes[2]]:
        return False
    heads, size, tokens = sizes[1:]
    if heads is None or size is None or tokens is None:
        return False
    builder = GraphBuilder(graph, reshape)
    if sizes_of(keys)[1:] != [heads, tokens, size]:
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
        exponent = constant_of(power.inputs[1])
        return power.inputs[0] is of and exponent is not None and bool((exponent == 2).all())
    product = producer_of(value, "Mul")
    return product is not None and all(operand is of for operand in product.inputs)


def _with_vector(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Separate an operand from the constant of one axis that is added to it or multiplies it."""
    for value, held in (node.inputs[:2], node.inputs[1::-1]):
        if value is not None and held is not None and held.const_value is not None:
            last = sizes_of(value)[-1:]
            if sizes_of(held) == last and last != [None]:
                return value, held
    return None, None


def _with_number(node: ir.Node) -> tuple[ir.Value | None, float | None]:
    for value, held in (node.inputs[:2], node.inputs[1::-1]):
        constant = constant_of(held)
        if value is not None and constant is not None and constant.size == 1:
            return value, float(constant.reshape(()))
    return None, None


_REWRITES = {
    "Add": _layer_norm,
    "Div": _softmax_of_parts,
    "Reshape": _keys_of_three_axes,
    "Softmax": _softmax_of_rows,
}


def _over_last(reduction: ir.Node) -> bool:
    """Check whether a reduction runs over the last axis alone and keeps it."""
    if not reduction.attributes.get_int("keepdims", 1):
        return False
    held = constant_of(reduction.inputs[1]) if len(reduction.inputs) > 1 else None
    axes = reduction.attributes.get_ints("axes", ()) if held is None else held.reshape(-1).tolist()
    return len(axes) == 1 and axes[0] in {-1, len(sizes_of(reduction.inputs[0])) - 1}


def attention_3d_to_4d(model: ir.Model) -> None:
    """Rewrite in place; an operator whose sizes are not known is left as it is."""
    changed = False
    for node in list(model.graph):
        operands = [value for value in node.inputs[:3] if value is not None]
        if node.op_type != "Attention" or len(operands) != 3 or len(node.outputs) != 1:
            continue
        heads = node.attributes.get_int("q_num_heads", 0)
        sizes = [_tokens_and_width(value) for value in operands]
        divides = heads and all(n and w and w % heads == 0 for n, w in sizes)
        if divides and heads == node.attributes.get_int("kv_num_heads", 0):
            _rewrite(model.graph, node, operands, heads)
            changed = True
    if changed:
        RemoveUnusedNodesPass()(model)
        infer_shapes(model)


def _rewrite(graph: ir.Graph, node: ir.Node, operands: Sequence[ir.Value], heads: int) -> None:
    sizes = [_tokens_and_width(value) for value in operands]
    tokens, width = sizes[0]
    builder = GraphBuilder(graph, node)
    apart = _packed_apart(builder, operands, heads) or [
        _apart(builder, value, n, heads, w // heads)
        for value, (n, w) in zip(operands, sizes, strict=True)
    ]
    # onnx.ai operators, Attention: scale is 1 / sqrt(d) where it is left out
    attributes = {"scale": node.attributes.get_float("scale", (width // heads) ** -0.5)}
    attributes |= {
        name: attribute.value
        for name, attribute in node.attributes.items()
        if name not in {"q_num_heads", "kv_num_heads", "scale"}
    }
    attended = builder.op("Attention", [*apart, *node.inputs[3:]], attributes)
    tokens_first = builder.op("Transpose", [attended], {"perm": HEADS_FIRST})
    width = sizes[2][1]
    replace(node.outputs[0], builder.reshape(tokens_first, tokens, width))


def _packed_apart(
    builder: GraphBuilder, operands: Sequence[ir.Value], heads: int
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
    apart = _apart(builder, packed, tokens, 3 * heads, width // heads)
    return builder.ops("Split", [apart], {"axis": 1, "num_outputs": 3}, outputs=3)


def _apart(builder: GraphBuilder, value: ir.Value, tokens: int, rows: int, size: int) -> ir.Value:
    """[b, n, rows * size] -> [b, rows, n, size]."""
    reshaped = builder.reshape(value, tokens, rows, size)
    return builder.op("Transpose", [reshaped], {"perm": HEADS_FIRST})


def _tokens_and_width(value: ir.Value) -> tuple[int, int]:
    """Read n and h * d off [b, n, h * d]; zeros where they are not known."""
    _, tokens, width = sizes if len(sizes := sizes_of(value)) == 3 else (0, 0, 0)
    return (tokens, width) if tokens and width else (0, 0)


# b batch, h heads, n tokens, d head size


def fuse_attention(
    model: ir.Model,
    form: AttentionForm,
    *,
    expected: int | None = None,
    partial: bool = False,
    notes: list[str] | None = None,
) -> int:
    """Write every attention core of ``model`` in ``form``, in place.

    Args:
        model: changed in place.
        form: how each core is written.
        expected: how many cores there must be; None takes as many as there are softmaxes.
        partial: leave a core that is not recognised as it is; else each must be.
        notes: receives notes on cores that were left, or that compute otherwise than written.

    Returns:
        How many cores there are; with ``partial``, also those that were left.
    """
    attention_3d_to_4d(model)
    write_plainly(model)
    candidates = [node for node in model.graph if _may_be_core(node)]
    if not candidates:
        raise FusionError(
            "the graph has no Softmax and no Attention; expected a vision transformer"
        )
    # a quantised core has the one form in which it is fused: it counts, and stays
    quantised = sum(is_quantised_core(node) for node in candidates)
    cores, misses = [], []
    for node in candidates:
        if is_quantised_core(node):
            continue
        core = match(node)
        if isinstance(core, str):
            misses.append(f"{node.op_type} of {node.outputs[0].name!r}: {core}")
        else:
            cores.append(core)
    wanted = len(candidates) if expected is None else expected
    count = len(cores) + quantised
    found = [f"attention left as it is: {miss}" for miss in misses if partial]
    widened = sum(core.widened for core in cores)
    if widened and form is not AttentionForm.PLAIN:
        found.append(
            f"softmax of {widened} attention cores was written in fp32 beside half precision; the "
            "fused operator computes it in its own precision"
        )
    if notes is not None:
        notes += found
    if not partial and (misses or count != wanted or not count):
        listed = "; ".join(misses) or "there is no other Softmax or Attention"
        raise FusionError(f"fused {count} of {wanted} attention cores: {listed}")
    for core in cores:
        _WRITERS[form](model.graph, core)
    RemoveUnusedNodesPass()(model)
    infer_shapes(model)
    return len(candidates) if partial else count


def attention_form(model: ir.Model) -> AttentionForm:
    for node in model.graph:
        if node.op_type == "Attention":
            packed = "q_num_heads" in node.attributes
            return AttentionForm.PACKED if packed else AttentionForm.HEADS
    return AttentionForm.PLAIN


def _may_be_core(node: ir.Node) -> bool:
    """Every Attention, and every Softmax whose probabilities multiply something.

    Those of a classifier are an output, and so is a map of attention.
    """
    if node.op_type != "Softmax":
        return node.op_type == "Attention"
    behind, seen = [node], {node}
    while behind:
        for user, _ in behind.pop().outputs[0].uses():
            if user.op_type in _MULTIPLIES:
                return True
            if user not in seen and user.outputs:
                seen.add(user)
                behind.append(user)
    return False


_MULTIPLIES = frozenset({"MatMul", "Gemm", "Einsum", "Conv"})


def _write_heads(graph: ir.Graph, core: AttentionCore) -> None:
    """One Attention over q, k, v [b, h, n, d]."""
    if core.node.op_type == "Attention" and len(core.node.inputs) == 3:
        return
    builder = GraphBuilder(graph, core.node)
    keys = core.k
    if core.tokens_first or core.transposed:
        swap = HEADS_FIRST if core.tokens_first else KEYS_TRANSPOSED
        keys = builder.op("Transpose", [core.k], {"perm": swap})
    _replace(core, builder, builder.op("Attention", [core.q, keys, core.v], {"scale": core.scale}))


def _write_plain(graph: ir.Graph, core: AttentionCore) -> None:
    """MatMul, Softmax, MatMul; half of the scale on q and half on k, so that fp16 has room."""
    builder = GraphBuilder(graph, core.node)
    dtype = core.q.dtype.numpy() if core.q.dtype is not None else np.float32
    half = builder.constant(np.asarray(np.sqrt(core.scale), dtype), "attention.scale")
    keys = core.k
    if not core.transposed:
        swap = KEYS_FROM_TOKENS if core.tokens_first else KEYS_TRANSPOSED
        keys = builder.op("Transpose", [core.k], {"perm": swap})
    keys = builder.op("Mul", [keys, half])
    scores = builder.op("MatMul", [builder.op("Mul", [core.q, half]), keys])
    probabilities = builder.op("Softmax", [scores], {"axis": -1})
    _replace(core, builder, builder.op("MatMul", [probabilities, core.v]))


def _replace(core: AttentionCore, builder: GraphBuilder, result: ir.Value) -> None:
    """Put ``result``, which is of the operands' type, in place of what the core gave."""
    wanted = core.output.dtype
    if core.q.dtype is not None and wanted is not None and wanted != core.q.dtype:
        result.type, result.shape = ir.TensorType(core.q.dtype), core.output.shape
        result = builder.cast(result, wanted)
    replace(core.output, result)


def _write_packed(graph: ir.Graph, core: AttentionCore) -> None:
    """One Attention over q, k, v [b, n, h * d], which needs no transposition at all.

    The Reshape, Transpose and Split between a projection and the core, and the Transpose and
    Reshape after it, give way to one Split of the projection.
    """
    merged = _merged_heads(core.output)
    heads = core.q.shape[1] if core.q.shape is not None else None
    builder = GraphBuilder(graph, core.node)
    splits: dict[ir.Value, Sequence[ir.Value]] = {}
    operands = [_heads_together(builder, value, splits) for value in (core.q, core.k, core.v)]
    if (
        core.tokens_first
        or core.transposed
        or merged is None
        or None in operands
        or not isinstance(heads, int)
    ):
        raise FusionError(
            f"attention {core.output.name!r} does not read one packed query-key-value projection; "
            "choose --target tensorrt"
        )
    attributes = {"q_num_heads": heads, "kv_num_heads": heads, "scale": core.scale}
    replace(merged, builder.op("Attention", operands, attributes))


def _heads_together(
    builder: GraphBuilder, value: ir.Value, splits: dict[ir.Value, Sequence[ir.Value]]
) -> ir.Value | None:
    """Find the [b, n, h * d] tensor whose heads were set apart to give ``value`` [b, h, n, d]."""
    split = producer_of(value, "Split")
    if split is None:
        return _before_heads(value)
    packed = _before_heads(split.inputs[0])
    if packed is None or split.attributes["axis"].as_int() != 1:
        return None
    if packed not in splits:
        parts = len(split.outputs)
        attributes = {"axis": -1, "num_outputs": parts}
        splits[packed] = builder.ops("Split", [packed], attributes, outputs=parts)
    return splits[packed][list(split.outputs).index(value)]


def _before_heads(value: ir.Value | None) -> ir.Value | None:
    reshape = producer_of(permuted(value, HEADS_FIRST), "Reshape")
    return None if reshape is None else reshape.inputs[0]


def _merged_heads(output: ir.Value) -> ir.Value | None:
    """Find the [b, n, h * d] tensor that the core's [b, h, n, d] becomes."""
    transpose = only_reader(output, "Transpose")
    if transpose is None or tuple(transpose.attributes["perm"].as_ints()) != HEADS_FIRST:
        return None
    reshape = only_reader(transpose.outputs[0], "Reshape")
    return None if reshape is None else reshape.outputs[0]


_WRITERS: dict[AttentionForm, Callable[[ir.Graph, AttentionCore], None]] = {
    AttentionForm.HEADS: _write_heads,
    AttentionForm.PACKED: _write_packed,
    AttentionForm.PLAIN: _write_plain,
}
