"""The cost of a precision: the reference, put into the candidate's precision, on the same images.

The baseline is made from the reference and never from the candidate, so that no fault of the
candidate is in it. It is written as the candidate is, for two sound graphs of one precision differ
by how they are written too: the same kind of input, the same form of attention. Of a quantised
candidate it has the scales of the activations and the powers of two that smoothing moved; its
weights are quantised anew. A second one has scales of its own, measured on the images.

Quantised products are matched by structure, or by their weights where a fault hides the structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.calibration.qdq import (
    FORMATS,
    Operands,
    Projection,
    Role,
    Scheme,
    find_by_weight,
    find_operands,
    find_parts,
    find_projections,
    quantise_attention,
    quantise_projections,
    quantise_results,
    quantise_weights,
)
from msn_export.calibration.ranges import Watch, histograms, threshold
from msn_export.calibration.smoothquant import find_smoothing_sites, fold
from msn_export.errors import GraphError
from msn_export.files import apart
from msn_export.graph import io
from msn_export.graph.blocks import PRODUCTS, Stream
from msn_export.graph.builder import (
    GraphBuilder,
    array_of,
    constant_of,
    operand,
    producer,
    sizes_of,
)
from msn_export.graph.builder import replace as replace_value
from msn_export.graph.cls_only import narrow_to_first_token
from msn_export.graph.emulate import in_fp64, round_values, widen
from msn_export.graph.fuse import attention_form, fuse_attention
from msn_export.graph.opset import raise_opset
from msn_export.graph.precision import (
    has_quantised_activations,
    is_quantised_core,
    overflowing_weights,
    products_of_quantised_weights,
    quantised_dtype,
    quantised_products,
    type_graph,
)
from msn_export.graph.qdq_places import output_scale, require_matched, result_of
from msn_export.metrics.evaluate import OutputsOf, Reference, Sample, Trial
from msn_export.metrics.tolerances import MARGIN
from msn_export.mixed_precision import MEASURED, choose_fp32_islands, cpu_runner
from msn_export.preprocessing import Preprocessing
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.spec import AttentionForm, Dtype, InputFormat, Observer, Target

# Pictures that ranges are measured anew on, and the fewest that are judged by them. On 4 pictures
# one whose attention flips decides: with q and k times 30 and 100 sound int8 graphs err 3 and 19
# times this baseline, on 8 and 16 less than 2 times.
RANGED = 8


def add_baseline(
    reference: Reference,
    runner: OutputsOf,
    input_format: InputFormat,
    *,
    margin: float = MARGIN,
    fixed: int | None = None,
) -> Reference:
    """Run a baseline on the reference's pictures: its errors are what the precision costs there."""
    size = fixed or min(8, reference.sample.max_batch, len(reference.sample))
    trial = Trial()
    trial.run(runner, reference, input_format, (size,))
    return replace(reference, baseline=trial.errors(), baseline_name=runner.name, margin=margin)


def narrow_like(model: ir.Model, candidate: Stream) -> None:
    """Compute the last block for [CLS] alone where the candidate does, in place.

    Products of one row add in another order than those of many.
    """
    blocks = candidate.blocks
    sizes = sizes_of(blocks[-1].output)
    if len(sizes) != 3 or sizes[1] != 1:
        return
    products = [sum(node.op_type in PRODUCTS for node in block.nodes) for block in blocks]
    narrow_to_first_token(model, split_projection=products[-1] > products[0])


def write_like(
    reference: ir.Model,
    input_format: InputFormat,
    preprocessing: Preprocessing,
    form: AttentionForm,
) -> ir.Model:
    """Copy the fp32 function of a graph, of any precision, as another one is written.

    ``input_format`` is what the copy takes; bytes are normalised as ``preprocessing`` says.
    ``form`` is its attention's; an attention that cannot be matched stays as it is.
    """
    model = raise_opset(widen(reference))
    _take(model, input_format, preprocessing)
    fuse_attention(model, form)
    return model


