"""A manifest is compared with itself and with its graph before its numbers decide on memory."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from msn_export import manifest
from msn_export.artifact import Artifact
from msn_export.commands.embed import run_embed
from msn_export.embedding.job import EmbedJob
from msn_export.errors import ManifestError, MsnExportError, RunnerError
from msn_export.host import require_memory
from msn_export.manifest import Manifest, require_input
from msn_export.preprocessing import Preprocessing
from msn_export.runtime import open_runner
from msn_export.spec import BatchRange, ImageSize, TensorSpec
from msn_export.triton_server.model import read_artifact
from tests.builders.manifests import example

IMAGE = TensorSpec("x", "float", ("batch", 3, 32, 32))
PIXELS = TensorSpec("x", "uint8", ("batch", 32, 32, 3))


def made(**changes: object) -> Preprocessing:
    preprocessing = example().preprocessing
    assert preprocessing is not None
    return replace(preprocessing, **changes)  # type: ignore[arg-type]


IMPOSSIBLE: dict[str, tuple[dict[str, object], str]] = {
    "profiles": ({"profiles": (BatchRange(),) * 65}, "65 profiles, at most 64 can be"),
    "size": (
        {"preprocessing": made(size=ImageSize(64, 64), short_side=73)},
        "an input ['batch', 3, 32, 32], and preprocessing that makes [3, 64, 64]",
    ),
    "channels": (
        {"preprocessing": made(mean=(0.5,), std=(0.5,))},
        "an input ['batch', 3, 32, 32], and preprocessing that makes [1, 32, 32]",
    ),
    "layout": (
        {"inputs": (replace(PIXELS, shape=("batch", 3, 32, 32)),)},
        "an input ['batch', 3, 32, 32], and preprocessing that makes [32, 32, 3]",
    ),
    "rank": (
        {"inputs": (replace(IMAGE, shape=()),)},
        "an input [], and preprocessing that makes [3, 32, 32]",
    ),
    "short side": (
        {"preprocessing": made(short_side=513)}, "pictures resized to 513 pixels for a crop of",
    ),
    "squash": (
        {"preprocessing": made(short_side=None, squash=ImageSize(32, 16384))},
        "pictures resized to 16384 pixels for a crop of 32x32",
    ),
    "batch": (
        {"inputs": (replace(IMAGE, shape=(4, 3, 32, 32)),), "profiles": (BatchRange(1, 4, 8),)},
        "an input [4, 3, 32, 32], and batches 1:4:8",
    ),
}  # fmt: skip


def write(tmp_path: Path, described: Manifest) -> Path:
    path = tmp_path / "m.engine.json"
    path.write_text(manifest.seal(described), encoding="utf-8")
    return path


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE.keys())
def test_numbers_that_no_export_writes_are_one_line(tmp_path, changes, message) -> None:
    described = example(**{"inputs": (IMAGE,), **changes})
    with pytest.raises(ManifestError) as caught:
        manifest.read_unverified(write(tmp_path, described))
    assert f"m.engine.json has {message}" in str(caught.value)
    assert str(caught.value).endswith("; export the artifact again")


@pytest.mark.parametrize("taken", [IMAGE, PIXELS, replace(IMAGE, shape=(4, 3, 32, 32))])
def test_what_an_export_writes_is_read(tmp_path, taken) -> None:
    fixed = taken.shape[0] == 4
    profiles = (BatchRange(4, 4, 4),) if fixed else (BatchRange(), BatchRange(1, 1, 999_999))
    described = example(inputs=(taken,), profiles=profiles)
    assert manifest.read_unverified(write(tmp_path, described)) == described


def test_a_batch_of_more_than_can_be_asked_for_is_refused(tmp_path) -> None:
    text = manifest.seal(example())
    plain = text.replace('"max": 8', '"max": 1000000000')
    path = tmp_path / "m.engine.json"
    path.write_text(plain, encoding="utf-8")
    with pytest.raises(ManifestError, match="its seal does not fit"):
        manifest.read_unverified(path)
    with pytest.raises(MsnExportError, match="batch range 1:8:1000000000 is out of range"):
        BatchRange(1, 8, 10**9)


def test_an_input_that_the_graph_does_not_have_is_refused() -> None:
    described = example(inputs=(IMAGE,))
    require_input(described, (replace(IMAGE, shape=("n", 3, 32, 32)),), "m.onnx")
    for other in (
        replace(IMAGE, name="y"),
        replace(IMAGE, dtype="float16"),
        replace(IMAGE, shape=("n", 3, 64, 64)),
        replace(IMAGE, shape=(2, 3, 32, 32)),
        replace(IMAGE, shape=("n", 3, 32)),
    ):
        with pytest.raises(ManifestError, match=r"m.onnx takes . float.*its manifest says x float"):
            require_input(described, (other,), "m.onnx")


def fixed(path: Path) -> Path:
    """A graph of another tool for batches of a million images."""
    image = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [999_999, 3, 32, 32])
    flat = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [999_999, 3072])
    node = onnx.helper.make_node("Flatten", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [image], [flat])
    onnx.save(onnx.helper.make_model(graph, ir_version=9, opset_imports=[
        onnx.helper.make_opsetid("", 17)
    ]), path)  # fmt: skip
    return path


OPENED: dict[str, Callable[[Path], object]] = {
    "runner": open_runner,
    "artifact": lambda path: Artifact.open(path).image_input,
    "triton": read_artifact,
    "embed": lambda path: run_embed(EmbedJob(path, path.parent, path.with_name("e.npy"))),
}


@pytest.mark.parametrize("read", OPENED.values(), ids=OPENED.keys())
def test_a_fixed_batch_is_refused_by_the_memory_it_would_take(tmp_path, monkeypatch, read) -> None:
    monkeypatch.setattr("msn_export.host.available_memory", lambda: 2**34)
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(RunnerError) as caught:
        read(fixed(tmp_path / "m.onnx"))
    assert str(caught.value) == (
        f"{tmp_path / 'm.onnx'} takes batches of 999,999 images alone, whose input is 11.4 GiB and "
        "8 times that while it runs; 16.0 GiB are free: export it with a smaller or a dynamic batch"
    )


def test_a_batch_that_fits_is_taken(monkeypatch) -> None:
    monkeypatch.setattr("msn_export.host.available_memory", lambda: 8 * 4 * 3 * 32 * 32)
    require_memory("m.onnx", 1, (3, 32, 32), 4)
    with pytest.raises(RunnerError):
        require_memory("m.onnx", 2, (3, 32, 32), 4)
