"""Q/DQ where TensorRT turns it into 8-bit kernels, and the two number formats.

Both are symmetric with zero point 0, which is all that TensorRT takes:
``x`` becomes ``round(x / scale)``, saturated at the format's largest value.

onnxruntime.quantization.quantize_static is not called: it quantises attention's products as well
(MatMulConstBOnly is ignored in its QDQ format), biases and LayerNormalizations too, writes fp32
scales, and knows no fp16 graph; TensorRT compiles what it gives for a ViT-S into 220 kernels, none
of them fused attention.

The graph is fp32 here and typed afterwards (msn_export.graph.precision); scales are numbers that
the type to come holds exactly.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.calibration.products import Projection, find_cores
from msn_export.errors import GraphError
from msn_export.graph.builder import GraphBuilder, array_of, operand, producer
from msn_export.graph.io import infer_shapes
from msn_export.spec import AttentionForm, Dtype, Target


@dataclass(frozen=True, slots=True)
class Format:
    """An 8-bit format: its ONNX type, and ``largest``, the value a range's end is mapped to."""

    dtype: Dtype
    onnx: ir.DataType
    largest: float

    def encode(self, scaled: NDArray[Any]) -> NDArray[Any]:
        """Round and saturate values that were divided by their scale."""
        clipped: NDArray[Any] = np.clip(scaled, -self.largest, self.largest)
        if self.dtype is Dtype.INT8:
            clipped = np.rint(clipped)
        return clipped.astype(self.onnx.numpy())

    def carry(self, x: NDArray[Any], scale: NDArray[Any] | float) -> NDArray[np.float32]:
        """Quantise and dequantise, as a Q/DQ pair does."""
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
    """Give the scale that maps each threshold to the format's largest value, as float32.

    Every scale is a number that ``base`` holds exactly, for the graph is typed afterwards and what
    was rounded with one scale must be multiplied with the same; rounding goes up, so that nothing
    more is cut off. A threshold of zero (a channel that is zero for every image) has scale 1.

    Raises:
        GraphError: a scale is larger than ``base`` can hold.
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
    """How ranges become scales: the 8-bit format, and the type that the rest will have.

    ``reduced`` says whether integer weights end at 64, ``runs_on`` what the graph is for; None
    leaves either to the type of the rest.
    """

    form: Format
    base: Dtype
    reduced: bool | None = None
    runs_on: Target | None = None

    @property
    def scale(self) -> Dtype:
        """The type that holds every scale exactly; of opset 17 the one that trt gives the rest."""
        return Dtype.FP16 if self.target is Target.TENSORRT_8 else self.base

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
        """What runs it fast: 8-bit beside half precision TensorRT, beside fp32 onnxruntime."""
        return self.runs_on or (Target.ONNXRUNTIME if self.base is Dtype.FP32 else Target.TENSORRT)

    @property
    def attention(self) -> AttentionForm:
        """How attention that stays unquantised is written."""
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
    """Name the operands of each attention core; the graph's attention is in its plain form."""
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

    Raises:
        GraphError: there are too many tokens.
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

    A value that several projections read has one Q/DQ pair: TensorRT merges separate query, key
    and value projections only then.
    """
    nodes = {node.name: node for node in model.graph}
    pairs: dict[str, ir.Value] = {}
    for projection in projections:
        node = nodes[projection.node]
        if projection.x not in pairs:
            pairs[projection.x] = _pair(model, node, 0, thresholds[projection.x], scheme)
        node.replace_input_with(0, pairs[projection.x])
        node.replace_input_with(1, _weight(model, node, projection, scheme))
    RemoveUnusedNodesPass()(model)
    infer_shapes(model)


def quantise_attention(
    model: ir.Model,
    operands: Sequence[Operands],
    thresholds: Mapping[str, float],
    scheme: Scheme,
) -> None:
    """Quantise both products of the attention cores, in place."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    for core in operands:
        for name in (core.q, core.k, core.p, core.v):
            for use in list(values[name].uses()):
                pair = _pair(model, use.node, use.idx, thresholds[name], scheme)
                use.node.replace_input_with(use.idx, pair)
    infer_shapes(model)


def _pair(model: ir.Model, node: ir.Node, index: int, limit: float, scheme: Scheme) -> ir.Value:
    """Quantise and dequantise what ``node`` reads."""
    x = operand(node, index)
    builder = GraphBuilder(model.graph, node)
    step = builder.constant(scales(limit, scheme.form, scheme.scale), f"{x.name}.scale")
    nothing = scheme.form.encode(np.zeros((), np.float32))
    zero = builder.constant(nothing, f"zero.{scheme.form.dtype}")
    quantised = builder.op("QuantizeLinear", [x, step, zero])
    return builder.op("DequantizeLinear", [quantised, step, zero])


def _weight(model: ir.Model, node: ir.Node, projection: Projection, scheme: Scheme) -> ir.Value:
    """Store a weight in 8 bits and dequantise it."""
    value = operand(node, 1)
    weight = array_of(value)
    others = tuple(axis for axis in range(weight.ndim) if axis != projection.axis)
    limits = np.abs(weight).max(axis=others)
    if not np.isfinite(limits).all():
        raise GraphError(f"weight {projection.weight!r} is not finite; export the graph again")
    steps = scales(limits, scheme.weights, scheme.scale)
    shape = [1] * weight.ndim
    shape[projection.axis] = -1
    builder = GraphBuilder(model.graph, node)
    encoded = scheme.weights.encode(weight / steps.reshape(shape))
    held = builder.constant(encoded, f"{value.name}.{scheme.form.dtype}")
    step = builder.constant(steps, f"{value.name}.scale")
    return builder.op("DequantizeLinear", [held, step], {"axis": projection.axis})