def _take(model: ir.Model, input_format: InputFormat, preprocessing: Preprocessing) -> None:
    """Give a graph another kind of input, in place.

    ``conv((x * scale - mean) / std)`` is a convolution of ``x``: see ``with_normalisation``.
    """
    images = model.graph.inputs[0]
    held = InputFormat.UINT8 if images.dtype == ir.DataType.UINT8 else InputFormat.FLOAT
    if held is input_format or InputFormat.UINT8 not in {held, input_format}:
        return
    conv = next((node for node in model.graph if node.op_type == "Conv"), None)
    weight = constant_of(conv.inputs[1]) if conv is not None else None
    if conv is None or weight is None or images.shape is None:
        raise GraphError("the graph has no convolution over the image; expected a ViT")
    std = np.asarray(preprocessing.std, np.float64).reshape(1, -1, 1, 1)
    mean = np.asarray(preprocessing.mean, np.float64).reshape(1, -1, 1, 1)
    kernel = weight.astype(np.float64)
    bias = constant_of(conv.inputs[2]) if len(conv.inputs) > 2 else None
    shift = 0.0 if bias is None else bias.astype(np.float64)
    builder = GraphBuilder(model.graph, model.graph[0])
    batch, *sizes = images.shape
    if input_format is InputFormat.UINT8:
        shift = shift - (kernel * mean / std).sum(axis=(1, 2, 3))
        kernel = kernel * preprocessing.scale / std
        channels, height, width = sizes
        taken = ir.Value(
            name=f"{images.name}.bytes", type=ir.TensorType(ir.DataType.UINT8),
            shape=ir.Shape([batch, height, width, channels]),
        )  # fmt: skip
        floats = builder.op("Cast", [taken], {"to": int(ir.DataType.FLOAT)})
        planes = builder.op("Transpose", [floats], {"perm": [0, 3, 1, 2]})
    else:
        kernel = kernel * std / preprocessing.scale
        shift = shift + (kernel * mean / std).sum(axis=(1, 2, 3))
        height, width, channels = sizes
        taken = planes = ir.Value(
            name=f"{images.name}.planes", type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([batch, channels, height, width]),
        )  # fmt: skip
    before = GraphBuilder(model.graph, conv)
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
    model: ir.Model, dtype: Dtype, sample: Sample, input_format: InputFormat, stage: Path
) -> OrtRunner:
    """Type an fp32 graph as the project types one, and open it: the baseline of another graph."""
    if dtype is not Dtype.FP32:
        type_graph(
            model, dtype, choose_fp32_islands(model, MEASURED, dtype, sample, input_format, stage)
        )
    return _open(model, dtype, stage, f"the reference as a graph in {dtype}")


def open_rounded(
    model: ir.Model, dtype: Dtype, sample: Sample, input_format: InputFormat, stage: Path
) -> OrtRunner:
    """Open an fp32 graph with every result rounded: the baseline of an engine, and of our typing.

    onnxruntime's CPU provider keeps fp32 between two operators of an fp16 graph where it can, which
    leaves it 0.6 to 0.75 of this error; an engine writes what each kernel computes.
    """
    islands = set(choose_fp32_islands(model, MEASURED, dtype, sample, input_format, stage))
    islands |= set(overflowing_weights(model, dtype))
    rounded = round_values(model, dtype, islands)
    return _open(rounded, Dtype.FP32, stage, f"the reference with every result rounded to {dtype}")


def open_widened(model: ir.Model, stage: Path) -> OrtRunner:
    """Open the fp32 function of a typed or quantised graph.

    How far the graph is from it is what its precision costs, and what another graph of the same
    weights may differ by.
    """
    return _open(widen(model), Dtype.FP32, stage, "the reference's weights in fp32")


def open_exact(model: ir.Model, stage: Path) -> OrtRunner:
    """Open an fp32 graph in fp64: what it computes without fp32's own rounding."""
    return _open(in_fp64(model), Dtype.FP32, stage, "the graph in fp64")


@dataclass(frozen=True, slots=True)
class OwnRanges:
    """Ranges of activations on the check's own pictures, chosen by ``observer``.

    With ``few`` also those of either half of them, for a candidate of few pictures: its ranges, or
    the check's, may round a few logits well by chance (2.0 % for those of eight pictures, where six
    of the eight give 3.6 to 6.8 %).
    """

    observer: Observer
    few: bool = False


