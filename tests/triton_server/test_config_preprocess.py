"""The ensemble's graph computes what images.normalize computes, bit for bit."""

import numpy as np
import onnxruntime
import pytest

from msn_export import images
from msn_export.errors import SpecError
from msn_export.preprocessing import Preprocessing, preset
from msn_export.spec import ImageSize, TensorSpec
from msn_export.triton_server.config import require_floats, save_graph
from msn_export.triton_server.model import Platform, ServedArtifact


def run(path, pixels):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    assert source.name == "images"
    return session.run(None, {source.name: pixels})[0]


@pytest.mark.parametrize(
    ("channels", "preprocessing"),
    [
        (3, preset("hf", ImageSize(10, 14))),
        (3, Preprocessing("own", ImageSize(10, 14), scale=1.0, mean=(10, 20, 30), std=(3, 7, 11))),
        (1, preset("hf", ImageSize(10, 14), channels=1)),
    ],
)
def test_bytes_become_the_floats_of_normalize(channels, preprocessing, tmp_path) -> None:
    spec = TensorSpec("pixel_values", "float", ("batch", channels, 10, 14))
    save_graph(spec, preprocessing, "batch", tmp_path / "p.onnx")
    pixels = images.noise(preprocessing, 5)
    np.testing.assert_array_equal(
        run(tmp_path / "p.onnx", pixels), images.normalize(pixels, preprocessing)
    )


def test_every_byte_is_normalised_the_same(tmp_path) -> None:
    preprocessing = preset("hf", ImageSize(16, 16))
    save_graph(TensorSpec("x", "float", ("b", 3, 16, 16)), preprocessing, 1, tmp_path / "p.onnx")
    pixels = np.repeat(np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1), 3, axis=3)
    np.testing.assert_array_equal(
        run(tmp_path / "p.onnx", pixels), images.normalize(pixels, preprocessing)
    )


def test_a_model_of_half_floats_gets_them(tmp_path) -> None:
    preprocessing = preset("hf", ImageSize(8, 8))
    save_graph(TensorSpec("x", "float16", ("b", 3, 8, 8)), preprocessing, "b", tmp_path / "p.onnx")
    pixels = images.noise(preprocessing, 2)
    wanted = images.normalize(pixels, preprocessing).astype(np.float16)
    np.testing.assert_array_equal(run(tmp_path / "p.onnx", pixels), wanted)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (("images", "uint8", ("b", 8, 8, 3)), "takes uint8 images itself"),
        (("x", "float", ("b", 3, "h", "w")), "has a dynamic height or width"),
        (("x", "int64", ("b", 3, 8, 8)), r"expected one image input \[b, c, h, w\] of floats"),
        (("x", "float", ("b", 3)), r"expected one image input \[b, c, h, w\] of floats"),
    ],
)
def test_what_cannot_be_fed_is_refused(spec, message, tmp_path) -> None:
    artifact = ServedArtifact(tmp_path / "m.onnx", Platform.ONNX, (TensorSpec(*spec),), ())
    with pytest.raises(SpecError, match=message):
        require_floats(artifact)


def test_other_channels_than_the_preprocessings_are_refused(tmp_path) -> None:
    spec = TensorSpec("x", "float", ("b", 4, 8, 8))
    with pytest.raises(SpecError, match="takes 4 channels, its preprocessing normalises 3"):
        save_graph(spec, preset("hf", ImageSize(8, 8)), "b", tmp_path / "p.onnx")
