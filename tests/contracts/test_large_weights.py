"""``trt --fp16`` of a checkpoint with a weight of 119111, wherever it is, stores it finite."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from msn_export.cli import main
from msn_export.graph import io
from msn_export.graph.precision import overflowing_weights
from msn_export.spec import Dtype
from tests.builders.checkpoints import hugging_face
from tests.builders.engine_builds import NEEDS_RTX

pytestmark = NEEDS_RTX

BIG = 119111.0  # fp16 ends at 65504
BLOCK = "encoder.layer.0"
# where the weight is in a checkpoint of transformers, and at which index
PLACES = {
    "query": (f"{BLOCK}.attention.attention.query.weight", (3, 5)),
    "value": (f"{BLOCK}.attention.attention.value.weight", (3, 5)),
    "query bias": (f"{BLOCK}.attention.attention.query.bias", (3,)),
    "proj": (f"{BLOCK}.attention.output.dense.weight", (3, 5)),
    "proj bias": (f"{BLOCK}.attention.output.dense.bias", (3,)),
    "norm gain": (f"{BLOCK}.layernorm_after.weight", (3,)),
    "fc1": (f"{BLOCK}.intermediate.dense.weight", (3, 5)),
    "fc2": (f"{BLOCK}.output.dense.weight", (3, 5)),
    "patch convolution": ("vit.embeddings.patch_embeddings.projection.weight", (3, 1, 2, 2)),
    "patch bias": ("vit.embeddings.patch_embeddings.projection.bias", (3,)),
    "position": ("vit.embeddings.position_embeddings", (0, 4, 3)),
    "final gain": ("vit.layernorm.weight", (3,)),
    "classifier": ("classifier.weight", (1, 5)),
    "classifier bias": ("classifier.bias", (1,)),
}
# what makes the channel that the weight reads so small that nothing but the weight overflows
QUIET = {
    "query": f"{BLOCK}.layernorm_before",
    "value": f"{BLOCK}.layernorm_before",
    "proj": f"{BLOCK}.attention.attention.value",
    "fc1": f"{BLOCK}.layernorm_after",
    "fc2": f"{BLOCK}.intermediate.dense",
    "classifier": "vit.layernorm",
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "hf"
    hugging_face(folder, labels=4)
    return folder


def run(*arguments: object) -> dict:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    told: dict = json.loads(result.stdout)
    return told


def orders(weights: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Give a weight as a compiler may lay it out; in fp16 a convolution has a fourth channel."""
    yield weights
    yield weights.T
    if weights.ndim == 4:
        last = weights.transpose(0, 2, 3, 1)
        yield last
        yield np.concatenate([last, np.zeros_like(last[..., :1])], axis=-1)


def stored(engine: bytes, weights: NDArray[np.float32]) -> list[NDArray[np.generic]]:
    """Find a weight's own bytes in an engine, rounded to fp16 or as they are."""
    with np.errstate(over="ignore"):
        forms = [
            np.ascontiguousarray(order).astype(dtype)
            for dtype in (np.float16, np.float32)
            for order in orders(weights)
        ]
    return [form for form in forms if form.tobytes() in engine]


@pytest.mark.parametrize(
    ("place", "quiet"),
    [*((place, False) for place in PLACES), *((place, True) for place in QUIET)],
)
def test_a_weight_of_119111_is_finite_in_the_engine(place, quiet, checkpoint, tmp_path) -> None:
    shutil.copytree(checkpoint, tmp_path / "hf")
    state = load_file(tmp_path / "hf" / "model.safetensors")
    name, at = PLACES[place]
    state[name][at] = BIG
    if quiet:
        for leaf in ("weight", "bias"):
            state[f"{QUIET[place]}.{leaf}"][5] *= 1e-4
    save_file(state, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    graph, engine = tmp_path / "m.onnx", tmp_path / "m.engine"
    run("onnx", tmp_path / "hf", "-o", graph)
    # where the weight shows in the outputs it hides the images, which no gate lets pass
    unchecked = () if quiet else ("--no-check",)
    told = run("trt", graph, "--fp16", "-o", engine, "--backend", "tensorrt-rtx",
               "--compute-capability", "8.9", *unchecked)  # fmt: skip
    model = io.load(graph)
    ((weight, largest),) = overflowing_weights(model, Dtype.FP16).items()
    assert told["islands"][weight] == pytest.approx(largest)
    assert (len(told["islands"]) == 1) == quiet  # the weight alone overflows
    held = model.graph.initializers[weight].const_value
    assert held is not None
    found = stored(engine.read_bytes(), held.numpy())
    assert found, "the weight is in the engine in a form that this test does not know"
    assert all(np.isfinite(form).all() for form in found)
    assert all(np.abs(form).max() == np.float32(largest) for form in found)
