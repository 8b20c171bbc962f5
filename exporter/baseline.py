"""What a precision costs: the reference, put into the candidate's precision, on the same images.

The baseline is made from the reference and never from the candidate, so that no fault of the
candidate is in it. It is written as the candidate is, for two sound graphs of one precision differ
by how they are written too: the same kind of input, the same form of attention. Of a quantised
candidate it has the scales of the activations, which are a choice and no fault, and the powers of
two that smoothing moved; its weights are quantised anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.calibration.formats import FORMATS
from msn_export.calibration.projections import Projection, find_projections
from msn_export.calibration.qdq import (
    Operands,
    Scheme,
    find_operands,
    quantise_attention,
    quantise_projections,
)
from msn_export.calibration.smooth import Seam, find_seams, fold
from msn_export.check.gate import MARGIN
from msn_export.check.sample import Sample
from msn_export.check.verify import Reference, Runner, Trial
from msn_export.errors import GraphError
from msn_export.files import apart
from msn_export.graph import io
from msn_export.graph.emulate import in_fp64, round_values, widen
from msn_export.graph.fuse import fuse_attention
from msn_export.graph.lower import raise_opset
from msn_export.graph.narrow import narrow_to_first_token
from msn_export.graph.patch import Patch
from msn_export.graph.patch import replace as replace_value
from msn_export.graph.precision import overflowing_weights, type_graph
from msn_export.graph.quantised import (
    is_quantised_core,
    quantised_dtype,
    quantised_products,
)
from msn_export.graph.stream import PRODUCTS, find_stream
from msn_export.islands import MEASURED, decide
from msn_export.preprocessing import Preprocessing
from msn_export.runtime.ort import OrtRunner
from msn_export.spec import AttentionForm, Dtype, InputKind
from msn_export.typed import cpu_runner


def add_baseline(
    reference: Reference,
    runner: Runner,
    stem: InputKind,
    *,
    margin: float = MARGIN,
    fixed: int | None = None,
) -> Reference:
    """Run a baseline on the reference's pictures: its errors are what the precision costs there.

    Raises:
        ToleranceError: the baseline has other outputs than the reference.
    """
    size = fixed or min(8, reference.sample.room, len(reference.sample))
    trial = Trial()
    trial.run(runner, reference, stem, (size,))
    return replace(reference, baseline=trial.errors(), baseline_name=runner.name, margin=margin)


def attention_form(model: ir.Model) -> AttentionForm:
    """Tell how a graph writes its attention."""
    for node in model.graph:
        if node.op_type == "Attention":
            packed = "q_num_heads" in node.attributes
            return AttentionForm.PACKED if packed else AttentionForm.HEADS
    return AttentionForm.PLAIN


def narrow_like(model: ir.Model, candidate: ir.Model) -> None:
    """Compute the last block for [CLS] alone where the candidate does, in place.

    Products of one row add in another order than those of many.

    Raises:
        GraphError: the candidate is no ViT.
    """
    blocks = find_stream(candidate).blocks
    shape = blocks[-1].output.shape
    if shape is None or len(shape) != 3 or shape[1] != 1:
        return
    products = [sum(node.op_type in PRODUCTS for node in block.nodes) for block in blocks]
    narrow_to_first_token(model, split_projection=products[-1] > products[0])


def write_like(
    reference: ir.Model, stem: InputKind, preprocessing: Preprocessing, form: AttentionForm
) -> ir.Model:
    """Copy the reference's fp32 function with another kind of input and form of attention.

    Args:
        reference: a graph of any precision.
        stem: what the copy takes.
        preprocessing: whose mean and standard deviation bytes are normalised with.
        form: how the copy writes attention; an attention that cannot be matched stays as it is.

    Raises:
        GraphError: the graph has no patch convolution that normalisation could be folded into.
    """
    model = raise_opset(widen(reference))
    _take(model, stem, preprocessing)
    fuse_attention(model, form)
    return model


def _take(model: ir.Model, stem: InputKind, preprocessing: Preprocessing) -> None:
    """Give a graph another kind of input, in place.

    ``conv((x * scale - mean) / std)`` is a convolution of ``x``: see msn_export.graph.fold.
    """
    images = model.graph.inputs[0]
    held = InputKind.UINT8 if images.dtype == ir.DataType.UINT8 else InputKind.FLOAT
    if held is stem or InputKind.UINT8 not in {held, stem}:
        return
    conv = next((node for node in model.graph if node.op_type == "Conv"), None)
    weight = conv.inputs[1].const_value if conv is not None and conv.inputs[1] else None
    if conv is None or weight is None or images.shape is None:
        raise GraphError("the graph has no convolution over the image; expected a ViT")
    std = np.asarray(preprocessing.std, np.float64).reshape(1, -1, 1, 1)
    mean = np.asarray(preprocessing.mean, np.float64).reshape(1, -1, 1, 1)
    kernel = weight.numpy().astype(np.float64)
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    shift = bias.const_value.numpy().astype(np.float64) if bias and bias.const_value else 0.0
    patch = Patch(model.graph, model.graph[0])
    batch, *sizes = images.shape
    if stem is InputKind.UINT8:
        shift = shift - (kernel * mean / std).sum(axis=(1, 2, 3))
        kernel = kernel * preprocessing.scale / std
        channels, height, width = sizes
        taken = ir.Value(
            name=f"{images.name}.bytes", type=ir.TensorType(ir.DataType.UINT8),
            shape=ir.Shape([batch, height, width, channels]),
        )  # fmt: skip
        floats = patch.op("Cast", [taken], {"to": int(ir.DataType.FLOAT)})
        planes = patch.op("Transpose", [floats], {"perm": [0, 3, 1, 2]})
    else:
        kernel = kernel * std / preprocessing.scale
        shift = shift + (kernel * mean / std).sum(axis=(1, 2, 3))
        height, width, channels = sizes
        taken = planes = ir.Value(
            name=f"{images.name}.planes", type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([batch, channels, height, width]),
        )  # fmt: skip
    before = Patch(model.graph, conv)
    constants = [
        before.constant(kernel.astype(np.float32), "patch.folded.weight"),
        before.constant(np.asarray(shift, np.float32), "patch.folded.bias"),
    ]
    product = before.op("Conv", [planes, *constants], dict(conv.attributes))
    replace_value(conv.outputs[0], product)
    model.graph.inputs[0] = taken
    RemoveUnusedNodesPass()(model)
    io.infer_shapes(model)


def open_typed(
    model: ir.Model, dtype: Dtype, sample: Sample, stem: InputKind, stage: Path
) -> OrtRunner:
    """Type an fp32 graph as the project types one, and open it: the baseline of another graph."""
    if dtype is not Dtype.FP32:
        type_graph(model, dtype, decide(model, MEASURED, dtype, sample, stem, stage))
    runner = _open(model, dtype, stage)
    runner.name = f"the reference as a graph in {dtype}, in {runner.name}"
    return runner


def open_rounded(
    model: ir.Model, dtype: Dtype, sample: Sample, stem: InputKind, stage: Path
) -> OrtRunner:
    """Open an fp32 graph with every result rounded: the baseline of an engine, and of our typing.

    onnxruntime's CPU provider keeps fp32 between two operators of an fp16 graph where it can, which
    leaves it 0.6 to 0.75 of this error; an engine writes what each kernel computes.
    """
    islands = set(decide(model, MEASURED, dtype, sample, stem, stage))
    islands |= set(overflowing_weights(model, dtype))
    runner = _open(round_values(model, dtype, islands), Dtype.FP32, stage)
    runner.name = f"the reference with every result rounded to {dtype}, in {runner.name}"
    return runner


def open_widened(model: ir.Model, stage: Path) -> OrtRunner:
    """Open the fp32 function of a typed or quantised graph.

    How far the graph is from it is what its precision costs, and what another graph of the same
    weights may differ by.
    """
    runner = _open(widen(model), Dtype.FP32, stage)
    runner.name = f"the reference's weights in fp32, in {runner.name}"
    return runner


def open_exact(model: ir.Model, stage: Path) -> OrtRunner:
    """Open an fp32 graph in fp64: what it computes without fp32's own rounding.

    Raises:
        GraphError: it has a convolution that fp64 has no form of.
    """
    runner = _open(in_fp64(model), Dtype.FP32, stage)
    runner.name = f"the graph in fp64, in {runner.name}"
    return runner


def open_quantised(
    model: ir.Model, candidate: ir.Model, sample: Sample, stem: InputKind, stage: Path
) -> OrtRunner:
    """Quantise an fp32 graph as a candidate is, and open it.

    Args:
        model: the reference, written as the candidate is (``write_like``).
        candidate: a graph with Q/DQ.
        sample: what fp32 islands are measured on.
        stem: what ``model`` takes.
        stage: a folder for the file.

    Raises:
        GraphError: the two have other projections, or the candidate's weights have one scale a
            tensor.
    """
    rest = rest_of(candidate)
    islands = decide(model, MEASURED, rest, sample, stem, stage)
    quantised = quantise_like(model, candidate, rest)
    if rest is not Dtype.FP32:
        named = {value.name for node in quantised.graph for value in node.outputs}
        type_graph(quantised, rest, islands.keys() & named)
    dtype = quantised_dtype(candidate) or rest
    runner = _open(quantised, dtype, stage)
    runner.name = f"the reference in {dtype} with the candidate's scales, in {runner.name}"
    return runner


def _open(model: ir.Model, dtype: Dtype, stage: Path) -> OrtRunner:
    path = apart(stage) / "baseline.onnx"
    io.save(model, path)
    runner = cpu_runner(path, dtype, path.parent)
    path.unlink()
    return runner


def quantise_like(model: ir.Model, candidate: ir.Model, rest: Dtype) -> ir.Model:
    """Copy an fp32 graph with Q/DQ where a candidate has it.

    Args:
        model: fp32, its attention in the candidate's form.
        candidate: where Q/DQ is, with which scales of activations.
        rest: the type of what is not quantised: scales are numbers that it holds.

    Raises:
        GraphError: as ``open_quantised``.
    """
    dtype = quantised_dtype(candidate)
    if dtype is None:
        raise GraphError("the candidate has no Q/DQ; expected a quantised graph")
    plain, copy = widen(candidate), model.clone()
    form = attention_form(plain)
    # projections and operands are found in these two forms
    found_in = AttentionForm.PLAIN if form is AttentionForm.PLAIN else AttentionForm.HEADS
    for graph in (plain, copy):
        fuse_attention(graph, found_in)
    theirs, mine = find_projections(plain), find_projections(copy)
    chosen = set(quantised_products(candidate))
    nodes = {node.name: node for node in candidate.graph}
    pairs = [(own, other) for own, other in _matched(mine, theirs) if other.node in chosen]
    largest = FORMATS[dtype].largest
    thresholds = {own.x: _scale(nodes[other.node]) * largest for own, other in pairs}
    reduced = all(_reduced(nodes[other.node]) for _, other in pairs)
    scheme = Scheme(FORMATS[dtype], rest, reduced=reduced)
    _smooth_like(copy, plain, mine, theirs)
    quantise_projections(copy, [own for own, _ in pairs], thresholds, scheme)
    if form is AttentionForm.PLAIN:
        _quantise_attention_like(copy, candidate, scheme)
    fuse_attention(copy, form)
    return copy


def _matched(
    mine: tuple[Projection, ...], theirs: tuple[Projection, ...]
) -> list[tuple[Projection, Projection]]:
    """Match projections by block and role; a packed one stands for the three of another graph."""
    found = []
    for own in mine:
        same = [p for p in theirs if (p.role, p.block) == (own.role, own.block)]
        beside = [p for p in mine if (p.role, p.block) == (own.role, own.block)]
        if not same or (len(same) != len(beside) and 1 not in {len(same), len(beside)}):
            raise GraphError(
                f"the candidate has {len(same)} {own.role} projections in block {own.block} and "
                f"the reference {len(beside)}"
            )
        found.append((own, same[beside.index(own) if len(same) == len(beside) else 0]))
    return found


def _scale(product: ir.Node) -> float:
    """Read the scale that a quantised product's input has."""
    return float(np.max(_constant_of(product, 0, 1)))


