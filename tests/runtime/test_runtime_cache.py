"""Kernels that TensorRT-RTX compiled are there for the next process, and cost no engine."""

import fcntl
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msn_export import files
from msn_export.runtime import runtime_cache
from msn_export.runtime.runtime_cache import _FILES as FILES
from msn_export.runtime.runtime_cache import cache_path
from msn_export.spec import ComputeCapability
from tests.builders.networks import Network, compute
from tests.builders.trt_bench import DEVICE, Bench, make_bench
from tests.fakes.tensorrt_stand_in import IRuntimeCache, IRuntimeConfig

NETWORK = Network()


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    made = make_bench("config", monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield made
    made.recorder.live()
    assert made.problems() == []
    assert made.recorder.live() == {}


@pytest.fixture
def path(bench, tmp_path) -> Path:
    """Give the file of an engine that ran with three images."""
    run(bench)
    (file,) = (tmp_path / "cache" / "msn-export").iterdir()
    return file


def run(bench: Bench, *counts: int) -> str:
    """Run an engine as a process of its own would, and give what became of its cache."""
    with bench.open() as runner:
        assert runner.runtime_cache == "not used yet"
        for count in counts or (3,):
            images = NETWORK.images(count)
            np.testing.assert_array_equal(
                runner(images).embedding, compute(NETWORK, images)["embedding"]
            )
    state: str = runner.runtime_cache
    assert "\n" not in state
    return state


def test_a_second_process_compiles_nothing(bench, tmp_path) -> None:
    first = run(bench, 3, 4)
    (file,) = (tmp_path / "cache" / "msn-export").iterdir()
    size = file.stat().st_size
    assert first == f"made anew; {size} bytes written to {file}"
    assert file.stat().st_mode & 0o777 == 0o600
    assert bench.stand_in._compiled == 2
    assert run(bench, 3, 4) == f"loaded {size} bytes from {file}"
    assert bench.stand_in._compiled == 2
    assert run(bench, 3, 4, 5).startswith(f"loaded {size} bytes from {file}; {size + 3} bytes wr")
    assert bench.stand_in._compiled == 3


def test_the_contexts_of_an_engine_share_one(bench) -> None:
    held = threading.Barrier(2)

    def hold(runner: Any) -> None:
        with runner._pool.slot() as slot, runner._gpu.current():
            held.wait()  # both have one
            slot.staging.upload("pixel_values", NETWORK.images(3), slot.stream)
            slot.enqueue(0, 3, slot.staging.addresses)

    with bench.open(contexts=2) as runner:
        threads = [threading.Thread(target=hold, args=(runner,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        caches = {id(config._cache) for config in bench.stand_in._configs}
        assert (len(bench.stand_in._configs), len(caches)) == (2, 1)
        assert bench.recorder.count("create_runtime_cache") == 1
    assert bench.stand_in._compiled == 1


@pytest.mark.parametrize("on_gpu", [False, True])
def test_it_is_written_while_a_service_runs_for_that_may_be_killed(bench, tmp_path, on_gpu) -> None:
    library = bench.library()
    give = library.to_gpu if on_gpu else np.asarray
    with bench.open() as runner:
        sizes = []
        for call in range(1, 11):
            runner(give(NETWORK.images(call)))
            (file,) = (tmp_path / "cache" / "msn-export").iterdir()
            sizes.append(file.stat().st_size)
        assert len(set(sizes[:9])) == 1
        assert sizes[9] > sizes[8]


def test_what_is_not_in_the_first_calls_is_written_at_the_end(bench, path) -> None:
    before = path.stat().st_size
    with bench.open() as runner:
        runner(NETWORK.images(3))
        runner(NETWORK.images(5))
        assert path.stat().st_size == before
    assert path.stat().st_size > before


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b"damaged" * 1000),
        lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"580", b"570") + b" " * 1000),
        lambda path: path.write_bytes(b""),
    ],
    ids=["damaged", "truncated", "of another driver", "empty"],
)
def test_a_file_that_does_not_fit_is_made_anew_with_a_note(bench, path, damage) -> None:
    damage(path)
    size = path.stat().st_size
    assert run(bench) == (
        f"made anew: {path} is damaged, or of another TensorRT-RTX, driver or GPU ({size:,} bytes)"
        f"; {len(path.read_bytes())} bytes written to {path}"
    )
    assert run(bench).startswith("loaded ")


def test_a_pipe_is_not_waited_for(bench, path) -> None:
    path.unlink()
    os.mkfifo(path)
    assert run(bench).startswith(f"made anew: {path} cannot be read (it is no regular file); ")
    assert run(bench).startswith("loaded ")


