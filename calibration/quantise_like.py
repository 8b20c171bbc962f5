"""The reference with Q/DQ where a candidate has it: what 8 bits cost there.

The products are matched by structure, or by their weights where a fault hides the structure. The
weights are quantised anew; the ranges of activations are the candidate's own, a choice and no
fault, or measured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.calibration.qdq import (
    FORMATS,
    Operands,
    Projection,
    Scheme,
    find_by_weight,
    find_operands,
    find_projections,
    quantise_attention,
    quantise_projections,
)
from msn_export.calibration.smoothquant import find_smoothing_sites, fold
from msn_export.errors import GraphError
from msn_export.graph.builder import array_of, operand, producer
from msn_export.graph.emulate import widen
from msn_export.graph.fuse import attention_form, fuse_attention
from msn_export.graph.precision import is_quantised_core, quantised_dtype, quantised_products
from msn_export.spec import AttentionForm, Dtype

# Gives each named value of a graph the largest absolute value that 8 bits are to represent.
Measure = Callable[[ir.Model, Sequence[str]], Mapping[str, float]]


def quantise_like(
    model: ir.Model, candidate: ir.Model, rest: Dtype, measure: Measure | None = None
) -> ir.Model:
    """Copy an fp32 graph with Q/DQ where a candidate has it.

    Args:
        model: fp32, its attention in the candidate's form.
        candidate: where Q/DQ is, with which scales of activations.
        rest: the type of what is not quantised: scales are numbers that it holds.
        measure: gives the ranges of activations in place of the candidate's.
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
    pairs = _matched(mine, copy, plain, frozenset(quantised_products(candidate)))
    nodes = {node.name: node for node in candidate.graph}
    reduced = all(_reduced(nodes[other.node]) for _, other in pairs)
    scheme = Scheme(FORMATS[dtype], rest, reduced=reduced)
    _smooth_like(copy, plain, mine, pairs)
    thresholds = {own.x: _scale(nodes[other.node]) * scheme.form.largest for own, other in pairs}
    cores = _quantised_cores(copy, candidate) if form is AttentionForm.PLAIN else []
    for own, softmax in cores:
        names = (own.q, own.k, own.p, own.v)
        steps = (step * scheme.form.largest for step in _core_scales(softmax))
        thresholds |= dict(zip(names, steps, strict=True))
    if measure is not None:
        thresholds = dict(measure(copy, tuple(thresholds)))
        if dtype is not Dtype.INT8:  # fp8's steps are relative: a probability's range is 1
            thresholds |= {own.p: 1.0 for own, _ in cores}
    quantise_projections(copy, [own for own, _ in pairs], thresholds, scheme)
    quantise_attention(copy, [own for own, _ in cores], thresholds, scheme)
    fuse_attention(copy, form)
    return copy


def _matched(
    mine: tuple[Projection, ...], model: ir.Model, plain: ir.Model, chosen: frozenset[str]
) -> list[tuple[Projection, Projection]]:
    """Pair the reference's projections with the candidate's that are quantised.

    A fault may hide the structure; the weights are known all the same.
    """
    try:
        pairs = _matched_by_role(mine, find_projections(plain))
    except GraphError:
        pairs = find_by_weight(mine, model, plain, chosen)
    return [(own, other) for own, other in pairs if other.node in chosen]


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
        known = np.isfinite(powers)
        powers[~known] = np.median(powers[known]) if known.any() else 0.0
        powers = np.rint(powers) - np.rint(np.median(powers))
        if powers.any():
            fold(model, site, np.exp2(powers).astype(np.float32))


def _lengths(model: ir.Model, readers: Mapping[str, int]) -> NDArray[np.float64]:
    """Give the length of each input channel's weights over nodes, by their output axis."""
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


def _core_scales(softmax: ir.Node) -> Iterator[float]:
    """Read the scales of a quantised core's operands: q, k, probabilities, v."""
    scores = producer(softmax.inputs[0])
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
