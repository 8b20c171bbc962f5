"""Mistakes that exporters make, planted one at a time in a graph or its manifest."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export import manifest
from msn_export.graph import io
from msn_export.graph.builder import GraphBuilder, replace
from msn_export.manifest import Manifest
from tests.builders.artifacts import seal_over

Weights = NDArray[np.float32]
BLOCK = 3  # of 6: neither the first, whose variance is small, nor the last


def edit(
    model: ir.Model, name: str, change: Callable[[Weights], Weights], size: float = 1.0
) -> None:
    """Move a weight ``size`` of the way to what ``change`` makes of it, in the type it is held in.

    An 8-bit weight is dequantised, changed and quantised with the scales that the graph has.
    """
    held = next(
        value
        for suffix in ("", ".fp16", ".bf16", ".int8", ".fp8")
        if (value := model.graph.initializers.get(name + suffix)) is not None
    )
    assert held.const_value is not None
    stored = held.const_value.numpy()
    scale, largest = np.ones((), np.float32), None
    if stored.dtype.itemsize == 1:
        scale, largest = _scale(held), np.abs(stored.astype(np.float32)).max()
    clean = stored.astype(np.float32) * scale
    changed = toward(clean, change, size) / scale
    if largest is not None:
        changed = np.clip(changed, -largest, largest)
    if stored.dtype == np.int8:
        changed = np.rint(changed)
    held.const_value = ir.tensor(np.ascontiguousarray(changed.astype(stored.dtype)), name=held.name)


def toward(clean: Weights, change: Callable[[Weights], Weights], size: float) -> Weights:
    changed = change(clean.copy())
    return changed if size == 1 else clean + np.float32(size) * (changed - clean)


def _scale(held: ir.Value) -> Weights:
    """Read an 8-bit weight's scales, shaped to be multiplied with it."""
    (use,) = held.uses()
    scale = use.node.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    assert held.shape is not None
    shape = [1] * len(held.shape)
    if "axis" in use.node.attributes:
        shape[use.node.attributes["axis"].as_int()] = -1
    return scale.const_value.numpy().astype(np.float32).reshape(shape)


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def swap_heads(model: ir.Model, block: int = BLOCK) -> None:
    """Head 0 and 1 change places in the packed projection, not in the one that reads them."""
    order = np.r_[64:128, 0:64, 128:384]
    columns = np.concatenate([order + part * 384 for part in range(3)])
    edit(model, f"blocks.{block}.attn.qkv.weight", lambda w: w[:, columns])
    edit(model, f"blocks.{block}.attn.qkv.bias", lambda b: b[columns])


def wrong_epsilon(model: ir.Model, block: int = BLOCK) -> None:
    norm = node(model, f"blocks.{block}.norm1.LayerNormalization")
    norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


def tanh_gelu(model: ir.Model, block: int = BLOCK) -> None:
    gelu = node(model, f"blocks.{block}.mlp.Gelu")
    gelu.attributes["approximate"] = ir.AttrString("approximate", "tanh")


def dropped_bias(model: ir.Model, block: int = BLOCK) -> None:
    edit(model, f"blocks.{block}.attn.proj.bias", np.zeros_like)


def four_bits(model: ir.Model, block: int = BLOCK) -> None:
    """Round one block's matrices to 4 bits a column, as weight-only quantisation does."""

    def rounded(weights: Weights) -> Weights:
        scale = np.abs(weights).max(axis=0) / 7
        return np.round(weights / scale) * scale

    for leaf in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        edit(model, f"blocks.{block}.{leaf}.weight", rounded)


