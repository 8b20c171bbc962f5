"""Find the matrix products of a ViT that are worth 8 bits, by structure and not by name.

Each attention core is an anchor: its operands come from the query, key and value projections
(packed into one, or apart), its result goes to the output projection, and of the products between
that and the next core the first is the MLP's first layer and the second its second.

Both are symmetric with zero point 0, which is all that TensorRT takes:
``x`` becomes ``round(x / scale)``, saturated at the format's largest value.

onnxruntime.quantization.quantize_static is not called: it quantises attention's products as well
(MatMulConstBOnly is ignored in its QDQ format), biases and LayerNormalizations too, writes fp32
scales, and knows no fp16 graph; TensorRT compiles what it gives for a ViT-S into 220 kernels, none
of them fused attention.

The graph is fp32 here and typed afterwards (msn_export.graph.precision); scales are numbers that
the type to come holds exactly.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.errors import GraphError
from msn_export.graph.attention import AttentionCore, match
from msn_export.graph.builder import GraphBuilder, array_of, operand, producer
from msn_export.graph.builder import replace as replace_value
from msn_export.graph.io import infer_shapes
from msn_export.spec import AttentionForm, Dtype, Target

# Operators between a projection and an attention core: they move, scale or shift elements.
_MOVES = ("Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
_BETWEEN = frozenset({"Add", "Div", "Mul", *_MOVES})
_PRODUCTS = frozenset({"MatMul", "Gemm"})
# Signs of one weight before and after 8 bits agree in 0.9 and more, those of two in 0.05.
_SAME = 0.5


class Role(StrEnum):
    QKV = "qkv"
    OUT = "out"
    FC1 = "fc1"
    FC2 = "fc2"
    PATCH = "patch"
    HEAD = "head"


@dataclass(frozen=True, slots=True)
class Projection:
    """A product with a constant weight: names of its node, input and weight.

    ``axis`` is the weight's axis of output channels; ``block`` is None outside the blocks.
    """

    role: Role
    block: int | None
    node: str
    x: str
    weight: str
    axis: int


def find_cores(model: ir.Model) -> list[AttentionCore]:
    """List the attention cores in order; all must match (fuse_attention)."""
    candidates = [node for node in model.graph if node.op_type in {"Softmax", "Attention"}]
    return [core for core in map(match, candidates) if isinstance(core, AttentionCore)]


def find_projections(model: ir.Model) -> tuple[Projection, ...]:
    """Name every product with a constant weight, in the order of the graph."""
    cores = find_cores(model)
    if not cores:
        raise GraphError("the graph has no attention core; expected a ViT")
    roles: dict[ir.Node, tuple[Role, int | None]] = {}
    for block, core in enumerate(cores):
        into = _sources(core)
        if not into:
            raise GraphError(
                f"the queries, keys and values of block {block} ({core.output.name!r}) come from "
                "no product with a constant weight; expected a projection"
            )
        roles |= dict.fromkeys(into, (Role.QKV, block))
    products = [node for node in model.graph if _is_product(node)]
    order = {node: index for index, node in enumerate(model.graph)}
    for block, core in enumerate(cores):
        first = order[core.node]
        last = order[cores[block + 1].node] if block + 1 < len(cores) else len(order)
        after = [n for n in products if first < order[n] < last and n not in roles]
        _name_block(roles, after, block, closing=block + 1 == len(cores))
    roles |= {node: (Role.PATCH, None) for node in model.graph if _is_convolution(node)}
    return tuple(_describe(node, *roles[node]) for node in model.graph if node in roles)


def find_by_weight(
    projections: Sequence[Projection], model: ir.Model, other: ir.Model, chosen: Collection[str]
) -> list[tuple[Projection, Projection]]:
    """Find the projections of a graph of floats in another, by the signs of their weights.

    Signs outlast rounding, scales and smoothing, which multiplies whole rows or columns by positive
    numbers. A packed projection is found in the three of another graph, and they in it. All
    products of ``other`` called ``chosen`` must be found.
    """
    products = [
        _describe(node, Role.HEAD, None)
        for node in other.graph
        if node.name in chosen and (_is_product(node) or _is_convolution(node))
    ]
    if not products:
        raise GraphError("the candidate has no product with its 8-bit weight right in front of it")
    theirs = [_signs(other, product) for product in products]
    mine = [_signs(model, own) for own in projections]
    agreed = np.asarray([[_agreement(one, two) for two in theirs] for one in mine])
    for product, best in zip(products, agreed.max(axis=0).tolist(), strict=True):
        if best < _SAME:
            raise GraphError(
                f"product {product.node!r} of the candidate has the weight of none of the reference"
            )
    return [
        (own, replace(products[int(row.argmax())], role=own.role, block=own.block))
        for own, row in zip(projections, agreed, strict=True)
        if row.max() >= _SAME
    ]


def find_parts(
    own: Projection, model: ir.Model, other: ir.Model, among: Collection[str]
) -> tuple[str, ...]:
    """Name the products of another graph that make up one of a graph of floats, in its order.

    It is one product, be it packed or not, or the three that a packed one stands for.
    """
    products = [
        _describe(node, own.role, own.block)
        for node in other.graph
        if node.name in among and _is_product(node)
    ]
    mine, theirs = _signs(model, own), [_signs(other, product) for product in products]
    for count in (1, 3):
        if len(mine) % count:
            continue
        thirds = np.split(mine, count)
        alike = [len(signs) in {len(thirds[0]), 3 * len(mine)} for signs in theirs]
        agreed = np.asarray([
            [_agreement(part, signs) if same else 0.0
             for same, signs in zip(alike, theirs, strict=True)]
            for part in thirds
        ])  # fmt: skip
        if agreed.size and agreed.max(axis=1).mean() >= _SAME:
            return tuple(products[int(row.argmax())].node for row in agreed)
    raise GraphError(
        f"product {own.node!r} of the reference has the weight of none of the candidate"
    )


def _signs(model: ir.Model, projection: Projection) -> NDArray[np.float32]:
    """Signs of a weight, [output channels, some 64 of the rest]."""
    held = array_of(model.graph.initializers[projection.weight])
    weight: NDArray[np.float32] = np.moveaxis(held, projection.axis, 0)
    rows = weight.reshape(len(weight), -1)
    return np.sign(rows[:, :: max(1, rows.shape[1] // 64)])


def _agreement(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Mean product of two weights' signs: 1 of the same, about 0 of others.

    Packed projections are compared part by part.
    """
    unit = math.gcd(len(one), len(other))
    if one.shape[1:] != other.shape[1:] or max(len(one), len(other)) > 3 * unit:
        return 0.0
    parts = [weight.reshape(-1, unit * weight.shape[1]) for weight in (one, other)]
    return float((parts[0] @ parts[1].T).max()) / parts[0].shape[1]


