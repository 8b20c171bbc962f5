"""Compute attention on the CPU as TensorRT-RTX's fused kernels do, in plain ONNX operators.

onnxruntime's CPU provider computes scores, softmax and the sum of values of an fp16 ``Attention``
in fp32 each and rounds the three results. The fused kernel of TensorRT-RTX takes keys in steps of
32, multiplies them by tensor cores 16 numbers at a time and keeps scores and sums in fp16: types,
step and the scaling of queries and keys are those in the kernel's source, which the engine holds
(``fmha::Ampere_hmma_fp16_traits``, ``32, // kv_loop_step``). What is not told, the order of the
additions inside 16, is fp32 here. In bf16 the kernel rounds what it multiplies and sums in fp32.

b images, h heads, m queries, n keys, d head size.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from msn_export.errors import GraphError
from msn_export.graph.attention import AttentionCore, match
from msn_export.graph.builder import GraphBuilder, producer
from msn_export.graph.io import infer_shapes
from msn_export.spec import Dtype

KEYS = 32  # keys a step
WIDTH = 16  # numbers that a tensor core multiplies and adds at once
PEAKS = "attention peaks"

_DOMAIN = "msn_export.emulated"
_FLOAT, _FP16, _BF16 = (int(getattr(ir.DataType, n)) for n in ("FLOAT", "FLOAT16", "BFLOAT16"))
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


def _round(old: str, new: str, to: int = _FP16) -> str:
    return f"{new}_narrow = Cast <to = {to}> ({old})  {new} = Cast <to = {_FLOAT}> ({new}_narrow)"


def _fp16_text(name: str, keys: int, size: int, scale: float, dtype: int) -> str:
    """Write flash attention with scores and sums in fp16 as an ONNX function."""
    steps = -(-keys // KEYS)
    widths = [min(WIDTH, size - start) for start in range(0, size, WIDTH)]
    parts = range(len(widths))
    last = len(widths) - 1
    mask = ", ".join("0.0" if i < keys else repr(_NOTHING) for i in range(steps * KEYS))
    products = "\n        ".join(
        f"t{i} = MatMul (q{i}, k{i})  u{i} = {f'Add (s{i - 1}, t{i})' if i else f'Identity (t{i})'}"
        f"  {_round(f'u{i}', f's{i}')}"
        for i in parts
    )
    return f"""
<opset_import: ["" : 23], domain: "{_DOMAIN}">
{name} (q, k, v) => (y, peaks)
{{
    root = Constant <value_float = {_root(scale, Dtype.FP16)}> ()
    widths = Constant <value_ints = {widths}> ()
    qf = Cast <to = {_FLOAT}> (q)  qm = Mul (qf, root)  {_round("qm", "qr")}
    kf = Cast <to = {_FLOAT}> (k)  km = Mul (kf, root)  {_round("km", "kr")}
    vf = Cast <to = {_FLOAT}> (v)
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
        {_round("p", "pr")}
        halves = Constant <value_ints = [{WIDTH}, {KEYS - WIDTH}]> ()
        p0, p1 = Split <axis = -1> (pr, halves)  v0, v1 = Split <axis = -2> (values, halves)
        old = Mul (sum_in, fade)  {_round("old", "kept")}
        a0 = MatMul (p0, v0)  o0 = Add (kept, a0)  {_round("o0", "r0")}
        a1 = MatMul (p1, v1)  o1 = Add (r0, a1)  {_round("o1", "sum_out")}
        sums = Abs (o1)  most_here = ReduceMax <keepdims = 1> (sums, inner)
        most_out = Max (most_in, most_here)
    }}> (top0, total0, sum0, peak0, peak0, kt, vt, mask)
    yf = Div (sum, total)  {_round("yf", "yr")}  y = Cast <to = {dtype}> (yr)
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
    qf = Cast <to = {_BF16}> (q)  qw = Cast <to = {_FLOAT}> (qf)
    kf = Cast <to = {_BF16}> (k)  kw = Cast <to = {_FLOAT}> (kf)
    vf = Cast <to = {_BF16}> (v)  vw = Cast <to = {_FLOAT}> (vf)
    qm = Mul (qw, root)  {_round("qm", "qr", _BF16)}
    km = Mul (kw, root)  {_round("km", "kr", _BF16)}
    kt = Transpose <perm = [0, 1, 3, 2]> (kr)
    s = MatMul (qr, kt)
    end = Constant <value_ints = [-1]> ()
    top = ReduceMax <keepdims = 1> (s, end)
    below = Sub (s, top)  p = Exp (below)
    total = ReduceSum (p, end)
    {_round("p", "pr", _BF16)}
    sum = MatMul (pr, vw)
    yf = Div (sum, total)  {_round("yf", "yr", _BF16)}  y = Cast <to = {dtype}> (yr)
}}
"""
