"""Mistakes that exporters make, planted one at a time in a graph or its manifest."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export import manifest
from msn_export.graph import io
from msn_export.graph.patch import Patch, replace
from msn_export.manifest import Manifest
from msn_export.sidecar import sha256_of

Weights = NDArray[np.float32]
BLOCK = 3  # of 6: neither the first, whose variance is small, nor the last


def edit(model: ir.Model, name: str, change: Callable[[Weights], Weights]) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    changed = np.ascontiguousarray(change(value.const_value.numpy().copy()), np.float32)
    value.const_value = ir.tensor(changed, name=name)


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
    patch = Patch(model.graph, gelu)
    scaled = patch.op("Mul", [gelu.inputs[0], patch.constant(np.float32(1.702), "quick")])
    result = patch.op("Mul", [gelu.inputs[0], patch.op("Sigmoid", [scaled])])
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
    patch = Patch(model.graph, producer)
    drawn = np.random.default_rng(0).standard_normal((width, width)) * size / width**0.5
    held = patch.constant(drawn.astype(np.float32), "tail.weight")
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
    patch = Patch(model.graph, norm)
    x = norm.inputs[0]
    axes = patch.constant(np.array([0]), "batch.axis")
    mean = patch.op("ReduceMean", [x, axes], {"keepdims": 1})
    apart = patch.op("Sub", [mean, x])
    part = patch.op("Mul", [apart, patch.constant(np.float32(size), "batch.size")])
    norm.replace_input_with(0, patch.op("Add", [x, part]))
    tidy(model)


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
    changed = dataclasses.replace(
        known, output=target.name, sha256=sha256_of(target), bytes=target.stat().st_size, **changes
    )
    manifest.manifest_path(target).write_text(manifest.seal(changed))
    return target