def _name_block(
    roles: dict[ir.Node, tuple[Role, int | None]],
    after: list[ir.Node],
    block: int,
    *,
    closing: bool,
) -> None:
    if len(after) < 3 or (len(after) > 3 and not closing):
        names = ", ".join(repr(node.name) for node in after) or "none"
        raise GraphError(
            f"block {block} has {len(after)} products with a constant weight after its attention "
            f"({names}); expected output projection, fc1 and fc2"
        )
    for node, role in zip(after, (Role.OUT, Role.FC1, Role.FC2), strict=False):
        roles[node] = (role, block)
    for node in after[3:]:
        roles[node] = (Role.HEAD, None)


def _sources(core: AttentionCore) -> list[ir.Node]:
    found: dict[ir.Node, None] = {}
    pending = [core.q, core.k, core.v]
    seen: set[ir.Value] = set()
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        if _is_product(node):
            found[node] = None
        elif node.op_type in _BETWEEN:
            pending += [v for v in node.inputs if v is not None and v.const_value is None]
    return list(found)


def _is_product(node: ir.Node) -> bool:
    return node.op_type in _PRODUCTS and _weight_rank(node) == 2


def _is_convolution(node: ir.Node) -> bool:
    return node.op_type == "Conv" and _weight_rank(node) is not None


def _weight_rank(node: ir.Node) -> int | None:
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or not weight.is_initializer():
        return None
    return len(weight.shape or ())