def open_quantised(
    model: ir.Model,
    candidate: ir.Model,
    sample: Sample,
    input_format: InputFormat,
    stage: Path,
    ranges: OwnRanges | None = None,
) -> Iterator[OrtRunner]:
    """Quantise an fp32 graph, written as ``candidate`` is (``write_like``), and open it.

    ``sample`` is what fp32 islands are measured on. Yields the graph with the candidate's scales,
    and with ``ranges`` one more, or three, with ranges of ``RANGED`` pictures of their own, unless
    the candidate has quantised weights alone.
    """
    rest = rest_of(candidate)
    dtype = quantised_dtype(candidate) or rest
    islands = choose_fp32_islands(model, MEASURED, rest, sample, input_format, stage)
    pictures = np.unique(np.linspace(0, len(sample) - 1, RANGED).astype(int)).tolist()

    def measure(share: list[int], graph: ir.Model, names: Sequence[str]) -> dict[str, float]:
        watch = Watch(graph, names, stage)
        parts = [share[at : at + watch.batch] for at in range(0, len(share), watch.batch)]
        fed = (
            (sample.preprocess(part, input_format), [sample.names[i] for i in part])
            for part in parts
        )
        seen = histograms(watch, fed)
        assert ranges is not None
        return {name: threshold(seen[name], ranges.observer, FORMATS[dtype]) for name in names}

    in_8_bits = has_quantised_activations(candidate)
    first = "the candidate's scales" if in_8_bits else "quantised weights alone"
    ways: list[tuple[str, Measure | None]] = [(first, None)]
    if ranges is not None and in_8_bits:
        halves = ", or of half of them," if ranges.few else ""
        name = f"ranges of {len(pictures)} of the images{halves} by {ranges.observer}"
        shares = [pictures, pictures[::2], pictures[1::2]] if ranges.few else [pictures]
        ways += [(name, partial(measure, share)) for share in shares]
    for name, way in ways:
        quantised = quantise_like(model, candidate, rest, way)
        if rest is not Dtype.FP32:
            named = {value.name for node in quantised.graph for value in node.outputs}
            type_graph(quantised, rest, islands.keys() & named)
        yield _open(quantised, dtype, stage, f"the reference in {dtype} with {name}")


def _open(model: ir.Model, dtype: Dtype, stage: Path, name: str) -> OrtRunner:
    path = apart(stage) / "baseline.onnx"
    io.save(model, path)
    runner = cpu_runner(path, dtype, path.parent)
    path.unlink()
    runner.name = f"{name}, in {runner.name}"
    return runner


# Gives each named value of a graph the largest absolute value that 8 bits are to represent.
Measure = Callable[[ir.Model, Sequence[str]], Mapping[str, float]]


def quantise_like(
    model: ir.Model, candidate: ir.Model, rest: Dtype, measure: Measure | None = None
) -> ir.Model:
    """Copy an fp32 graph with Q/DQ where a candidate has it; attention has the same form.

    A product of which the candidate quantises the weight alone has a quantised weight alone.

    ``rest`` is the type of what is not quantised: scales are numbers that it holds. ``measure``
    gives the ranges of activations in place of the candidate's.
    """
    dtype = quantised_dtype(candidate)
    if dtype is None:
        raise GraphError("the candidate has no Q/DQ; expected a quantised graph")
    plain, copy = widen(candidate), model.clone()
    form = attention_form(plain)
    # projections and operands are found in these two forms
    found_in = AttentionForm.PLAIN if form is AttentionForm.PLAIN else AttentionForm.HEADS
    fuse_attention(copy, found_in)
    fuse_attention(plain, found_in, partial=True)
    mine = find_projections(copy)
    chosen = frozenset(products_of_quantised_weights(candidate))
    in_8_bits = frozenset(quantised_products(candidate))
    pairs, stands_for = _matched(mine, copy, plain, chosen)
    nodes = {node.name: node for node in candidate.graph}
    reduced = all(_reduced(nodes[other.node]) for _, other in pairs)
    # of opset 17 every scale is fp32 and a number of fp16: with other scales the weights would be
    # rounded otherwise, which is another error, of twice the size in three logits
    held = [
        _constant_of(nodes[other.node], index, 1)
        for _, other in pairs
        for index in ((0, 1) if other.node in in_8_bits else (1,))
    ]
    runs_on = Target.PORTABLE if rest is Dtype.FP32 and all(map(_fits_fp16, held)) else None
    scheme = Scheme(FORMATS[dtype], rest, reduced, runs_on)
    _smooth_like(copy, plain, mine, pairs)
    whole = [(own, other) for own, other in pairs if other.node in in_8_bits]
    thresholds = {own.x: _scale(nodes[other.node]) * scheme.form.largest for own, other in whole}
    cores = _quantised_cores(copy, candidate) if form is AttentionForm.PLAIN else []
    in_cores = [product for _, softmax in cores for product in _core_products(softmax)]
    products = {nodes[name] for own, _ in pairs for name in stands_for[own.node]}
    require_matched(candidate, {*products, *in_cores})
    results = _results_like(copy, plain, pairs, stands_for, nodes)
    if measure is not None:  # three logits of 8 pictures have no range that holds those of others
        shown = {value.name for value in copy.graph.outputs}
        results = {name: step for name, step in results.items() if name not in shown}
    thresholds |= {name: step * scheme.form.largest for name, step in results.items()}
    for own, softmax in cores:
        names = (own.q, own.k, own.p, own.v)
        steps = (step * scheme.form.largest for step in _core_scales(softmax))
        thresholds |= dict(zip(names, steps, strict=True))
    if measure is not None:
        thresholds = dict(measure(copy, tuple(thresholds)))
        if dtype is not Dtype.INT8:  # fp8's steps are relative: a probability's range is 1
            thresholds |= {own.p: 1.0 for own, _ in cores}
    quantise_results(copy, results, thresholds, scheme)
    quantise_projections(copy, [own for own, _ in whole], thresholds, scheme)
    quantise_weights(copy, [own for own, other in pairs if other.node not in in_8_bits], scheme)
    quantise_attention(copy, [own for own, _ in cores], thresholds, scheme)
    fuse_attention(copy, form)
    return copy


