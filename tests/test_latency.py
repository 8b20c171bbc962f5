"""Two engines are timed by turns where a GPU is; else the reason is told."""

from pathlib import Path

import numpy as np
import pytest
from artifacts import pretend
from networks import Network
from tensorrt_stand_in import plan_of
from trt_bench import one_device

from msn_export import latency
from msn_export.driver import NoDriver
from msn_export.errors import DeviceError
from msn_export.latency import CALLS, ROUNDS, WARM_UP, time_beside

NETWORK = Network()


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    monkeypatch.setattr(latency, "find_driver", one_device)
    found = {}
    for name in ("fp16", "int8"):
        found[name] = tmp_path / f"{name}.engine"
        found[name].write_bytes(plan_of(NETWORK))
    return found


def test_each_is_called_as_often_and_both_times_are_told(engines, monkeypatch) -> None:
    batches = []

    def compute(_network, images):
        batches.append(len(images))
        return {name: np.zeros((len(images), size), np.float32) for name, size in
                (("embedding", 64), ("odd", 3))}  # fmt: skip

    pretend(monkeypatch, "strategy", NETWORK, compute)
    told = time_beside(engines, NETWORK.images(4), "fp16")
    assert told["fp16"] > 0
    assert told["int8"] > 0
    assert set(told["ratio"]) == {"int8"}
    assert told["batch"] == 4
    assert "Stand-in GPU" in told["device"]
    assert len(batches) == 2 * (WARM_UP + ROUNDS * CALLS)


def test_without_a_gpu_the_reason_is_told(engines, monkeypatch) -> None:
    monkeypatch.setattr(latency, "find_driver", lambda: NoDriver("no NVIDIA driver"))
    assert time_beside(engines, NETWORK.images(4), "fp16") == {"reason": "no NVIDIA driver"}


def test_an_engine_that_does_not_run_is_no_failure_of_the_calibration(engines, monkeypatch) -> None:
    def refuse(_engine):
        raise DeviceError("the GPU is out of memory")

    monkeypatch.setattr(latency, "open_engine", refuse)
    assert time_beside(engines, NETWORK.images(4), "fp16") == {
        "reason": "not timed: the GPU is out of memory"
    }