def _describe(node: ir.Node, role: Role, block: int | None) -> Projection:
    x, weight = operand(node, 0), operand(node, 1)
    transposed = node.attributes.get_int("transB", 0)
    axis = 0 if transposed or node.op_type == "Conv" else 1
    return Projection(role, block, node.name or "", x.name or "", weight.name or "", axis)


@dataclass(frozen=True, slots=True)
class Format:
    """An 8-bit format: its ONNX type, and ``largest``, the value a range's end is mapped to."""

    dtype: Dtype
    onnx: ir.DataType
    largest: float

    @property
    def levels(self) -> NDArray[np.float64]:
        """All numbers of the format from 0 to ``largest``, in order."""
        codes = np.arange(128, dtype=np.uint8)
        numbers = codes.view(self.onnx.numpy()).astype(np.float64)
        return numbers[numbers <= self.largest]  # E4M3's last code is NaN

    def encode(self, scaled: NDArray[Any]) -> NDArray[Any]:
        clipped: NDArray[Any] = np.clip(scaled, -self.largest, self.largest)
        if self.dtype is Dtype.INT8:
            clipped = np.rint(clipped)
        return clipped.astype(self.onnx.numpy())

    def carry(self, x: NDArray[Any], scale: NDArray[Any] | float) -> NDArray[np.float32]:
        return self.encode(x / scale).astype(np.float32) * np.asarray(scale, np.float32)


# int8 without -128, so that it is symmetric: TensorRT, "Working with Quantized Types".
INT8 = Format(Dtype.INT8, ir.DataType.INT8, 127.0)
# E4M3 as ONNX's FLOAT8E4M3FN: largest finite value 1.75 * 2**8 (arXiv 2209.05433, table 1).
FP8 = Format(Dtype.FP8, ir.DataType.FLOAT8E4M3FN, 448.0)
FORMATS = {Dtype.INT8: INT8, Dtype.FP8: FP8}

_TYPES: dict[Dtype, Any] = {
    Dtype.FP32: np.float32,
    Dtype.FP16: np.float16,
    Dtype.BF16: ml_dtypes.bfloat16,
}


def scales(thresholds: NDArray[Any] | float, form: Format, base: Dtype) -> NDArray[np.float32]:
    """Scale that maps each threshold to the format's largest value, as float32.

    Every scale is a number that ``base`` holds exactly, for the graph is typed afterwards and what
    was rounded with one scale must be multiplied with the same; rounding goes up, so that nothing
    more is cut off. A threshold of zero (a channel that is zero for every image) has scale 1.
    """
    exact = np.asarray(thresholds, np.float64) / form.largest
    kind = _TYPES[base]
    with np.errstate(over="ignore"):
        rounded = exact.astype(kind)
        up = np.nextafter(rounded, np.asarray(np.inf, kind))
    held = np.where(rounded.astype(np.float64) < exact, up, rounded).astype(np.float32)
    if not np.isfinite(held).all():
        raise GraphError(
            f"a range of {np.max(thresholds):.3g} needs a scale of {np.max(exact):.3g}, which "
            f"{base} does not hold; calibrate with --base bf16"
        )
    return np.where(exact > 0, held, np.float32(1.0)).astype(np.float32)


# b batch, h heads, n tokens, d head size

# TensorRT's fused int8 attention ends at 512 tokens; measured on SM 8.9: fused at 485 tokens, taken
# apart at 530. fp8 is fused at 3137 tokens too.
INT8_ATTENTION_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Scheme:
    """Rules that make scales of ranges: the 8-bit format, and the type that the rest will have.

    ``reduced``: integer weights end at 64. ``runs_on``: the graph's target. None leaves either to
    the type of the rest.
    """

    form: Format
    base: Dtype
    reduced: bool | None = None
    runs_on: Target | None = None

    @property
    def scale(self) -> Dtype:
        """The type that holds every scale exactly; of opset 17 the one that trt gives the rest."""
        return Dtype.FP16 if self.target is Target.PORTABLE else self.base

    @property
    def weights(self) -> Format:
        """The format of weights: for onnxruntime integers to 64, so that no product saturates.

        Processors without VNNI add pairs of products, of 255 at most times a weight, in 16 bits
        that saturate (onnxruntime docs, Quantize ONNX models, "reduce_range"): 2 * 255 * 64 fits.
        So the figures measured on one processor hold on others.
        """
        on_cpu = self.target is not Target.TENSORRT
        reduced = on_cpu if self.reduced is None else self.reduced
        integers = self.form.dtype is Dtype.INT8
        return replace(self.form, largest=64.0) if reduced and integers else self.form

    @property
    def target(self) -> Target:
        """The target: TensorRT for 8 bits beside half precision, beside fp32 onnxruntime."""
        return self.runs_on or (Target.ONNXRUNTIME if self.base is Dtype.FP32 else Target.TENSORRT)

    @property
    def attention(self) -> AttentionForm:
        return self.target.attention