def dropped_query_bias(model: ir.Model, block: int = BLOCK) -> None:
    """What an exporter loses that knows of no bias on queries."""

    def dropped(bias: Weights) -> Weights:
        bias[: len(bias) // 3] = 0
        return bias

    edit(model, f"blocks.{block}.attn.qkv.bias", dropped)


def larger_gain(model: ir.Model, block: int = BLOCK, factor: float = 1.01) -> None:
    edit(model, f"blocks.{block}.norm1.weight", lambda w: w * factor)


def quick_gelu(model: ir.Model, block: int = BLOCK) -> None:
    """x * sigmoid(1.702 x) for GELU."""
    gelu = node(model, f"blocks.{block}.mlp.Gelu")
    builder = GraphBuilder(model.graph, gelu)
    scaled = builder.op("Mul", [gelu.inputs[0], builder.constant(np.float32(1.702), "quick")])
    result = builder.op("Mul", [gelu.inputs[0], builder.op("Sigmoid", [scaled])])
    replace(gelu.outputs[0], result)
    tidy(model)


def no_residual(model: ir.Model, block: int = BLOCK, *, mlp: bool = False) -> None:
    """A branch takes the stream's place where it should be added to it."""
    added = addition(model, block, mlp=mlp)
    branch = added.inputs[1]
    assert branch is not None
    added.outputs[0].replace_all_uses_with(branch, replace_graph_outputs=True)
    tidy(model)


def no_branch(model: ir.Model, block: int = BLOCK) -> None:
    """Attention is lost: the stream goes past it."""
    added = addition(model, block)
    stream = added.inputs[0]
    assert stream is not None
    added.outputs[0].replace_all_uses_with(stream)
    tidy(model)


def post_norm(model: ir.Model, block: int = BLOCK) -> None:
    """Normalise each sum, not each branch's input, in one block."""
    for leaf, mlp in (("norm1", False), ("norm2", True)):
        norm = node(model, f"blocks.{block}.{leaf}.LayerNormalization")
        total = addition(model, block, mlp=mlp).outputs[0]
        stream = norm.inputs[0]
        assert stream is not None
        norm.outputs[0].replace_all_uses_with(stream)
        readers = list(total.uses())
        model.graph.remove(norm)
        producer = total.producer()
        assert producer is not None
        model.graph.insert_after(producer, norm)
        norm.replace_input_with(0, total)
        for use in readers:
            use.node.replace_input_with(use.idx, norm.outputs[0])
    tidy(model)


def tail(model: ir.Model, size: float = 0.1) -> None:
    """Another residual step after the model: y + f(y) for the first output."""
    output = model.graph.outputs[0]
    width = output.shape[-1] if output.shape is not None else None
    assert isinstance(width, int)
    producer = output.producer()
    assert producer is not None
    builder = GraphBuilder(model.graph, producer)
    drawn = np.random.default_rng(0).standard_normal((width, width)) * size / width**0.5
    held = builder.constant(drawn.astype(np.float32), "tail.weight")
    product = ir.node("MatMul", [output, held], name="tail.MatMul")
    total = ir.node("Add", [output, product.outputs[0]], name="tail.Add")
    model.graph.insert_after(producer, [product, total])
    name, output.name = output.name, "before.tail"
    total.outputs[0].name, product.outputs[0].name = name, "tail.MatMul"
    total.outputs[0].type, total.outputs[0].shape = output.type, output.shape
    model.graph.outputs[0] = total.outputs[0]
    tidy(model)


def mixed_batch(model: ir.Model, block: int = BLOCK, size: float = 0.1) -> None:
    """A block's MLP is given a little of the batch's mean: right where there is one image."""
    norm = node(model, f"blocks.{block}.norm2.LayerNormalization")
    builder = GraphBuilder(model.graph, norm)
    x = norm.inputs[0]
    axes = builder.constant(np.array([0]), "batch.axis")
    assert x is not None
    mean = builder.op("ReduceMean", [x, axes], {"keepdims": 1})
    apart = builder.op("Sub", [mean, x])
    part = builder.op("Mul", [apart, number(builder, x, size)])
    norm.replace_input_with(0, builder.op("Add", [x, part]))
    tidy(model)


def wrong_in_batches_of(count: int, model: ir.Model, block: int = BLOCK, size: float = 0.1) -> None:
    """A block's MLP reads larger numbers where the batch has ``count`` images."""
    product = node(model, f"blocks.{block}.mlp.fc1.MatMul")
    builder = GraphBuilder(model.graph, product)
    x = product.inputs[0]
    assert x is not None
    batch = builder.op("Shape", [x], {"end": 1})
    met = builder.op("Equal", [batch, builder.constant(np.array([count]), "batch.count")])
    more = builder.op("Mul", [builder.op("Cast", [met], {"to": 1}), number(builder, x, size)])
    product.replace_input_with(0, builder.op("Add", [x, builder.op("Mul", [x, more])]))
    tidy(model)


def mix(
    model: ir.Model,
    value: ir.Value,
    size: float,
    faulty: Callable[[GraphBuilder, ir.Value], ir.Value],
) -> None:
    """Let what reads ``value`` inside the graph read ``value + size (faulty - value)``."""
    readers = list(value.uses())
    first = next(node for node in model.graph if any(use.node is node for use in readers))
    builder = GraphBuilder(model.graph, first)
    mixed = _moved(builder, value, size, faulty(builder, value))
    for use in readers:
        use.node.replace_input_with(use.idx, mixed)
    tidy(model)


def _moved(builder: GraphBuilder, value: ir.Value, size: float, faulty: ir.Value) -> ir.Value:
    part = builder.op("Mul", [builder.op("Sub", [faulty, value]), number(builder, value, size)])
    return builder.op("Add", [value, part])


def number(builder: GraphBuilder, like: ir.Value, x: float) -> ir.Value:
    """Add a number of the type that a value has."""
    return array(builder, like, np.asarray(x), "fault.number")


def array(builder: GraphBuilder, like: ir.Value, values: NDArray[Any], name: str) -> ir.Value:
    """Add an array of the type that a value has."""
    assert like.dtype is not None
    return builder.constant(values.astype(like.dtype.numpy()), name)


def addition(model: ir.Model, block: int, *, mlp: bool = False) -> ir.Node:
    """Find a block's addition to the stream; its inputs are the stream, then the branch."""
    return node(model, f"blocks.{block}.Add_2" if mlp else f"blocks.{block}.Add")


def tidy(model: ir.Model) -> None:
    RemoveUnusedNodesPass()(model)
    io.infer_shapes(model)


def bgr(model: ir.Model) -> None:
    edit(model, "patch.weight", lambda w: w[:, ::-1])


def transposed_positions(model: ir.Model) -> None:
    def transposed(positions: Weights) -> Weights:
        rows = round((positions.shape[1] - 1) ** 0.5)
        grid = positions[0, 1:].reshape(rows, rows, -1).swapaxes(0, 1)
        positions[0, 1:] = grid.reshape(rows * rows, -1)
        return positions

    edit(model, "pos_embed", transposed)


def shifted_classes(model: ir.Model) -> None:
    edit(model, "classifier.weight", lambda w: np.roll(w, 1, axis=int(np.argmin(w.shape))))
    edit(model, "classifier.bias", lambda b: np.roll(b, 1))


# --- in what a graph gives, whatever it is made of ------------------------------------------------


def _through(
    model: ir.Model,
    output: str,
    change: Callable[[GraphBuilder, ir.Value], ir.Value],
    size: float = 1.0,
) -> None:
    """Let a graph give one of its outputs ``size`` of the way to what ``change`` makes of it."""
    index = [value.name for value in model.graph.outputs].index(output)
    value = model.graph.outputs[index]
    last = model.graph[-1]
    end = ir.node("Identity", [value])
    end.name = end.outputs[0].name = f"{output}.end"
    model.graph.insert_after(last, [end])
    builder = GraphBuilder(model.graph, end)
    changed = change(builder, value)
    if size != 1:
        changed = _moved(builder, value, size, changed)
    changed.shape, changed.type = value.shape, value.type
    value.name, changed.name = f"{output}.before", output
    model.graph.outputs[index] = changed
    model.graph.remove(end, safe=True)


def scaled(output: str, factor: float) -> Callable[[ir.Model], None]:
    """Multiply an output."""

    def change(builder: GraphBuilder, value: ir.Value) -> ir.Value:
        return builder.op("Mul", [value, builder.constant(np.float32(factor), "fault.factor")])

    return lambda model: _through(model, output, change)


def constant(output: str, vector: Weights) -> Callable[[ir.Model], None]:
    """Give the same for every image."""

    def change(builder: GraphBuilder, value: ir.Value) -> ir.Value:
        nothing = builder.op("Mul", [value, builder.constant(np.float32(0), "fault.zero")])
        return builder.op(
            "Add", [nothing, builder.constant(vector.astype(np.float32), "fault.same")]
        )

    return lambda model: _through(model, output, change)


def changed_cls(output: str, kind: str, size: float = 1.0) -> Callable[[ir.Model], None]:
    """Change the [CLS] row of tokens [b, n, dim] alone: halved, negated, zeroed, or rolled by 1."""

    def change(builder: GraphBuilder, value: ir.Value) -> ir.Value:
        def rows(start: int, end: int) -> ir.Value:
            numbers = [np.asarray([x], np.int64) for x in (start, end, 1)]
            names = [f"fault.{x}.{i}" for i, x in enumerate((start, end, 1))]
            bounds = [builder.constant(x, n) for x, n in zip(numbers, names, strict=True)]
            return builder.op("Slice", [value, *bounds])

        first, rest = rows(0, 1), rows(1, 1 << 30)
        if kind == "rolled":
            assert value.shape is not None
            order = np.roll(np.arange(int(value.shape[2])), 1)  # type: ignore[call-overload]
            turned = builder.constant(order, "fault.order")
            first = builder.op("Gather", [first, turned], {"axis": 2})
        else:
            factor = {"halved": 0.5, "negated": -1.0, "zeroed": 0.0}[kind]
            first = builder.op("Mul", [first, builder.constant(np.float32(factor), "fault.factor")])
        return builder.op("Concat", [first, rest], {"axis": 1})

    return lambda model: _through(model, output, change, size)


def brightest_negated(output: str, above: float, size: float = 1.0) -> Callable[[ir.Model], None]:
    """Negate an output [b, ...] for images [b, c, h, w] whose mean is above a number."""

    def change(builder: GraphBuilder, value: ir.Value) -> ir.Value:
        pixels = builder.graph.inputs[0]
        shape = builder.constant(np.asarray([0, -1], np.int64), "fault.shape")
        axes = builder.constant(np.asarray([1], np.int64), "fault.axes")
        mean = builder.op("ReduceMean", [builder.op("Reshape", [pixels, shape]), axes])
        limit = builder.constant(np.float32(above), "fault.limit")
        two = builder.constant(np.float32(2), "fault.two")
        one = builder.constant(np.float32(1), "fault.one")
        bright = builder.op("Cast", [builder.op("Greater", [mean, limit])], {"to": 1})
        sign = builder.op("Sub", [one, builder.op("Mul", [bright, two])])
        if value.shape is not None and len(value.shape) > 2:
            behind = builder.constant(np.asarray([-1, 1, 1], np.int64), "fault.behind")
            sign = builder.op("Reshape", [sign, behind])
        return builder.op("Mul", [value, sign])

    return lambda model: _through(model, output, change, size)


def plant(source: Path, target: Path, fault: Callable[[ir.Model], None]) -> Path:
    """Write a graph with a fault, under a manifest that vouches for it."""
    model = io.load(source)
    fault(model)
    io.save(model, target)
    return describe(source, target)


def describe(source: Path, target: Path, **changes: object) -> Path:
    """Give ``target`` the manifest of ``source`` with fields changed."""
    if not target.exists():
        target.write_bytes(source.read_bytes())
    known = manifest.read(source)
    assert isinstance(known, Manifest)
    seal_over(target, dataclasses.replace(known, **changes))
    return target
