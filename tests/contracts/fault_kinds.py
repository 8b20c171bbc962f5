"""Kinds of mistakes, each drawn at a place of a graph by a seed, with a knob for its size."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.graph.builder import GraphBuilder
from tests.contracts import faults
from tests.contracts.faults import Weights, addition, array, edit, mix, node, toward

TOKENS, LOGITS = "last_hidden_state", "logits"


@dataclass(frozen=True)
class Fault:
    """One mistake; ``plant(model, size)`` makes it, ``size`` 1 in full.

    ``stage`` is where ``drift`` should say that the two part.
    """

    kind: str
    place: str
    stage: str
    plant: Callable[[ir.Model, float], None]
    has_size: bool = True

    def __str__(self) -> str:
        return f"{self.kind} ({self.place})"


@dataclass(frozen=True)
class Graph:
    """What a fault needs to know of the graph it is planted in; ``means`` are the images' means."""

    model: ir.Model
    means: NDArray[Any]

    @property
    def depth(self) -> int:
        return sum(n.op_type == "Attention" for n in self.model.graph)

    @property
    def outputs(self) -> list[str]:
        return [value.name or "" for value in self.model.graph.outputs]

    def sizes(self, name: str) -> tuple[int, ...]:
        """Give a node's output shape without the batch."""
        shape = node(self.model, name).outputs[0].shape
        assert shape is not None
        return tuple(int(size) for size in list(shape)[1:])  # type: ignore[call-overload]

    def quantised(self) -> list[str]:
        """Name the products that have 8-bit weights."""
        return [
            n.name or ""
            for n in self.model.graph
            if n.op_type in {"MatMul", "Gemm"}
            and (made := n.inputs[1].producer() if n.inputs[1] else None) is not None
            and made.op_type == "DequantizeLinear"
        ]


class Kind(Protocol):
    """Draws a fault of a kind in a graph; None where the graph has no place for it."""

    def __call__(self, graph: Graph, rng: np.random.Generator, /) -> Fault | None: ...


KINDS: dict[str, Kind] = {}


def kind(name: str) -> Callable[[Kind], Kind]:
    def known(draw: Kind) -> Kind:
        KINDS[name] = draw
        return draw

    return known


def _block(graph: Graph, rng: np.random.Generator) -> int:
    return int(rng.integers(graph.depth))


# --- attention ------------------------------------------------------------------------------------


@kind("scale of attention")
def _scale_of_attention(graph: Graph, rng: np.random.Generator) -> Fault:
    block, factor = _block(graph, rng), float(rng.choice([0.5, 0.8, 1.25, 2.0]))
    root = graph.sizes(f"blocks.{block}.attn.Attention")[-1] ** -0.5

    def plant(model: ir.Model, size: float) -> None:
        attention = node(model, f"blocks.{block}.attn.Attention")
        scale = root * (1 + size * (factor - 1))
        attention.attributes["scale"] = ir.AttrFloat32("scale", scale)

    return Fault("scale of attention", f"block {block}, x {factor}", f"block {block}", plant)


def _at_attention(
    name: str, block: int, place: str, faulty: Callable[[GraphBuilder, ir.Value], ir.Value]
) -> Fault:
    def plant(model: ir.Model, size: float) -> None:
        mix(model, node(model, f"blocks.{block}.attn.Attention").outputs[0], size, faulty)

    return Fault(name, f"block {block}{place}", f"block {block}", plant)


@kind("heads swapped")
def _heads_swapped(graph: Graph, rng: np.random.Generator) -> Fault | None:
    block = _block(graph, rng)
    heads = graph.sizes(f"blocks.{block}.attn.Attention")[0]
    if heads < 2:
        return None
    order = np.arange(heads)
    one, other = rng.choice(heads, 2, replace=False)
    order[[one, other]] = order[[other, one]]
    return _at_attention(
        "heads swapped", block, f", {one} and {other}", partial(_gathered, order=order, axis=1)
    )


def _gathered(
    builder: GraphBuilder, value: ir.Value, *, order: NDArray[Any], axis: int
) -> ir.Value:
    return builder.op("Gather", [value, builder.constant(order, "fault.order")], {"axis": axis})


@kind("a head zeroed")
def _head_zeroed(graph: Graph, rng: np.random.Generator) -> Fault:
    block = _block(graph, rng)
    heads = graph.sizes(f"blocks.{block}.attn.Attention")[0]
    head = int(rng.integers(heads))
    mask = (np.arange(heads) != head).reshape(1, heads, 1, 1)

    def zeroed(builder: GraphBuilder, value: ir.Value) -> ir.Value:
        return builder.op("Mul", [value, array(builder, value, mask, "fault.mask")])

    return _at_attention("a head zeroed", block, f", head {head}", zeroed)