@dataclass(frozen=True, slots=True)
class Operands:
    """The four operands of an attention core in its plain form, by the values' names.

    ``q`` and ``k`` [b, h, n, d] and [b, h, d, n] go into the first product, ``p`` (softmax's
    probabilities) and ``v`` into the second. All four must be 8-bit for the core to be fused.
    """

    block: int
    q: str
    k: str
    p: str
    v: str


def find_operands(model: ir.Model) -> tuple[Operands, ...]:
    found = []
    for block, core in enumerate(find_cores(model)):
        probabilities, v = operand(core.node, 0), operand(core.node, 1)
        scores = producer(producer(probabilities).inputs[0])
        values = (operand(scores, 0), operand(scores, 1), probabilities, v)
        found.append(Operands(block, *(value.name or "" for value in values)))
    return tuple(found)


def require_fusable(tokens: int, scheme: Scheme) -> None:
    """Refuse int8 attention where TensorRT would take the fused kernel apart for it.

    onnxruntime, which a scheme beside fp32 is for, multiplies each product by itself: it has no
    such limit.
    """
    fused = scheme.target is not Target.ONNXRUNTIME and scheme.form.dtype is Dtype.INT8
    if fused and tokens > INT8_ATTENTION_TOKENS:
        raise GraphError(
            f"--quantize-attention: TensorRT has fused int8 attention up to "
            f"{INT8_ATTENTION_TOKENS} tokens and this graph has {tokens}; leave attention in "
            f"{scheme.base}, or use --fp8"
        )


def quantise_projections(
    model: ir.Model,
    projections: Sequence[Projection],
    thresholds: Mapping[str, float],
    scheme: Scheme,
) -> None:
    """Quantise inputs (per tensor) and weights (per output channel) of ``projections``, in place.

    Projections that read one value (query, key and value of another tool's graph) become one
    product and a Split. As three, TensorRT-RTX 1.7.1 makes 148 kernels of optimum's vit-msn-base
    instead of 124, and onnxruntime 1.31 on x86 multiplies them in fp32: it shifts int8 to uint8
    only in front of a single DequantizeLinear.
    """
    nodes = {node.name: node for node in model.graph}
    for x, readers in _by_input(projections).items():
        first = nodes[readers[0].node]
        pair = _pair(model, first, 0, thresholds[x], scheme)
        weights = [_encoded(nodes[reader.node], reader, scheme) for reader in readers]
        if _can_join(nodes, readers):
            _join(model, [nodes[reader.node] for reader in readers], pair, weights)
            continue
        for reader, weight in zip(readers, weights, strict=True):
            node = nodes[reader.node]
            node.replace_input_with(0, pair)
            builder = GraphBuilder(model.graph, node)
            node.replace_input_with(1, _held(builder, weight, reader.weight, reader.axis))
    RemoveUnusedNodesPass()(model)
    infer_shapes(model)


def quantise_weights(model: ir.Model, projections: Sequence[Projection], scheme: Scheme) -> None:
    """Quantise the weights of ``projections`` alone, in place; their inputs stay floats."""
    nodes = {node.name: node for node in model.graph}
    for projection in projections:
        node = nodes[projection.node]
        held = _encoded(node, projection, scheme)
        builder = GraphBuilder(model.graph, node)
        node.replace_input_with(1, _held(builder, held, projection.weight, projection.axis))
    RemoveUnusedNodesPass()(model)
    infer_shapes(model)


def _by_input(projections: Sequence[Projection]) -> dict[str, list[Projection]]:
    found: dict[str, list[Projection]] = {}
    for projection in projections:
        found.setdefault(projection.x, []).append(projection)
    return found


