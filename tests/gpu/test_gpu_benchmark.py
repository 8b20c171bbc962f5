"""The benchmark of a GPU runs to its end: on a card, and rehearsed with the CPU in its place."""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from msn_export.errors import MissingPackageError, MsnExportError
from msn_export.runtime import open_runner
from msn_export.spec import ComputeCapability
from tests.builders.trt_bench import one_device
from tests.gpu.places import BARE, TINY, Place, no_engines

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
MODULES = ("gpu", "gpu_contenders", "gpu_timing", "gpu_table")
ALL = [
    "torch eager", "torch SDPA", "torch.compile", "torch.compile, CUDA graphs", "onnxruntime CUDA",
    "engine", "engine, CUDA graphs",
]  # fmt: skip

pytestmark = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmarks are not here")


class Clock:
    """What stands in for a CUDA event."""

    def __init__(self, **_options: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing runs behind."""

    def elapsed_time(self, end: "Clock") -> float:
        return (end.at - self.at) * 1000


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, as a module; not called ``benchmark``, which is pytest-benchmark's fixture."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in MODULES:
        sys.modules.pop(name, None)
    import gpu

    return gpu


def rehearse(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the CPU where the script has a card, and the fp16 graph where it has an engine."""
    import gpu_contenders
    import gpu_timing

    for module in (script, gpu_contenders, gpu_timing):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(script, "find_driver", one_device)
    monkeypatch.setattr(script, "ceilings", lambda: {"copy_tb_s": 1.0, "fp16_tflop_s": 1.0})
    monkeypatch.setattr(gpu_timing, "BURST", 0.001)
    monkeypatch.setattr(script, "build", lambda *_files: None)
    monkeypatch.setattr(
        gpu_contenders, "open_runner", lambda path, **_: open_runner(path.with_name("m.fp16.onnx"))
    )

    def no_compiler(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("no compiler in a rehearsal")

    monkeypatch.setattr(torch, "compile", no_compiler)


def may_be_missing(place: Place) -> set[str]:
    """Name the contenders that a card may lack: each needs more than the card and torch."""
    missing = {"onnxruntime CUDA"}
    if no_engines(place.device):
        missing |= {"engine", "engine, CUDA graphs"}
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):  # Triton compiles its launchers with one
        missing |= {"torch.compile", "torch.compile, CUDA graphs"}
    return missing


@pytest.mark.parametrize("place", ["rehearsal", BARE], indirect=True)
def test_it_writes_a_row_for_each_contender_and_batch(
    place, script, monkeypatch, tmp_path, capsys
) -> None:
    on_card = place.torch_device == "cuda"
    if not on_card:
        rehearse(script, monkeypatch)
    model = "random:vit-msn-small:0" if on_card else place.source(TINY)
    out = tmp_path / "gpu.json"
    script.main(
        ["--images", str(place.photographs), "--models", model, "--batches", "1", "2",
         "--rounds", "3", "--output", str(out)]
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert [(row["batch"], row["contender"]) for row in found["rows"]] == [
        (batch, name) for batch in (1, 2) for name in ALL
    ]
    for row in found["rows"]:
        if "reason" in row:
            assert not on_card or row["contender"] in may_be_missing(place), row["reason"]
            continue
        assert row["ms"] > 0
        assert row["cosine_min"] > 0.999
        assert (row["ratio"] == 1) == (row["contender"] == "torch SDPA")
    table = out.with_suffix(".md").read_text().splitlines()
    assert len(table) == 2 + 2 * len(ALL)
    assert {line.count("|") for line in table} == {10}
    if not on_card:
        assert "not run: no compiler in a rehearsal" in table[4]


def test_without_a_card_it_says_so_and_writes_nothing(script, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(script, "find_driver", lambda: script.NoDriver("no NVIDIA driver"))
    out = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match="nothing was measured: no NVIDIA driver"):
        script.main(["--images", str(tmp_path), "--output", str(out)])
    assert not out.exists()


@pytest.mark.parametrize("place", ["rehearsal"], indirect=True)
def test_whoever_fails_is_told_with_why_and_the_others_are_timed(
    place, script, monkeypatch, tmp_path
) -> None:
    rehearse(script, monkeypatch)
    import gpu_contenders

    def no_engine(*_files: Any) -> None:
        raise MissingPackageError("tensorrt is not installed")

    def runs_out(_model: Any, attention: str) -> Any:
        def run(images: torch.Tensor) -> torch.Tensor:
            if attention == "eager" and len(images) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory | 2 GiB")
            return images.flatten(1)

        return run

    monkeypatch.setattr(script, "build", no_engine)
    monkeypatch.setattr(gpu_contenders, "_torch", runs_out)
    monkeypatch.setattr(script, "reference", lambda _model: lambda images: images.flatten(1))
    out = tmp_path / "gpu.json"
    script.main(
        ["--images", str(place.photographs), "--models", place.source(TINY), "--batches", "1", "2",
         "--rounds", "2", "--output", str(out)]
    )  # fmt: skip
    rows = json.loads(out.read_text())["rows"]
    told = {(row["batch"], row["contender"]): row.get("reason") for row in rows}
    assert told[1, "engine"] == told[2, "engine, CUDA graphs"] == "tensorrt is not installed"
    assert told[1, "torch eager"] is told[2, "torch SDPA"] is None
    assert told[2, "torch eager"] == "CUDA out of memory | 2 GiB"
    table = out.with_suffix(".md").read_text().splitlines()
    assert {line.count("|") for line in table} == {10}


@pytest.mark.parametrize("place", ["rehearsal"], indirect=True)
@pytest.mark.parametrize("begun", [0, 1, 4])
def test_what_a_budget_leaves_out_is_told_and_the_rest_is_written(
    place, script, monkeypatch, tmp_path, capsys, begun
) -> None:
    rehearse(script, monkeypatch)
    answers = iter([False] * begun)
    monkeypatch.setattr(script, "over_after", lambda _seconds: lambda: next(answers, True))
    out = tmp_path / "gpu.json"
    script.main(
        ["--images", str(place.photographs), "--models", place.source(TINY), "--batches", "1", "2",
         "--rounds", "2", "--budget", "9", "--output", str(out)]
    )  # fmt: skip
    if begun == 0:
        assert not out.exists()
        assert "not begun: the 9 s of --budget are over" in capsys.readouterr().out
        return
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * len(ALL)
    timed = [(row["batch"], row["contender"]) for row in rows if "ms" in row]
    # one answer is for the model itself; whatever had to be compiled did not make it here
    assert timed == [
        (1, name) for name in ("torch eager", "torch SDPA", "onnxruntime CUDA")[: begun - 1]
    ]
    left_out = {row["reason"] for row in rows if row["batch"] == 2}
    assert "not begun: the 9 s of --budget are over" in left_out


def test_an_engine_that_ends_its_process_is_a_reason(script, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(script, "find_driver", one_device)
    script.find_backend()  # skips nothing: the compiler of the tests is installed
    with pytest.raises(MsnExportError, match=r"msn-export trt ended with 2: .*none\.onnx"):
        script.build(tmp_path / "none.onnx", tmp_path / "m.engine", tmp_path)
    assert script.target(True, ComputeCapability(8, 9)) == ["--compute-capability", "8.9"]
    assert script.target(True, ComputeCapability(9, 0)) == []
    assert script.target(False, ComputeCapability(8, 9)) == []
