"""Timings are merged, written whole, and never cost an engine. The configuration is a stand-in."""

import os
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from msn_export.engine import compile
from msn_export.spec import ComputeCapability


def holding(content: bytes) -> MagicMock:
    """Stand in for an IBuilderConfig whose cache serialises to ``content``."""
    config = MagicMock()
    config.get_timing_cache.return_value.serialize.return_value = content
    return config


# --- where it lies --------------------------------------------------------------------------------


def path_of() -> Path | None:
    return compile.default_path("11.4.0.106", "NVIDIA H200 NVL", ComputeCapability(9, 0))


def test_caches_are_kept_by_version_and_gpu(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert path_of() == Path("/cache/msn-export/timing-11.4.0.106-sm90-nvidia-h200-nvl")


def test_without_a_cache_folder_of_his_own_it_lies_in_the_users_home(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    path = path_of()
    assert path is not None
    assert path.parent == Path("/home/me/.cache/msn-export")


def test_a_user_without_a_home_has_none(monkeypatch) -> None:
    # a container that runs as a number which /etc/passwd does not have
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert path_of() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert path_of() is None


# --- before a build -------------------------------------------------------------------------------


def test_a_first_build_starts_with_none(tmp_path) -> None:
    config = holding(b"")
    assert compile.attach(config, tmp_path / "timing.cache") is None
    config.create_timing_cache.assert_called_once_with(b"")


def test_a_later_one_takes_what_is_there(tmp_path) -> None:
    (tmp_path / "timing.cache").write_bytes(b"timings")
    config = holding(b"")
    assert compile.attach(config, tmp_path / "timing.cache") is None
    config.create_timing_cache.assert_called_once_with(b"timings")


@pytest.mark.parametrize("refusal", ["no cache", "not set"])
def test_a_foreign_cache_is_started_anew(tmp_path, refusal) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(b"of another GPU")
    config = holding(b"")
    fresh = MagicMock()
    config.create_timing_cache.side_effect = [
        None if refusal == "no cache" else MagicMock(),
        fresh,
    ]
    config.set_timing_cache.side_effect = lambda cache, **_: cache is fresh
    assert compile.attach(config, path) == (
        f"timing cache {path} is of another TensorRT or GPU, or damaged; it is started anew"
    )
    assert config.create_timing_cache.call_args.args == (b"",)
    assert config.set_timing_cache.call_args.args == (fresh,)


def test_a_cache_that_cannot_be_read_is_told_and_the_build_goes_on(tmp_path) -> None:
    config = holding(b"")
    assert compile.attach(config, tmp_path) == (
        f"timing cache {tmp_path} is a folder; give another file; it is started anew"
    )
    config.set_timing_cache.assert_called_once()


# --- after it -------------------------------------------------------------------------------------


def test_timings_are_merged_and_written_whole(tmp_path) -> None:
    path = tmp_path / "new" / "timing.cache"
    assert compile.store(holding(b"first"), path) is None
    assert path.read_bytes() == b"first"
    config = holding(b"both")
    assert compile.store(config, path) is None
    config.create_timing_cache.assert_called_once_with(b"first")
    config.get_timing_cache.return_value.combine.assert_called_once()
    assert path.read_bytes() == b"both"
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_file_is_replaced(tmp_path) -> None:
    path = tmp_path / "timing.cache"
    path.write_bytes(b"damaged")
    config = holding(b"new")
    config.create_timing_cache.return_value = None
    assert compile.store(config, path) is None
    assert path.read_bytes() == b"new"


def test_timings_that_cannot_be_kept_are_told_and_leave_nothing(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "timing.cache"
    assert compile.store(holding(b"x"), path) == (
        f"timing cache {path} cannot be written (File exists); timings are not kept"
    )

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    path = tmp_path / "timing.cache"
    assert "(No space left on device); timings are not kept" in str(
        compile.store(holding(b"x"), path)
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