def _matched(
    mine: tuple[Projection, ...], model: ir.Model, plain: ir.Model, chosen: frozenset[str]
) -> tuple[list[tuple[Projection, Projection]], dict[str, frozenset[str]]]:
    """Pair the reference's projections with the candidate's that are quantised.

    A fault may hide the structure; the weights still identify the products. Also gives, by the
    projections' nodes, the products of the candidate that each may stand for.
    """
    try:
        theirs = find_projections(plain)
        pairs = _matched_by_role(mine, theirs)
    except GraphError:
        pairs = find_by_weight(mine, model, plain, chosen)
        return pairs, {own.node: chosen for own, _ in pairs}
    stands_for = {
        own.node: frozenset(p.node for p in theirs if (p.role, p.block) == (own.role, own.block))
        & chosen
        for own in mine
    }
    return [(own, other) for own, other in pairs if other.node in chosen], stands_for


def _matched_by_role(
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
    return float(np.max(_constant_of(product, 0, 1)))


def _reduced(product: ir.Node) -> bool:
    """True where a weight's integers end at 64; its scales must be one an output channel."""
    if _constant_of(product, 1, 1).size < 2:
        raise GraphError(
            f"product {product.name!r} has one scale for its whole weight; no baseline is made of "
            "those"
        )
    return bool(np.abs(_constant_of(product, 1, 0).astype(np.float32)).max() <= 64)


def _fits_fp16(steps: NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore"):
        return bool((steps.astype(np.float16) == steps).all())


def _constant_of(product: ir.Node, index: int, at: int) -> NDArray[np.float32]:
    value = product.inputs[index]
    pair = value.producer() if value is not None else None
    held = constant_of(pair.inputs[at]) if pair is not None else None
    if held is None:
        raise GraphError(f"the scales of product {product.name!r} are not constant")
    return held


def _smooth_like(
    model: ir.Model,
    plain: ir.Model,
    mine: tuple[Projection, ...],
    pairs: Sequence[tuple[Projection, Projection]],
) -> None:
    """Move the powers of two that smoothing moved in the candidate, in place.

    They are read off the weights that read the channels, rounded to whole powers around their
    median, which smoothing leaves at 1: a fault stays a fault.
    """
    others = {own.node: other for own, other in pairs}
    axes = {own.node: own.axis for own, _ in pairs}
    for site in find_smoothing_sites(model, mine):
        readers = [name for name, _ in site.read]
        if not all(name in others for name in readers):
            continue
        own = _lengths(model, {name: axes[name] for name in readers})
        other = _lengths(plain, {others[name].node: others[name].axis for name in readers})
        if own.shape != other.shape:
            continue
        with np.errstate(divide="ignore", invalid="ignore"):
            powers = np.log2(other / own)
        finite = np.isfinite(powers)
        powers[~finite] = np.median(powers[finite]) if finite.any() else 0.0
        powers = np.rint(powers) - np.rint(np.median(powers))
        if powers.any():
            fold(model, site, np.exp2(powers).astype(np.float32))


def _results_like(
    model: ir.Model,
    plain: ir.Model,
    pairs: Sequence[tuple[Projection, Projection]],
    stands_for: Mapping[str, frozenset[str]],
    nodes: Mapping[str | None, ir.Node],
) -> dict[str, float]:
    """Name the results of products that the candidate quantises too, each with its scale.

    Where a packed projection stands for three of the candidate, its result is taken apart in place,
    for each of the three has a scale of its own.
    """
    own_nodes = {node.name: node for node in model.graph}
    found: dict[str, float] = {}
    for own, other in pairs:
        among = stands_for[own.node] if own.role is Role.QKV else {other.node}
        for biased in (False, True):
            scales = {name: output_scale(nodes[name], biased=biased) for name in among}
            if not any(scales.values()):
                continue
            names = find_parts(own, model, plain, among) if own.role is Role.QKV else (other.node,)
            steps = [scales[name] for name in names]
            if not any(steps):
                continue
            result = result_of(own_nodes[own.node], biased=biased)
            results = [result] if len(steps) == 1 else _taken_apart(model, result, len(steps))
            for value, step in zip(results, steps, strict=True):
                if step is None:
                    raise GraphError(f"the results of {', '.join(names)} are not quantised alike")
                found[value.name or ""] = step
    return found


def _taken_apart(model: ir.Model, value: ir.Value, count: int) -> Sequence[ir.Value]:
    """Split a value along its last axis and join it again, in place; give the parts."""
    width = sizes_of(value)[-1]
    if width is None:
        raise GraphError(f"the width of {value.name!r} is open")
    builder = GraphBuilder(model.graph).after(producer(value))
    sizes = builder.constant([width // count] * count, "parts.sizes")
    parts = builder.ops(
        "Split", [value, sizes], {"axis": -1}, outputs=count, name=f"{value.name}.parts"
    )
    replace_value(value, builder.op("Concat", parts, {"axis": -1}, name=f"{value.name}.joined"))
    producer(parts[0]).replace_input_with(0, value)
    io.infer_shapes(model)
    return parts


def _lengths(model: ir.Model, readers: Mapping[str, int]) -> NDArray[np.float64]:
    """Length of each input channel's weights over nodes, by their output axis."""
    nodes = {node.name: node for node in model.graph}
    total: NDArray[np.float64] = np.zeros(1)
    for name, axis in readers.items():
        held = array_of(operand(nodes[name], 1)).astype(np.float64)
        weight = np.moveaxis(held, axis, 0)
        total = total + np.square(weight.reshape(len(weight), -1)).sum(axis=0)
    return np.sqrt(total)


def _quantised_cores(model: ir.Model, candidate: ir.Model) -> list[tuple[Operands, ir.Node]]:
    """Pair the operands of attention with the candidate's softmax where it quantises them."""
    cores = [
        node
        for node in candidate.graph
        if node.op_type == "Softmax" and len(node.outputs[0].shape or ()) == 4
    ]
    if not any(map(is_quantised_core, cores)):
        return []
    operands = find_operands(model)
    if len(cores) != len(operands):
        raise GraphError(
            f"the candidate has {len(cores)} attention cores and the reference {len(operands)}"
        )
    pairs = zip(operands, cores, strict=True)
    return [(own, softmax) for own, softmax in pairs if is_quantised_core(softmax)]


def _core_products(softmax: ir.Node) -> tuple[ir.Node, ir.Node]:
    """Give a quantised core's products: that of q and k, that of probabilities and v."""
    product = softmax
    for _ in range(3):  # QuantizeLinear, DequantizeLinear, the product
        product = next(iter(product.outputs[0].uses())).node
    return producer(softmax.inputs[0]), product


def _core_scales(softmax: ir.Node) -> Iterator[float]:
    """Scales of a quantised core's operands: q, k, probabilities, v."""
    for node in _core_products(softmax):
        for index in range(2):
            yield float(np.max(_constant_of(node, index, 1)))


def rest_of(model: ir.Model) -> Dtype:
    """Type of what is not quantised: that of most of the other weights."""
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