def _reduced(product: ir.Node) -> bool:
    """Whether a weight's integers end at 64; its scales must be one an output channel."""
    if _constant_of(product, 1, 1).size < 2:
        raise GraphError(
            f"product {product.name!r} has one scale for its whole weight; no baseline is made of "
            "those"
        )
    return bool(np.abs(_constant_of(product, 1, 0).astype(np.float32)).max() <= 64)


def _constant_of(product: ir.Node, index: int, at: int) -> NDArray[np.float32]:
    value = product.inputs[index]
    pair = value.producer() if value is not None else None
    held = pair.inputs[at] if pair is not None else None
    if held is None or held.const_value is None:
        raise GraphError(f"the scales of product {product.name!r} are not constant")
    return held.const_value.numpy()


def _smooth_like(
    model: ir.Model,
    plain: ir.Model,
    mine: tuple[Projection, ...],
    theirs: tuple[Projection, ...],
) -> None:
    """Move the powers of two that smoothing moved in the candidate, in place.

    They are read off what writes the channels, rounded to whole powers: a fault stays a fault.
    """
    at = _seams_by_reader(plain, theirs)
    for key, seam in _seams_by_reader(model, mine).items():
        other = at.get(key)
        if other is None or len(other.columns) != len(seam.columns):
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            powers = np.rint(np.log2(_written(model, seam) / _written(plain, other)))
        powers[~np.isfinite(powers)] = 0
        if powers.any():
            fold(model, seam, np.exp2(powers).astype(np.float32))


