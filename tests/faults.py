"""Mistakes that exporters make, planted one at a time in a graph or its manifest."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export import manifest
from msn_export.graph import io
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