@kind("softmax over the wrong axis")
def _wrong_axis(graph: Graph, rng: np.random.Generator) -> Fault | None:
    whole = [b for b in range(graph.depth) if graph.sizes(f"blocks.{b}.attn.Attention")[1] > 1]
    if not whole:
        return None
    block = int(rng.choice(whole))

    def over_queries(builder: GraphBuilder, value: ir.Value) -> ir.Value:
        attention = value.producer()
        assert attention is not None
        q, k, v = attention.inputs[:3]
        assert q is not None
        assert q.shape is not None
        root = float(q.shape[-1]) ** -0.5  # type: ignore[arg-type]
        turned = builder.op("Transpose", [k], {"perm": [0, 1, 3, 2]})
        scores = builder.op(
            "Mul", [builder.op("MatMul", [q, turned]), faults.number(builder, q, root)]
        )
        return builder.op("MatMul", [builder.op("Softmax", [scores], {"axis": -2}), v])

    return _at_attention("softmax over the wrong axis", block, "", over_queries)


@kind("queries and keys exchanged")
def _exchanged(graph: Graph, rng: np.random.Generator) -> Fault | None:
    whole = [b for b in range(graph.depth) if graph.sizes(f"blocks.{b}.attn.Attention")[1] > 1]
    if not whole:
        return None

    def exchanged(builder: GraphBuilder, value: ir.Value) -> ir.Value:
        attention = value.producer()
        assert attention is not None
        q, k, v = attention.inputs[:3]
        return builder.op("Attention", [k, q, v], dict(attention.attributes))

    return _at_attention("queries and keys exchanged", int(rng.choice(whole)), "", exchanged)


# --- the stream and its norms ---------------------------------------------------------------------


@kind("order of tokens")
def _order_of_tokens(graph: Graph, rng: np.random.Generator) -> Fault | None:
    leaves = [
        (block, leaf)
        for block in range(graph.depth)
        for leaf in ("attn.proj.Add", "mlp.fc2.Add")
        if graph.sizes(f"blocks.{block}.{leaf}")[0] > 1
    ]
    if not leaves:
        return None
    block, leaf = leaves[int(rng.integers(len(leaves)))]
    tokens = graph.sizes(f"blocks.{block}.{leaf}")[0]
    order = np.roll(np.arange(tokens), 1) if rng.random() < 0.5 else np.arange(tokens)[::-1].copy()

    def plant(model: ir.Model, size: float) -> None:
        branch = node(model, f"blocks.{block}.{leaf}").outputs[0]
        mix(model, branch, size, partial(_gathered, order=order, axis=1))

    return Fault("order of tokens", f"block {block}, {leaf}", f"block {block}", plant)


@kind("a norm missing")
def _norm_missing(graph: Graph, rng: np.random.Generator) -> Fault:
    block, leaf = _block(graph, rng), rng.choice(["norm1", "norm2"])

    def plant(model: ir.Model, size: float) -> None:
        norm = node(model, f"blocks.{block}.{leaf}.LayerNormalization")
        stream = norm.inputs[0]
        mix(model, norm.outputs[0], size, lambda builder, _: builder.op("Identity", [stream]))

    return Fault("a norm missing", f"block {block}, {leaf}", f"block {block}", plant)


@kind("epsilon")
def _epsilon(graph: Graph, rng: np.random.Generator) -> Fault:
    block, leaf = _block(graph, rng), rng.choice(["norm1", "norm2"])

    def plant(model: ir.Model, size: float) -> None:
        norm = node(model, f"blocks.{block}.{leaf}.LayerNormalization")
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-6 + size)

    return Fault("epsilon", f"block {block}, {leaf}", f"block {block}", plant)


@kind("gain")
def _gain(graph: Graph, rng: np.random.Generator) -> Fault:
    block = _block(graph, rng)
    name, stage = [
        (f"blocks.{block}.norm1", f"block {block}"),
        (f"blocks.{block}.norm2", f"block {block}"),
        ("norm", "final norm"),
    ][int(rng.integers(3))]
    factor, share = float(rng.choice([0.5, 2.0])), float(rng.choice([1.0, 0.1]))
    seed = int(rng.integers(1 << 31))

    def scaled(gain: Weights) -> Weights:
        chosen = np.random.default_rng(seed).random(gain.shape) < max(share, 1 / gain.size)
        return np.where(chosen, gain * factor, gain)

    return _in_weight("gain", f"{name}.weight", stage, scaled, f"x {factor} in {share:.0%}")


