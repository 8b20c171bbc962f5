"""Where a benchmark runs, and what a GPU's own tool says of a process."""

from pathlib import Path

import pytest

from msn_export.commands import bench
from msn_export.commands.bench import BenchJob
from msn_export.errors import SpecError
from msn_export.host import Device, Driver, NoDriver, device_bytes
from msn_export.spec import ComputeCapability

CARD = Driver("13.0", (Device(0, "a card", ComputeCapability(8, 9), 2**34),))
NONE = NoDriver("no NVIDIA driver")


@pytest.mark.parametrize(
    ("driver", "settings", "device"),
    [
        (NONE, {}, None),
        (CARD, {}, 0),
        (CARD, {"device": 1}, 1),
        (CARD, {"providers": ("CPUExecutionProvider",)}, None),
        (CARD, {"providers": ("CUDAExecutionProvider", "CPUExecutionProvider")}, 0),
        (NONE, {"device": 2}, 2),  # whoever opens an artifact there says what is wrong
    ],
)
def test_all_contenders_run_in_one_place(monkeypatch, driver, settings, device) -> None:
    monkeypatch.setattr(bench, "find_driver", lambda: driver)
    where = bench._where(BenchJob((Path("m.onnx"),), **settings))
    assert where.device == device
    assert where.torch_device == ("cpu" if device is None else f"cuda:{device}")


def test_what_stays_on_a_gpu_needs_one(monkeypatch) -> None:
    monkeypatch.setattr(bench, "find_driver", lambda: NONE)
    with pytest.raises(SpecError, match="--resident leaves data on a GPU"):
        bench._where(BenchJob((Path("m.onnx"),), resident=True))


def tool(folder: Path, script: str) -> None:
    """Put a program called nvidia-smi on the path, in place of the driver's."""
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("printf '41, 300\\n42, 1024\\n'", 2**30),
        ("printf '41, 300\\n'", None),
        ("printf '42, [N/A]\\n'", None),  # as in a container that hides processes
        ("exit 9", None),
    ],
)
def test_device_memory_is_that_of_the_process(tmp_path, monkeypatch, script, found) -> None:
    tool(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert device_bytes(42) == found


def test_without_the_tool_nothing_is_known(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_bytes(42) is None