def _seams_by_reader(
    model: ir.Model, projections: tuple[Projection, ...]
) -> Mapping[tuple[str, int | None], Seam]:
    readers = {p.node: (str(p.role), p.block) for p in projections}
    return {readers[seam.read[0][0]]: seam for seam in find_seams(model, projections)}


def _written(model: ir.Model, seam: Seam) -> NDArray[np.float64]:
    """Give the length of what writes each channel: a gain, or a column of a projection."""
    nodes = {node.name: node for node in model.graph}
    name, index = seam.written[0]
    value = nodes[name].inputs[index]
    assert value is not None
    assert value.const_value is not None
    array = value.const_value.numpy().astype(np.float64)[..., list(seam.columns)]
    lengths: NDArray[np.float64] = np.linalg.norm(array.reshape(-1, len(seam.columns)), axis=0)
    return lengths


def _quantise_attention_like(model: ir.Model, candidate: ir.Model, scheme: Scheme) -> None:
    """Quantise attention's own products where the candidate does, in place.

    Raises:
        GraphError: the two have other attention cores.
    """
    operands = find_operands(model)
    cores = [
        node
        for node in candidate.graph
        if node.op_type == "Softmax" and len(node.outputs[0].shape or ()) == 4
    ]
    if len(cores) != len(operands):
        raise GraphError(
            f"the candidate has {len(cores)} attention cores and the reference {len(operands)}"
        )
    chosen: list[Operands] = []
    thresholds: dict[str, float] = {}
    for own, softmax in zip(operands, cores, strict=True):
        if not is_quantised_core(softmax):
            continue
        chosen.append(own)
        for name, step in zip((own.q, own.k, own.p, own.v), _core_scales(softmax), strict=True):
            thresholds[name] = step * scheme.form.largest
    quantise_attention(model, chosen, thresholds, scheme)


def _core_scales(softmax: ir.Node) -> Iterator[float]:
    """Read the scales of a quantised core's operands: q, k, probabilities, v."""
    scores = softmax.inputs[0].producer() if softmax.inputs[0] is not None else None
    assert scores is not None  # it is a quantised core
    product = softmax
    for _ in range(3):  # QuantizeLinear, DequantizeLinear, the product
        product = next(iter(product.outputs[0].uses())).node
    for node in (scores, product):
        for index in range(2):
            yield float(np.max(_constant_of(node, index, 1)))


def rest_of(model: ir.Model) -> Dtype:
    """Tell the type of what is not quantised: that of most of the other weights."""
    kinds = {
        ir.DataType.FLOAT: Dtype.FP32,
        ir.DataType.FLOAT16: Dtype.FP16,
        ir.DataType.BFLOAT16: Dtype.BF16,
    }
    held = dict.fromkeys(kinds.values(), 0)
    for value in model.graph.initializers.values():
        if value.dtype in kinds and value.const_value is not None:
            held[kinds[value.dtype]] += value.const_value.size
    return max(held, key=lambda dtype: held[dtype])