def _in_weight(
    kind: str, name: str, stage: str, change: Callable[[Weights], Weights], what: str = ""
) -> Fault:
    def plant(model: ir.Model, size: float) -> None:
        edit(model, name, change, size)

    return Fault(kind, f"{name}{', ' if what else ''}{what}", stage, plant)


@kind("a bias dropped")
def _bias_dropped(graph: Graph, rng: np.random.Generator) -> Fault:
    block = _block(graph, rng)
    name, part, stage = [
        (f"blocks.{block}.attn.qkv.bias", "queries", f"block {block}"),
        (f"blocks.{block}.attn.qkv.bias", "values", f"block {block}"),
        (f"blocks.{block}.attn.proj.bias", "", f"block {block}"),
        (f"blocks.{block}.norm1.bias", "", f"block {block}"),
        (f"blocks.{block}.norm2.bias", "", f"block {block}"),
        (f"blocks.{block}.mlp.fc1.bias", "", f"block {block}"),
        (f"blocks.{block}.mlp.fc2.bias", "", f"block {block}"),
        ("patch.bias", "", "patch embedding"),
        ("norm.bias", "", "final norm"),
        ("classifier.bias", "", LOGITS),
    ][int(rng.integers(10))]
    third = {"queries": 0, "values": 2}.get(part)

    def dropped(bias: Weights) -> Weights:
        if third is None:
            return np.zeros_like(bias)
        bias.reshape(3, -1)[third] = 0
        return bias

    return _in_weight("a bias dropped", name, stage, dropped, part)


@kind("another activation")
def _activation(graph: Graph, rng: np.random.Generator) -> Fault:
    block, name = _block(graph, rng), rng.choice(["QuickGELU", "tanh GELU", "ReLU"])

    def other(builder: GraphBuilder, value: ir.Value) -> ir.Value:
        gelu = value.producer()
        assert gelu is not None
        x = gelu.inputs[0]
        assert x is not None
        if name == "ReLU":
            return builder.op("Relu", [x])
        if name == "tanh GELU":
            return builder.op("Gelu", [x], {"approximate": "tanh"})
        part = builder.op("Sigmoid", [builder.op("Mul", [x, faults.number(builder, x, 1.702)])])
        return builder.op("Mul", [x, part])

    def plant(model: ir.Model, size: float) -> None:
        mix(model, node(model, f"blocks.{block}.mlp.Gelu").outputs[0], size, other)

    return Fault("another activation", f"block {block}, {name}", f"block {block}", plant)


@kind("a residual missing")
def _residual(graph: Graph, rng: np.random.Generator) -> Fault:
    block, mlp, kept = _block(graph, rng), bool(rng.integers(2)), int(rng.integers(2))

    def plant(model: ir.Model, size: float) -> None:
        added = addition(model, block, mlp=mlp)
        alone = added.inputs[kept]
        mix(model, added.outputs[0], size, lambda builder, _: builder.op("Identity", [alone]))

    place = f"block {block}, {'MLP' if mlp else 'attention'}, {('stream', 'branch')[kept]} alone"
    return Fault("a residual missing", place, f"block {block}", plant)


@kind("images mixed in a batch")
def _mixed(graph: Graph, rng: np.random.Generator) -> Fault:
    block = _block(graph, rng)
    return Fault(
        "images mixed in a batch", f"block {block}", f"block {block}",
        lambda model, size: faults.mixed_batch(model, block, size),
    )  # fmt: skip


# --- weights --------------------------------------------------------------------------------------