def test_a_folder_in_its_place_is_left(bench, path) -> None:
    path.unlink()
    path.mkdir()
    assert run(bench) == (
        f"made anew: {path} cannot be read (Is a directory); "
        f"{path} cannot be written (Is a directory)"
    )


def test_a_file_of_another_user_is_not_loaded(bench, path, monkeypatch) -> None:
    """What it holds would run on the GPU."""
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert run(bench).startswith(f"made anew: {path} cannot be read (it belongs to another user); ")


def test_a_file_that_is_too_large_is_not_read(bench, path, monkeypatch) -> None:
    monkeypatch.setattr(runtime_cache, "_LARGEST", 1 << 20)
    os.truncate(path, (1 << 20) + 1)
    assert run(bench).startswith(f"made anew: {path} cannot be read (it is larger than 1 MiB); ")


def test_a_folder_that_cannot_be_made_is_told(bench, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    state = run(bench)
    assert re.fullmatch(r"made anew.*; .*/kernels-\S+ cannot be written \(Not a directory\)", state)


def test_a_user_without_a_home_has_none(bench, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert run(bench) == "off: there is no cache folder; set XDG_CACHE_HOME or HOME"


def test_a_lock_that_another_process_keeps_is_not_waited_for_long(bench, path, monkeypatch) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    lock = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    state = run(bench, 3, 4)
    os.close(lock)
    assert state.endswith(f"; {path} cannot be written (another process keeps the folder locked)")


def test_more_kernels_of_another_process_are_kept(bench, path) -> None:
    with bench.open() as runner:
        runner(NETWORK.images(3))
        content = path.read_bytes().replace(b"[3]", b"[3, 5, 6, 7, 8, 9]")
        path.write_bytes(content)  # by another process, meanwhile
        runner(NETWORK.images(4))
    assert runner.runtime_cache.endswith(
        f"; not written: {path} has more kernels, of another process"
    )
    assert path.read_bytes() == content


def broken() -> None:
    raise RuntimeError("not\n here")


@pytest.mark.parametrize(
    ("kind", "name", "answer", "state"),
    [
        (IRuntimeConfig, "create_runtime_cache", None, "off: TensorRT-RTX makes no runtime cache"),
        (IRuntimeConfig, "set_runtime_cache", False, "off: TensorRT-RTX takes no runtime cache"),
        (IRuntimeConfig, "create_runtime_cache", broken, "off: not here"),
        (IRuntimeCache, "serialize", None, "made anew"),
    ],
)
def test_tensorrt_that_refuses_costs_no_engine(
    bench, monkeypatch, kind, name, answer, state
) -> None:
    def refuse(*_given: Any) -> Any:
        return answer() if callable(answer) else answer

    monkeypatch.setattr(kind, name, refuse)
    assert run(bench) == state


def test_an_engine_of_full_tensorrt_needs_none(monkeypatch) -> None:
    with make_bench("strategy", monkeypatch).open() as runner:
        assert runner.runtime_cache == "none: TensorRT compiles kernels into the engine"


def test_an_engine_that_never_ran_writes_nothing(bench, tmp_path) -> None:
    bench.open().close()
    assert not (tmp_path / "cache").exists()


def test_files_are_for_an_engine_a_version_a_driver_and_a_gpu(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setattr(runtime_cache, "driver_release", lambda: "580.95.05")
    path = cache_path("ab" * 32, "1.7.1.116", DEVICE)
    assert path == Path(
        "/cache/msn-export/kernels-abababababababab-1.7.1.116-580.95.05-sm89-stand-in-gpu"
    )
    others = {
        path,
        cache_path("cd" * 32, "1.7.1.116", DEVICE),
        cache_path("ab" * 32, "1.6.1.120", DEVICE),
        cache_path("ab" * 32, "1.7.1.116", replace(DEVICE, name="RTX 5090")),
        cache_path("ab" * 32, "1.7.1.116", replace(DEVICE, capability=ComputeCapability(12, 0))),
    }
    monkeypatch.setattr(runtime_cache, "driver_release", lambda: None)
    assert len(others | {cache_path("ab" * 32, "1.7.1.116", DEVICE)}) == 6


def test_the_files_that_were_not_used_for_longest_go(bench, path) -> None:
    for number in range(FILES + 3):
        other = path.with_name(f"kernels-{number}")
        other.touch()
        os.utime(other, (number, number))
    (path.parent / "timing-11").touch()
    os.utime(path, (0, 0))
    run(bench, 3, 4)  # loaded, which is a use, and written
    left = {file.name for file in path.parent.iterdir()}
    assert len(left) == FILES + 1
    assert {path.name, "timing-11", f"kernels-{FILES + 2}"} <= left
    assert not {"kernels-0", "kernels-3"} & left
