"""Simplify a graph with onnxsim, and keep the result only if it is smaller and the same."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime

from msn_export.graph.io import refill, skeleton
from msn_export.graph.summary import operators

# Turns each MatMul + Add of a [b, n, dim] tensor into Reshape, Gemm, Reshape: 286 -> 322 nodes
# on ViT-S, and TensorRT then loses the fusion of the bias.
HARMFUL_PASSES = ["fuse_matmul_add_bias_into_gemm_batched"]


@dataclass(frozen=True, slots=True)
class Simplified:
    """What simplification did: the graph to go on with, node counts, and why."""

    model: ir.Model
    before: int
    after: int
    reason: str


def simplify(model: ir.Model) -> Simplified:
    """Run onnxsim over the skeleton of ``model``; the input is not changed.

    The result is kept only if it has fewer nodes and, run on the same seeded input, the same
    outputs.
    """
    import onnxsim  # it imports torch, two seconds that most graphs need not wait for

    before = len(model.graph)
    try:
        with _unheard():
            proto, _ = onnxsim.simplify(
                skeleton(model), skipped_optimizers=HARMFUL_PASSES, check_n=0
            )
        candidate = refill(proto, model)
        reason = _objection(model, candidate)
    except Exception as error:  # noqa: BLE001  theirs have no base; a smaller graph is no need
        reason = f"not kept: {' '.join(str(error).split())[:200]}"
    if reason:
        return Simplified(model, before, before, reason)
    after = len(candidate.graph)
    return Simplified(candidate, before, after, f"kept: {before - after} nodes fewer")


@contextmanager
def _unheard() -> Iterator[None]:
    """Drop what is printed on stderr by C++ too: names out of a hostile file, and tracebacks.

    onnxsim tells so what it cannot fold, and leaves it as it is.
    """
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123  for its descriptor
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _objection(model: ir.Model, candidate: ir.Model) -> str:
    """Say why the simplified graph is not taken; nothing if it is."""
    before, after = len(model.graph), len(candidate.graph)
    if operators(candidate) == operators(model):
        return "nothing left to simplify"
    if after >= before:
        return f"not kept: {after} nodes instead of {before}"
    difference = _difference(model, candidate)
    # the passes fold and drop nodes; arithmetic moves by rounding at most
    return "" if difference <= 1e-5 else f"not kept: outputs moved by {difference:.1e}"


def _difference(model: ir.Model, candidate: ir.Model) -> float:
    """Run both on one seeded batch; the largest difference relative to the largest output."""
    feeds = {}
    generator = np.random.default_rng(0)
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else 1 for size in value.shape or ()]
        assert value.dtype is not None
        assert value.name is not None
        feeds[value.name] = (generator.random(shape) * 2).astype(value.dtype.numpy())
    wanted, got = _run(model, feeds), _run(candidate, feeds)
    worst = np.float64(0.0)
    for want, have in zip(wanted, got, strict=True):
        scale = np.maximum(np.abs(want).max(), 1.0)
        worst = np.maximum(worst, np.abs(want.astype(np.float64) - have).max() / scale)
    return float(worst)


def _run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs: list[np.ndarray] = session.run(None, feeds)
    return outputs