def _can_join(nodes: Mapping[str | None, ir.Node], readers: Sequence[Projection]) -> bool:
    """Check that all are queries, keys or values: two classifiers may read one value too."""
    return len(readers) > 1 and all(
        reader.role is Role.QKV and nodes[reader.node].op_type == "MatMul" for reader in readers
    )


def _join(
    model: ir.Model, products: Sequence[ir.Node], x: ir.Value, weights: Sequence["_Encoded"]
) -> None:
    """Write products of ``x`` [.., in] with weights [in, out] as one, and split its result."""
    builder = GraphBuilder(model.graph, products[0])
    joined = _Encoded(
        weights[0].dtype,
        np.concatenate([weight.codes for weight in weights], axis=1),
        np.concatenate([weight.steps for weight in weights]),
    )
    names = [operand(node, 1).name for node in products]
    held = _held(builder, joined, "+".join(str(name) for name in names), 1)
    sizes = builder.constant([len(weight.steps) for weight in weights], "joined.sizes")
    whole = builder.op("MatMul", [x, held])
    parts = builder.ops("Split", [whole, sizes], {"axis": -1}, outputs=len(products))
    for node, part in zip(products, parts, strict=True):
        part.shape, part.type = node.outputs[0].shape, node.outputs[0].type
        node.outputs[0].replace_all_uses_with(part)


def quantise_attention(
    model: ir.Model,
    operands: Sequence[Operands],
    thresholds: Mapping[str, float],
    scheme: Scheme,
) -> None:
    values = {value.name: value for node in model.graph for value in node.outputs}
    for core in operands:
        for name in (core.q, core.k, core.p, core.v):
            for use in list(values[name].uses()):
                pair = _pair(model, use.node, use.idx, thresholds[name], scheme)
                use.node.replace_input_with(use.idx, pair)
    infer_shapes(model)


def quantise_results(
    model: ir.Model, names: Collection[str], thresholds: Mapping[str, float], scheme: Scheme
) -> None:
    """Quantise values for all that reads them, in place."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    for name in names:
        value = values[name]
        builder = GraphBuilder(model.graph).after(producer(value))
        pair = _rounded(builder, value, thresholds[name], scheme)
        replace_value(value, pair)
        producer(producer(pair).inputs[0]).replace_input_with(0, value)
    infer_shapes(model)


def _pair(model: ir.Model, node: ir.Node, index: int, limit: float, scheme: Scheme) -> ir.Value:
    return _rounded(GraphBuilder(model.graph, node), operand(node, index), limit, scheme)


def _rounded(builder: GraphBuilder, x: ir.Value, limit: float, scheme: Scheme) -> ir.Value:
    step = builder.constant(scales(limit, scheme.form, scheme.scale), f"{x.name}.scale")
    nothing = scheme.form.encode(np.zeros((), np.float32))
    zero = builder.constant(nothing, f"zero.{scheme.form.dtype}")
    quantised = builder.op("QuantizeLinear", [x, step, zero])
    return builder.op("DequantizeLinear", [quantised, step, zero])


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A weight as 8-bit ``codes``, in the weight's shape, and a step per output channel."""

    dtype: Dtype
    codes: NDArray[Any]
    steps: NDArray[np.float32]


def _encoded(node: ir.Node, projection: Projection, scheme: Scheme) -> _Encoded:
    weight = array_of(operand(node, 1))
    others = tuple(axis for axis in range(weight.ndim) if axis != projection.axis)
    limits = np.abs(weight).max(axis=others)
    if not np.isfinite(limits).all():
        raise GraphError(f"weight {projection.weight!r} is not finite; export the graph again")
    steps = scales(limits, scheme.weights, scheme.scale)
    shape = [1] * weight.ndim
    shape[projection.axis] = -1
    codes = scheme.weights.encode(weight / steps.reshape(shape))
    return _Encoded(scheme.form.dtype, codes, steps)


def _held(builder: GraphBuilder, weight: _Encoded, name: str, axis: int) -> ir.Value:
    held = builder.constant(weight.codes, f"{name}.{weight.dtype}")
    step = builder.constant(weight.steps, f"{name}.scale")
    return builder.op("DequantizeLinear", [held, step], {"axis": axis})
