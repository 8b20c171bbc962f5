"""Write a graph in another arithmetic than its own, to run it where its own has no kernels.

* ``emulate_bf16``: fp32 arithmetic with every bf16 result rounded. onnxruntime's CPU provider has
  no bf16 Conv, MatMul or Attention; a kernel that accumulates in fp32 and writes bf16 computes
  that.
* ``round_values``: an fp32 graph whose every result is rounded to fp16 or bf16, as an engine
  rounds what each kernel writes.
* ``widen``: the fp32 function that a typed or quantised graph approximates.
* ``in_fp64``: what an fp32 graph computes without fp32's own rounding.
* ``emulate_attention``: attention as TensorRT-RTX's fused kernels compute it, in plain operators.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.errors import GraphError
from msn_export.graph.attention import AttentionCore, match
from msn_export.graph.builder import GraphBuilder, constant_of, operand, producer, replace
from msn_export.graph.io import infer_shapes
from msn_export.graph.precision import MOVES
from msn_export.spec import Dtype

_MOVES = MOVES - {"Cast"}  # a rounded value stays rounded
_BF16, _FLOAT, _DOUBLE = ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE
_HALVES = {Dtype.FP16: ir.DataType.FLOAT16, Dtype.BF16: _BF16}
_NUMPY = {Dtype.FP16: np.float16, Dtype.BF16: ml_dtypes.bfloat16}


def has_bf16(model: ir.Model) -> bool:
    return any(value.dtype == _BF16 for value in model.graph.initializers.values())


def emulate_bf16(model: ir.Model) -> ir.Model:
    copy = model.clone()
    builder = GraphBuilder(copy.graph)
    for value in copy.graph.initializers.values():
        if value.dtype == _BF16 and value.const_value is not None:
            _store(value, value.const_value.numpy().astype(np.float32))
    for node in list(copy.graph):
        rounded = [value for value in node.outputs if value.dtype == _BF16]
        for value in rounded:
            value.type = ir.TensorType(_FLOAT)
        if node.op_type == "Cast" and rounded:
            node.attributes["to"] = ir.AttrInt64("to", int(_FLOAT))
        if node.op_type not in _MOVES:
            for value in rounded:
                _round(builder, node, value, _BF16)
    infer_shapes(copy)
    return copy


def round_values(model: ir.Model, dtype: Dtype, kept: Collection[str] = ()) -> ir.Model:
    """Copy an fp32 graph as one whose weights and every result are rounded to ``dtype``.

    What a value is rounded to is written out here and not by ``type_graph``: the two can be held
    against each other. Values named in ``kept`` stay as they are (fp32 islands).
    """
    copy = model.clone()
    infer_shapes(copy)
    builder = GraphBuilder(copy.graph)
    for name, value in copy.graph.initializers.items():
        if value.dtype == _FLOAT and value.const_value is not None and name not in kept:
            with np.errstate(over="ignore"):
                rounded = value.const_value.numpy().astype(_NUMPY[dtype])
            _store(value, rounded.astype(np.float32))
    for node in list(copy.graph):
        if node.op_type in MOVES:
            continue
        for value in list(node.outputs):
            if value.dtype == _FLOAT and value.name not in kept:
                _round(builder, node, value, _HALVES[dtype])
    return copy


def _round(builder: GraphBuilder, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> None:
    builder.after(node)
    half = builder.cast(value, dtype, f"{value.name}.half")
    replace(value, builder.cast(half, _FLOAT, f"{value.name}.rounded"))
    producer(half).replace_input_with(0, value)


def widen(model: ir.Model) -> ir.Model:
    """Copy a graph as the fp32 function of its weights: no 8 bits, no half precision.

    A Q/DQ pair passes on what it is given, an 8-bit weight becomes the float it stands for.
    """
    copy = model.clone()
    infer_shapes(copy)
    _strip_quantisation(copy)
    _retype(copy, {ir.DataType.FLOAT16, _BF16}, _FLOAT)
    RemoveUnusedNodesPass()(copy)
    return copy


def _strip_quantisation(model: ir.Model) -> None:
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            continue
        held, written = node.inputs[0], node.inputs[0].producer()
        if held.is_initializer() and held.const_value is not None:
            builder = GraphBuilder(model.graph)
            weight = builder.constant(_dequantised(node), f"{held.name}.widened")
            replace(node.outputs[0], weight)
            weight.type = ir.TensorType(_FLOAT)
        elif written is not None and written.op_type == "QuantizeLinear" and written.inputs[0]:
            replace(node.outputs[0], written.inputs[0])
    RemoveUnusedNodesPass()(model)


def _dequantised(node: ir.Node) -> np.ndarray:
    """Compute (x - zero point) * scale: onnx.ai operators, DequantizeLinear."""
    held, scale, *rest = map(constant_of, node.inputs)
    if held is None or scale is None:
        raise GraphError(f"node {node.name!r} has a scale that is not constant")
    values = held.astype(np.float32)
    axis = node.attributes.get_int("axis", 1)
    shape = [1] * values.ndim
    if scale.ndim == 1 and values.ndim:
        shape[axis] = -1
    zero = rest[0] if rest else None
    if zero is not None:
        values = values - zero.astype(np.float32).reshape(shape if zero.ndim else ())
    return values * scale.astype(np.float32).reshape(shape if scale.ndim else ())


def in_fp64(model: ir.Model) -> ir.Model:
    """Copy an fp32 graph as one that computes in fp64; it takes what the graph takes.

    onnxruntime's CPU provider has no fp64 Conv and Erf: a convolution whose patches do not overlap
    is written as a matrix product, and Erf stays fp32, whose error is that of one rounding.
    """
    copy = model.clone()
    infer_shapes(copy)
    images = copy.graph.inputs[0]
    taken = images.dtype
    _retype(copy, {_FLOAT}, _DOUBLE)
    images.type = ir.TensorType(taken) if taken is not None else None
    if taken == _FLOAT:
        widened = GraphBuilder(copy.graph, copy.graph[0]).cast(images, _DOUBLE)
        cast = widened.producer()
        for use in list(images.uses()):
            if use.node is not cast:
                use.node.replace_input_with(use.idx, widened)
    for node in list(copy.graph):
        builder = GraphBuilder(copy.graph, node)
        if node.op_type == "Conv":
            replace(node.outputs[0], _as_product(builder, node))
        elif node.op_type == "Gelu" and node.attributes.get_string("approximate", "none") == "none":
            replace(node.outputs[0], _exact_gelu(builder, operand(node, 0)))
        elif node.op_type == "Erf":
            replace(node.outputs[0], _erf(builder, operand(node, 0)))
    RemoveUnusedNodesPass()(copy)
    infer_shapes(copy)
    return copy


def _erf(builder: GraphBuilder, x: ir.Value) -> ir.Value:
    return builder.cast(builder.op("Erf", [builder.cast(x, _FLOAT)]), _DOUBLE)


def _exact_gelu(builder: GraphBuilder, x: ir.Value) -> ir.Value:
    """Gelu as onnx.ai operators, Gelu, writes it: x / 2 * (1 + erf(x / sqrt(2)))."""
    root, one, half = (
        builder.constant(np.asarray(number, np.float64), f"fp64.{name}")
        for number, name in ((np.sqrt(0.5), "sqrt_half"), (1.0, "one"), (0.5, "half"))
    )
    bend = builder.op("Add", [_erf(builder, builder.op("Mul", [x, root])), one])
    return builder.op("Mul", [builder.op("Mul", [x, half]), bend])


def _as_product(builder: GraphBuilder, node: ir.Node) -> ir.Value:
    """Write a convolution [b, c, h, w] to [b, dim, rows, columns] as a product over its patches."""
    x, weight = node.inputs[:2]
    kernel = constant_of(weight)
    shape = list(x.shape or ()) if x is not None else []
    if kernel is None or kernel.ndim != 4 or len(shape) != 4 or not _is_patching(node, kernel):
        raise GraphError(f"node {node.name!r} is a convolution that has no fp64 form here")
    dim, channels, high, wide = kernel.shape
    height, width = shape[2:]
    if not isinstance(height, int) or not isinstance(width, int):
        raise GraphError(f"node {node.name!r} takes images of no fixed size")
    rows, columns = height // high, width // wide

    def reshaped(value: ir.Value, *sizes: int) -> ir.Value:
        name = "fp64.shape." + ".".join(map(str, sizes)).replace("-", "m")
        return builder.op("Reshape", [value, builder.constant(np.asarray(sizes, np.int64), name)])

    split = reshaped(x, -1, channels, rows, high, columns, wide)  # type: ignore[arg-type]
    moved = builder.op("Transpose", [split], {"perm": [0, 2, 4, 1, 3, 5]})
    patches = reshaped(moved, -1, rows * columns, channels * high * wide)
    matrix = builder.constant(kernel.reshape(dim, -1).T, f"{node.name}.fp64.weight")
    product = builder.op("MatMul", [patches, matrix])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        product = builder.op("Add", [product, node.inputs[2]])
    return reshaped(builder.op("Transpose", [product], {"perm": [0, 2, 1]}), -1, dim, rows, columns)


def _is_patching(node: ir.Node, kernel: np.ndarray) -> bool:
    strides = node.attributes.get_ints("strides", [1, 1])
    return (
        tuple(strides) == kernel.shape[2:]
        and not any(node.attributes.get_ints("pads", []))
        and all(step == 1 for step in node.attributes.get_ints("dilations", []))
        and node.attributes.get_int("group", 1) == 1
    )


def _retype(model: ir.Model, held: set[ir.DataType], to: ir.DataType) -> None:
    """Give every value, constant and cast of the types ``held`` another type, in place."""
    for value in _values(model):
        if value.dtype in held:
            if value.const_value is not None:
                _store(value, value.const_value.numpy().astype(to.numpy()))
            value.type = ir.TensorType(to)
    for node in model.graph:
        cast = node.attributes.get("to") if node.op_type == "Cast" else None
        if cast is not None and ir.DataType(cast.as_int()) in held:
            node.attributes["to"] = ir.AttrInt64("to", int(to))
        constant = node.attributes.get("value") if node.op_type.startswith("Constant") else None
        if constant is not None and constant.as_tensor().dtype in held:
            array = constant.as_tensor().numpy().astype(to.numpy())
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _store(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.tensor(np.asarray(array, order="C"), name=value.name)
    value.type = ir.TensorType(value.const_value.dtype)


KEYS = 32  # keys a step
WIDTH = 16  # numbers that a tensor core multiplies and adds at once
PEAKS = "attention peaks"

_DOMAIN = "msn_export.emulated"
_FLOAT_CODE, _FP16_CODE, _BF16_CODE = (
    int(getattr(ir.DataType, n)) for n in ("FLOAT", "FLOAT16", "BFLOAT16")
)
_NOTHING = -1e30  # a score whose exponential is 0; no infinity, whose differences are no numbers


@dataclass(frozen=True, slots=True)
class Emulated:
    """A copy of a graph whose attention is computed as the engine computes it.

    Its output ``PEAKS`` [b, 2 * len(nodes)] holds the largest absolute score of each of ``nodes``,
    then the largest absolute sum of probabilities times values; there is none without nodes.
    """

    model: ir.Model
    nodes: tuple[str, ...]


def emulate_attention(
    model: ir.Model, *, fp16: Collection[str] = (), bf16: Collection[str] = ()
) -> Emulated:
    """Copy a graph with ``Attention`` nodes as fused kernels compute them.

    Args:
        model: a graph with every value typed; not changed.
        fp16: nodes whose kernel sums in fp16.
        bf16: nodes whose kernel takes bf16 and sums in fp32.
    """
    copy = model.clone()
    infer_shapes(copy)
    builder = GraphBuilder(copy.graph)
    nodes = {node.name: node for node in copy.graph if node.op_type == "Attention"}
    peaks = []
    for name in (*fp16, *bf16):
        if name not in nodes:
            raise GraphError(f"the graph has no Attention node {name!r}")
        core = match(nodes[name])
        if isinstance(core, str):
            raise GraphError(f"attention {name!r} cannot be emulated: {core}")
        call = _call(copy, builder, core, name in bf16)
        if name not in bf16:
            peaks.append(call[1])
    if peaks:
        _show(builder.after(copy.graph[-1]), peaks)
    if fp16 or bf16:
        copy.graph.opset_imports[_DOMAIN] = 1
    return Emulated(copy, tuple(fp16))


def _call(
    model: ir.Model, builder: GraphBuilder, core: AttentionCore, is_bf16: bool
) -> Sequence[ir.Value]:
    """Put a call of an emulating function in the place of an Attention node."""
    *_, keys, size = core.k.shape or (None, None)
    if not isinstance(keys, int) or not isinstance(size, int):
        raise GraphError(f"attention {core.node.name!r} has no fixed number of tokens")
    dtype = int(core.output.dtype or ir.DataType.FLOAT)
    name = f"attention_{len(model.functions)}"
    text = (
        _bf16_text(name, core.scale, dtype)
        if is_bf16
        else _fp16_text(name, keys, size, core.scale, dtype)
    )
    function = ir.from_proto(onnx.parser.parse_function(text))
    model.functions[function.identifier()] = function
    outputs = builder.before(core.node).ops(
        name, [core.q, core.k, core.v], outputs=1 if is_bf16 else 2,
        name=f"{core.node.name}.emulated",
    )  # fmt: skip
    result = outputs[0]
    producer(result).domain = _DOMAIN
    result.type, result.shape = core.output.type, core.output.shape
    core.output.replace_all_uses_with(result, replace_graph_outputs=True)
    result.name, core.output.name = core.output.name, None
    if not is_bf16:
        outputs[1].name = builder.free(f"{core.node.name}.peaks")
    model.graph.remove(core.node, safe=True)
    return outputs


def _show(builder: GraphBuilder, peaks: list[ir.Value]) -> None:
    images = builder.graph.inputs[0]
    shape = [images.shape[0] if images.shape else None, 2 * len(peaks)]
    output = builder.op("Concat", peaks, {"axis": 1}, name=PEAKS)
    output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
    builder.graph.outputs.append(output)


def peaks_of(emulated: Emulated, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Give the largest score and sum of each of ``emulated.nodes``, [nodes, 2], over a batch."""
    found = np.asarray(outputs[PEAKS], np.float32).reshape(-1, len(emulated.nodes), 2)
    peaks: np.ndarray = found.max(axis=0)  # keeps NaN
    return peaks


