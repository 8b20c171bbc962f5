"""The benchmark of a GPU runs to its end: on a card, and rehearsed with the CPU in its place."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from places import CARD, TINY
from trt_bench import one_device

from msn_export.runtime import open_runner

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
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
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("gpu", "gpu_contenders"):
        sys.modules.pop(name, None)
    import gpu

    return gpu


def rehearse(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the CPU where the script has a card, and the fp16 graph where it has an engine."""
    import gpu_contenders

    for module in (benchmark, gpu_contenders):
        monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(benchmark, "find_driver", one_device)
    monkeypatch.setattr(benchmark, "ceilings", lambda: {"copy_tb_s": 1.0, "fp16_tflop_s": 1.0})
    monkeypatch.setattr(benchmark, "BURST", 0.001)
    monkeypatch.setattr(benchmark, "run_trt", lambda _job, _progress: None)
    monkeypatch.setattr(
        gpu_contenders, "open_runner", lambda path, **_: open_runner(path.with_name("m.fp16.onnx"))
    )

    def no_compiler(*_arguments: Any, **_options: Any) -> None:
        raise RuntimeError("no compiler in a rehearsal")

    monkeypatch.setattr(torch, "compile", no_compiler)


@pytest.mark.parametrize("place", ["rehearsal", CARD], indirect=True)
def test_it_writes_a_row_for_each_contender_and_batch(
    place, benchmark, monkeypatch, tmp_path, capsys
) -> None:
    on_card = place.torch_device == "cuda"
    if not on_card:
        rehearse(benchmark, monkeypatch)
    model = "random:vit-msn-small:0" if on_card else place._source(TINY)
    out = tmp_path / "gpu.json"
    benchmark.main(
        ["--images", str(place.photographs), "--models", model, "--batches", "1", "2",
         "--rounds", "3", "--output", str(out)]
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert [(row["batch"], row["contender"]) for row in found["rows"]] == [
        (batch, name) for batch in (1, 2) for name in ALL
    ]
    for row in found["rows"]:
        if "reason" in row:
            assert not on_card or row["contender"] == "onnxruntime CUDA", row["reason"]
            continue
        assert row["ms"] > 0
        assert row["cosine_min"] > 0.999
        assert (row["ratio"] == 1) == (row["contender"] == "torch SDPA")
    table = out.with_suffix(".md").read_text().splitlines()
    assert len(table) == 2 + 2 * len(ALL)
    assert {line.count("|") for line in table} == {10}
    if not on_card:
        assert "not run: no compiler in a rehearsal" in table[4]


def test_without_a_card_it_says_so_and_writes_nothing(benchmark, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(benchmark, "find_driver", lambda: benchmark.NoDriver("no NVIDIA driver"))
    out = tmp_path / "gpu.json"
    with pytest.raises(SystemExit, match="nothing was measured: no NVIDIA driver"):
        benchmark.main(["--images", str(tmp_path), "--output", str(out)])
    assert not out.exists()