def _matrix(graph: Graph, rng: np.random.Generator) -> tuple[str, str]:
    block = _block(graph, rng)
    leaf = rng.choice(["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
    return f"blocks.{block}.{leaf}.weight", f"block {block}"


def _zeroed(axis: int, seed: int, weight: Weights) -> Weights:
    """Zero one to a tenth of the rows or columns."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 2 + weight.shape[axis] // 10))
    chosen = rng.choice(weight.shape[axis], count, replace=False)
    if axis:
        weight[:, chosen] = 0
    else:
        weight[chosen] = 0
    return weight


@kind("rows zeroed")
def _rows(graph: Graph, rng: np.random.Generator) -> Fault:
    name, stage = _matrix(graph, rng)
    return _in_weight("rows zeroed", name, stage, partial(_zeroed, 0, int(rng.integers(1 << 31))))


@kind("columns zeroed")
def _columns(graph: Graph, rng: np.random.Generator) -> Fault:
    name, stage = _matrix(graph, rng)
    seed = int(rng.integers(1 << 31))
    return _in_weight("columns zeroed", name, stage, partial(_zeroed, 1, seed))


@kind("exponents flipped")
def _exponents(graph: Graph, rng: np.random.Generator) -> Fault:
    """One bit of the exponent of some weights: 2, 4 or 16 times as large, or as small."""
    name, stage = _matrix(graph, rng)
    seed, count, bit = int(rng.integers(1 << 31)), int(rng.choice([1, 4, 16])), rng.integers(3)

    def flipped(weight: Weights) -> Weights:
        flat = weight.astype(np.float32).ravel()
        chosen = np.random.default_rng(seed).choice(flat.size, count, replace=False)
        bits = flat.view(np.uint32)
        bits[chosen] ^= np.uint32(1 << (23 + int(bit)))
        return flat.reshape(weight.shape)

    return _in_weight("exponents flipped", name, stage, flipped, f"{count}, bit {bit}")


@kind("weights of 4 bits")
def _four_bits(graph: Graph, rng: np.random.Generator) -> Fault:
    name, stage = _matrix(graph, rng)

    def rounded(weight: Weights) -> Weights:
        scale = np.abs(weight).max(axis=0) / 7
        scale = np.where(scale > 0, scale, 1)
        return np.asarray(np.round(weight / scale) * scale)

    return _in_weight("weights of 4 bits", name, stage, rounded)


@kind("positions")
def _positions(graph: Graph, rng: np.random.Generator) -> Fault:
    what = str(rng.choice(["transposed", "one further", "dropped", "the first alone"]))

    def wrong(positions: Weights) -> Weights:
        if what == "one further":
            return np.roll(positions, 1, axis=1)
        if what == "dropped":
            positions[0, 1:] = 0
        elif what == "the first alone":
            positions[0, 0] = 0
        else:
            rows = round((positions.shape[1] - 1) ** 0.5)
            grid = positions[0, 1:].reshape(rows, rows, -1).swapaxes(0, 1)
            positions[0, 1:] = grid.reshape(rows * rows, -1)
        return positions

    return _in_weight("positions", "pos_embed", "patch embedding", wrong, what)


@kind("order of channels")
def _channels(graph: Graph, rng: np.random.Generator) -> Fault:
    order = np.asarray([(2, 1, 0), (1, 0, 2), (0, 2, 1)][int(rng.integers(3))])
    return _in_weight(
        "order of channels", "patch.weight", "patch embedding", lambda w: w[:, order], f"{order}"
    )


# --- outputs --------------------------------------------------------------------------------------


@kind("scale of an output")
def _output_scale(graph: Graph, rng: np.random.Generator) -> Fault:
    output, factor = str(rng.choice(graph.outputs)), float(rng.choice([0.5, 2.0]))

    def plant(model: ir.Model, size: float) -> None:
        faults.scaled(output, 1 + size * (factor - 1))(model)

    return Fault("scale of an output", f"{output} x {factor}", output, plant)


@kind("one image")
def _one_image(graph: Graph, rng: np.random.Generator) -> Fault:
    output, above = str(rng.choice(graph.outputs)), float(np.sort(graph.means)[-2:].mean())

    def plant(model: ir.Model, size: float) -> None:
        faults.brightest_negated(output, above, size)(model)

    return Fault("one image", f"{output}, the brightest", output, plant)


@kind("one class")
def _one_class(graph: Graph, rng: np.random.Generator) -> Fault | None:
    if LOGITS not in graph.outputs:
        return None
    weight = graph.model.graph.initializers
    shape = next(v.shape for name, v in weight.items() if name.startswith("classifier.weight"))
    assert shape is not None
    column, change = (
        int(rng.integers(min(int(s) for s in shape))),
        str(rng.choice(["zero", "twice"])),
    )  # type: ignore[arg-type]

    def wrong(weight: Weights) -> Weights:
        classes = weight if weight.shape[0] <= weight.shape[1] else weight.T
        classes[column] *= 2 if change == "twice" else 0
        return weight

    return _in_weight("one class", "classifier.weight", LOGITS, wrong, f"{column}: {change}")


@kind("[CLS] alone")
def _cls_alone(graph: Graph, rng: np.random.Generator) -> Fault | None:
    if TOKENS not in graph.outputs:
        return None
    change = str(rng.choice(["halved", "negated", "zeroed", "rolled"]))

    def plant(model: ir.Model, size: float) -> None:
        faults.changed_cls(TOKENS, change, size)(model)

    return Fault("[CLS] alone", change, TOKENS, plant)


@kind("NaN")
def _nan(graph: Graph, rng: np.random.Generator) -> Fault:
    """One weight that is not finite: it has no size."""
    block, value = _block(graph, rng), float(rng.choice([np.nan, np.inf]))
    leaf = str(rng.choice(["norm1.bias", "attn.proj.bias", "mlp.fc2.bias"]))

    def wrong(bias: Weights) -> Weights:
        bias[0] = value
        return bias

    def plant(model: ir.Model, size: float) -> None:
        edit(model, f"blocks.{block}.{leaf}", wrong)

    name = "NaN" if np.isnan(value) else "infinity"
    return Fault("NaN", f"{name} in block {block}, {leaf}", f"block {block}", plant, has_size=False)


# --- scales of 8 bits -----------------------------------------------------------------------------


@kind("scale of a weight")
def _weight_scale(graph: Graph, rng: np.random.Generator) -> Fault | None:
    products = graph.quantised()
    if not products:
        return None
    product, factor = str(rng.choice(products)), float(rng.choice([0.5, 2.0]))
    seed, share = int(rng.integers(1 << 31)), float(rng.choice([1.0, 0.1]))

    def scaled(scale: Weights) -> Weights:
        chosen = np.random.default_rng(seed).random(scale.shape) < share
        return np.where(chosen, scale * factor, scale)

    def plant(model: ir.Model, size: float) -> None:
        _rescale(model, _read(node(model, product), 1), 1, scaled, size)

    place = f"{product}, x {factor} in {share:.0%}"
    return Fault("scale of a weight", place, _stage_of(product), plant)


@kind("scale of an activation")
def _activation_scale(graph: Graph, rng: np.random.Generator) -> Fault | None:
    """Rounded with one scale and multiplied with another."""
    products = graph.quantised()
    if not products:
        return None
    product, factor = str(rng.choice(products)), float(rng.choice([0.5, 2.0]))

    def plant(model: ir.Model, size: float) -> None:
        _rescale(model, _read(node(model, product), 0), 1, lambda s: s * factor, size)

    place = f"{product}, x {factor}"
    return Fault("scale of an activation", place, _stage_of(product), plant)


@kind("range of an activation")
def _activation_range(graph: Graph, rng: np.random.Generator) -> Fault | None:
    """Too small, so that values are cut off, or too large, so that the steps are coarse."""
    products = graph.quantised()
    if not products:
        return None
    product, factor = str(rng.choice(products)), float(rng.choice([1 / 64, 64.0]))

    def plant(model: ir.Model, size: float) -> None:
        widen_range(model, product, factor**size)

    place = f"{product}, x {factor:g}"
    return Fault("range of an activation", place, _stage_of(product), plant)


@kind("ranges of all activations")
def _all_ranges(graph: Graph, rng: np.random.Generator) -> Fault | None:
    """Calibrated on other images, or on images that were preprocessed otherwise."""
    products = graph.quantised()
    if not products:
        return None
    factor = float(rng.choice([1 / 64, 64.0]))

    def plant(model: ir.Model, size: float) -> None:
        for product in products:
            widen_range(model, product, factor**size)

    stage = _stage_of(products[0])
    return Fault("ranges of all activations", f"x {factor:g}", stage, plant)


def widen_range(model: ir.Model, product: str, factor: float) -> None:
    """Multiply the scales that a product's input is rounded and multiplied with."""
    pair = _read(node(model, product), 0)
    rounded = pair.inputs[0]
    assert rounded is not None
    before = rounded.producer()
    assert before is not None
    for half in (before, pair):
        _rescale(model, half, 1, lambda s: s * factor)


def _read(product: ir.Node, index: int) -> ir.Node:
    value = product.inputs[index]
    made = value.producer() if value is not None else None
    assert made is not None
    return made


def _rescale(
    model: ir.Model,
    half: ir.Node,
    index: int,
    change: Callable[[Weights], Weights],
    size: float = 1.0,
) -> None:
    """Give a QuantizeLinear or DequantizeLinear another scale than others that read it."""
    value = half.inputs[index]
    assert value is not None
    assert value.const_value is not None
    held = value.const_value.numpy()
    scale = toward(held.astype(np.float32), change, size).astype(held.dtype)
    builder = GraphBuilder(model.graph, half)
    half.replace_input_with(index, builder.constant(np.asarray(scale), f"{half.name}.other"))


def _stage_of(name: str) -> str:
    part, *rest = name.split(".")
    return f"block {rest[0]}" if part == "blocks" else part


# --- drawing --------------------------------------------------------------------------------------


def drawn(graph: Graph, seed: int) -> Iterator[Fault]:
    """Draw a fault of each kind that the graph has a place for."""
    rng = np.random.default_rng(seed)
    for draw in KINDS.values():
        fault = draw(graph, rng)
        if fault is not None:
            yield fault