def _root(scale: float, dtype: Dtype) -> str:
    """Spell the square root of the scale, as the kernel's own type holds it."""
    held = np.float16 if dtype is Dtype.FP16 else ml_dtypes.bfloat16
    return repr(float(held(np.sqrt(scale))))


def _round_text(old: str, new: str, to: int = _FP16_CODE) -> str:
    return (
        f"{new}_narrow = Cast <to = {to}> ({old})  {new} = Cast <to = {_FLOAT_CODE}> ({new}_narrow)"
    )


def _fp16_text(name: str, keys: int, size: int, scale: float, dtype: int) -> str:
    """Write flash attention with scores and sums in fp16 as an ONNX function."""
    steps = -(-keys // KEYS)
    widths = [min(WIDTH, size - start) for start in range(0, size, WIDTH)]
    parts = range(len(widths))
    last = len(widths) - 1
    mask = ", ".join("0.0" if i < keys else repr(_NOTHING) for i in range(steps * KEYS))
    products = "\n        ".join(
        f"t{i} = MatMul (q{i}, k{i})  u{i} = {f'Add (s{i - 1}, t{i})' if i else f'Identity (t{i})'}"
        f"  {_round_text(f'u{i}', f's{i}')}"
        for i in parts
    )
    return f"""
<opset_import: ["" : 23], domain: "{_DOMAIN}">
{name} (q, k, v) => (y, peaks)
{{
    root = Constant <value_float = {_root(scale, Dtype.FP16)}> ()
    widths = Constant <value_ints = {widths}> ()
    qf = Cast <to = {_FLOAT_CODE}> (q)  qm = Mul (qf, root)  {_round_text("qm", "qr")}
    kf = Cast <to = {_FLOAT_CODE}> (k)  km = Mul (kf, root)  {_round_text("km", "kr")}
    vf = Cast <to = {_FLOAT_CODE}> (v)
    {", ".join(f"q{i}" for i in parts)} = Split <axis = -1> (qr, widths)
    pads = Constant <value_ints = [0, 0, 0, 0, 0, 0, {steps * KEYS - keys}, 0]> ()
    kp = Pad (kr, pads)  vp = Pad (vf, pads)
    cut = Constant <value_ints = [0, 0, {steps}, {KEYS}, {size}]> ()
    kc = Reshape (kp, cut)  kt = Transpose <perm = [2, 0, 1, 4, 3]> (kc)
    vc = Reshape (vp, cut)  vt = Transpose <perm = [2, 0, 1, 3, 4]> (vc)
    mask = Constant <value = float[{steps},{KEYS}] {{{mask}}}> ()
    end = Constant <value_ints = [-1]> ()
    inner = Constant <value_ints = [1, 2, 3]> ()
    zero = Constant <value_float = 0.0> ()
    nothing = Constant <value_float = {_NOTHING}> ()
    row = ReduceSum (q0, end)
    total0 = Mul (row, zero)  top0 = Add (total0, nothing)  sum0 = Mul (qr, zero)
    peak0 = ReduceMax <keepdims = 1> (total0, inner)
    top, total, sum, score, most = Scan <num_scan_inputs = 3, body = step (
        float[b,h,m,1] top_in, float[b,h,m,1] total_in, float[b,h,m,{size}] sum_in,
        float[b,1,1,1] score_in, float[b,1,1,1] most_in,
        float[b,h,{size},{KEYS}] keys, float[b,h,{KEYS},{size}] values, float[{KEYS}] masked)
        => (float[b,h,m,1] top_out, float[b,h,m,1] total_out, float[b,h,m,{size}] sum_out,
            float[b,1,1,1] score_out, float[b,1,1,1] most_out)
    {{
        {", ".join(f"k{i}" for i in parts)} = Split <axis = -2> (keys, widths)
        {products}
        scores = Abs (u{last})  largest = ReduceMax <keepdims = 1> (scores, inner)
        score_out = Max (score_in, largest)
        s = Add (s{last}, masked)
        here = ReduceMax <keepdims = 1> (s, end)  top_out = Max (top_in, here)
        fallen = Sub (top_in, top_out)  fade = Exp (fallen)
        below = Sub (s, top_out)  p = Exp (below)
        ps = ReduceSum (p, end)  faded = Mul (total_in, fade)  total_out = Add (faded, ps)
        {_round_text("p", "pr")}
        halves = Constant <value_ints = [{WIDTH}, {KEYS - WIDTH}]> ()
        p0, p1 = Split <axis = -1> (pr, halves)  v0, v1 = Split <axis = -2> (values, halves)
        old = Mul (sum_in, fade)  {_round_text("old", "kept")}
        a0 = MatMul (p0, v0)  o0 = Add (kept, a0)  {_round_text("o0", "r0")}
        a1 = MatMul (p1, v1)  o1 = Add (r0, a1)  {_round_text("o1", "sum_out")}
        sums = Abs (o1)  most_here = ReduceMax <keepdims = 1> (sums, inner)
        most_out = Max (most_in, most_here)
    }}> (top0, total0, sum0, peak0, peak0, kt, vt, mask)
    yf = Div (sum, total)  {_round_text("yf", "yr")}  y = Cast <to = {dtype}> (yr)
    both = Concat <axis = 1> (score, most)
    flat = Constant <value_ints = [0, 2]> ()
    peaks = Reshape (both, flat)
}}
"""


def _bf16_text(name: str, scale: float, dtype: int) -> str:
    """Write attention of bf16 operands with sums in fp32 as an ONNX function."""
    return f"""
<opset_import: ["" : 23], domain: "{_DOMAIN}">
{name} (q, k, v) => (y)
{{
    root = Constant <value_float = {_root(scale, Dtype.BF16)}> ()
    qf = Cast <to = {_BF16_CODE}> (q)  qw = Cast <to = {_FLOAT_CODE}> (qf)
    kf = Cast <to = {_BF16_CODE}> (k)  kw = Cast <to = {_FLOAT_CODE}> (kf)
    vf = Cast <to = {_BF16_CODE}> (v)  vw = Cast <to = {_FLOAT_CODE}> (vf)
    qm = Mul (qw, root)  {_round_text("qm", "qr", _BF16_CODE)}
    km = Mul (kw, root)  {_round_text("km", "kr", _BF16_CODE)}
    kt = Transpose <perm = [0, 1, 3, 2]> (kr)
    s = MatMul (qr, kt)
    end = Constant <value_ints = [-1]> ()
    top = ReduceMax <keepdims = 1> (s, end)
    below = Sub (s, top)  p = Exp (below)
    total = ReduceSum (p, end)
    {_round_text("p", "pr", _BF16_CODE)}
    sum = MatMul (pr, vw)
    yf = Div (sum, total)  {_round_text("yf", "yr", _BF16_CODE)}  y = Cast <to = {dtype}> (yr)
}}
"""
