"""A contender runs every picture once for its outputs, then whole batches for its times."""

from pathlib import Path

import numpy as np
import pytest

from msn_export import images
from msn_export.benchmark.contenders import Placement, artifact, origin_of, torch_entry
from msn_export.benchmark.worker import Server, _failure
from msn_export.errors import CheckpointError, SpecError
from msn_export.preprocessing import preset
from msn_export.schema import to_plain
from msn_export.spec import Dtype, ImageSize
from tests.builders.tiny_artifacts import classifier

SIZE = ImageSize(32, 32)
PREPROCESSING = preset("hf", SIZE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("worker"), "--batch", "1:4:8")


def opening(kind: str, model: Path) -> dict:
    entry = artifact(model, Placement(1), model.name)
    if kind == "onnx":
        return entry.opening
    origin = origin_of([entry], None, ("logits",), SIZE)
    return torch_entry(kind, origin, Placement(1), Dtype.FP32).opening


def outputs_of(kind: str, model: Path, folder: Path) -> tuple[Server, np.ndarray]:
    """Run five pictures, two at a time."""
    np.save(folder / "pixels.npy", images.noise(PREPROCESSING, 5))
    server = Server()
    server.open(opening(kind, model))
    pixels, preprocessing = str(folder / "pixels.npy"), to_plain(PREPROCESSING)
    server.set_images({"pixels": pixels, "preprocessing": preprocessing})
    server.warm_up({"batch": 2, "outputs": str(folder / "outputs.npz")})
    with np.load(folder / "outputs.npz") as file:
        return server, file["logits"]


def test_an_artifact_and_pytorch_give_the_same_outputs_a_row_for_each_picture(
    model, tmp_path
) -> None:
    server, ours = outputs_of("onnx", model, tmp_path)
    _, theirs = outputs_of("eager", model, tmp_path)
    assert ours.shape == (5, 3)
    # the gate of an fp32 graph is 1e-4
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    times = server.time({"seconds": 0.0})["nanoseconds"]
    assert len(times) == 1
    assert times[0] > 0
    assert server.memory({})["peak_rss_bytes"] > 1e6
    assert server.memory({})["cuda_graphs"] is None


def test_a_checkpoint_that_cannot_be_compared_is_refused(model) -> None:
    request = opening("sdpa", model)
    other = {**request, "origin": {**request["origin"], "sha256": "ab" * 32}}
    with pytest.raises(CheckpointError, match=r"has other weights \(.* than the artifact was made"):
        Server().open(other)
    none = {**request, "origin": {**request["origin"], "outputs": ["pooled"]}}
    with pytest.raises(SpecError, match=r"outputs \(pooled\) are none of .*nothing to compare"):
        Server().open(none)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("no", name="torch"),
         "package torch is not installed; pip install 'msn-export[export]'"),
        (MemoryError(), "there is not enough memory"),
        (TypeError("odd\nmore"), "TypeError: odd"),
        (ValueError(), "ValueError: no message"),
    ],
)  # fmt: skip
def test_an_error_of_a_library_is_one_line(error, message) -> None:
    assert _failure(error) == {"failed": message}
