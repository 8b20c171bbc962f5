"""A model that OpenVINO compiled is there for the next process, and is no error when it is not."""

import fcntl
import functools
import os
import re
from pathlib import Path

import numpy as np
import pytest

from msn_export import files
from msn_export.errors import GraphError
from msn_export.runtime import model_cache, open_runner
from msn_export.runtime.model_cache import ModelCache
from msn_export.runtime.openvino import OpenVinoRunner
from tests.builders.artifacts import classifier, copy_of
from tests.builders.networks import Network

IMAGES = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "msn-export"


@pytest.fixture
def model(cache, tmp_path) -> Path:
    return copy_of(classifier(), tmp_path)


@functools.cache
def wanted() -> np.ndarray:
    with open_runner(classifier(), providers=["cpu"]) as runner:
        logits: np.ndarray = runner(IMAGES).logits
    return logits


def opened(model: Path, **options: object) -> str:
    """Open and run a model as a process of its own would, and say what became of its cache."""
    with open_runner(model, providers=["openvino"], **options) as runner:
        assert isinstance(runner, OpenVinoRunner)
        # the order of additions, 1e-6 measured
        np.testing.assert_allclose(runner(IMAGES).logits, wanted(), atol=1e-5)
        assert "\n" not in runner.model_cache
        return runner.model_cache


def test_a_second_process_compiles_nothing(cache, model) -> None:
    first = opened(model)
    (folder,) = cache.iterdir()
    (blob,) = folder.glob("*.blob")
    size = f"{blob.stat().st_size:,}"
    assert first == f"made anew; {size} bytes written to {folder}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert opened(model) == f"loaded {size} bytes from {folder}"


def test_another_file_precision_hint_or_place_is_another_model(cache, model, tmp_path) -> None:
    (tmp_path / "moved").mkdir()
    (tmp_path / "other").mkdir()
    for path, options in (
        (model, {}),
        (model, {"hint": "throughput"}),
        (model, {"threads": 1}),
        (copy_of(model, tmp_path / "moved"), {}),
        (copy_of(classifier("--target", "portable"), tmp_path / "other"), {}),
    ):
        assert opened(path, **options).startswith("made anew; ")
    assert len(list(cache.iterdir())) == 5
    os.utime(model, ns=(1, 1))
    assert opened(model).startswith("made anew; ")


@pytest.mark.parametrize(
    "damage",
    [
        lambda blob: blob.write_bytes(blob.read_bytes()[:-5]),
        lambda blob: blob.write_bytes(blob.read_bytes()[:-5] + b"wrong"),
        lambda blob: blob.write_bytes(b""),
        lambda blob: blob.with_name("other.blob").write_bytes(b"more"),
        lambda blob: blob.with_name("sha256").unlink(),
        lambda blob: blob.with_name("sha256").write_bytes(b"\xff"),
    ],
)
def test_what_is_damaged_is_made_anew(cache, model, damage) -> None:
    opened(model)
    (folder,) = cache.iterdir()
    (blob,) = folder.glob("*.blob")
    blob.chmod(0o600)
    damage(blob)
    assert opened(model).startswith(f"made anew: {folder} is damaged; ")
    assert opened(model).startswith("loaded ")


def test_what_a_killed_process_left_is_made_anew(cache, model) -> None:
    opened(model)
    (folder,) = cache.iterdir()
    for file in folder.iterdir():
        file.unlink()
    assert opened(model).startswith("made anew; ")


def test_others_folders_are_not_used(cache, model, tmp_path, monkeypatch) -> None:
    opened(model)
    (folder,) = cache.iterdir()
    folder.chmod(0o777)
    off = rf"off: {re.escape(str(folder))} cannot be used \({{}}\)"
    assert re.fullmatch(off.format("others may write it"), opened(model))
    folder.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert re.fullmatch(off.format("others may write it"), opened(model))
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    assert re.fullmatch(off.format("it is no folder"), opened(model))


def test_a_place_that_cannot_be_written_is_no_error(cache, model) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(b"a file where the folder should be")
    assert re.fullmatch(r"off: .* cannot be used \(File exists\)", opened(model))


def test_a_user_without_a_home_has_none(model, monkeypatch) -> None:
    monkeypatch.setattr(model_cache, "cache_folder", lambda: None)
    assert opened(model) == "off: there is no cache folder; set XDG_CACHE_HOME or HOME"


def test_a_folder_that_another_process_keeps_locked_is_not_waited_for(
    cache, model, monkeypatch
) -> None:
    opened(model)
    (folder,) = cache.iterdir()
    monkeypatch.setattr(files, "_PATIENCE", 0.0)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert re.fullmatch(r"off: .* \(another process keeps the folder locked\)", opened(model))
    finally:
        os.close(lock)


def test_models_that_were_used_longest_ago_make_room(cache, model, tmp_path, monkeypatch) -> None:
    opened(model)
    (first,) = cache.iterdir()
    size = sum(blob.stat().st_size for blob in first.glob("*.blob"))
    monkeypatch.setattr(model_cache, "_BYTES", int(2.5 * size))
    opened(model, threads=1)
    (second,) = set(cache.iterdir()) - {first}
    os.utime(second, ns=(1, 1))
    opened(model)  # used last
    opened(model, threads=2)
    assert len(list(cache.iterdir())) == 2
    assert first in set(cache.iterdir())
    assert second not in set(cache.iterdir())


def test_a_cache_that_openvino_cannot_use_is_no_error(cache, model, monkeypatch) -> None:
    run = ModelCache.compile

    def on_a_full_disk(self, compile_model):
        def failing(more):
            if "CACHE_DIR" in more:
                raise GraphError("No space left on device")
            return compile_model(more)

        return run(self, failing)

    monkeypatch.setattr(ModelCache, "compile", on_a_full_disk)
    assert re.fullmatch(r"off: OpenVINO cannot use \S+", opened(model))


def test_a_graph_without_a_manifest_is_not_kept(cache, tmp_path) -> None:
    """Its weights may be in another file, which no hash covers."""
    graph = Network().graph(tmp_path / "m.onnx")
    with open_runner(graph, providers=["openvino"]) as runner:
        assert isinstance(runner, OpenVinoRunner)
        assert runner.model_cache == (
            "off: weights may lie in files beside a graph without a manifest"
        )
    assert not cache.exists()
