"""The log is sorted into what is kept; a listener that is gone cancels the build."""

import io
import time
from types import SimpleNamespace

import pytest

from msn_export.engine import compile
from msn_export.engine.compile import BuilderLog, make_log, make_monitor
from msn_export.engine.options import BuildStep
from tests.builders.engine_builds import rtx

# What the real module's classes are to their subclasses: bases with an __init__
TRT = SimpleNamespace(
    ILogger=type("ILogger", (), {}), IProgressMonitor=type("IProgressMonitor", (), {})
)


def severity(name: str) -> SimpleNamespace:
    return SimpleNamespace(name=name)


def test_errors_warnings_and_kernels_are_kept_and_all_is_written() -> None:
    heard, raw = BuilderLog(), io.StringIO()
    log = make_log(TRT, heard, raw)
    said = [
        ("INTERNAL_ERROR", "broken"),
        ("ERROR", "worse"),
        ("WARNING", "careful"),
        ("INFO", "hello"),
        ("VERBOSE", "Layers:\nName: a"),
        ("VERBOSE", "other layers: none"),
    ]
    for name, message in said:
        log.log(severity(name), message)
    assert heard == BuilderLog(["broken", "worse"], ["careful"], ["Layers:\nName: a"])
    assert raw.getvalue() == "".join(f"[{name[0]}] {message}\n" for name, message in said)


def test_a_full_disk_does_not_raise_into_tensorrt() -> None:
    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(28, "No space left on device")

    heard = BuilderLog()
    make_log(TRT, heard, Full()).log(severity("ERROR"), "broken")
    assert heard.errors == ["broken"]


def test_the_real_modules_classes_can_be_extended() -> None:
    rtx()  # skips where it is not installed
    trt = pytest.importorskip("tensorrt_rtx")
    heard = BuilderLog()
    log = make_log(trt, heard, io.StringIO())
    log.log(trt.ILogger.Severity.WARNING, "careful")
    assert heard.warnings == ["careful"]
    assert isinstance(log, trt.ILogger)
    assert isinstance(make_monitor(trt, lambda _progress: True), trt.IProgressMonitor)


def test_a_listener_that_is_gone_cancels_the_build() -> None:
    answers = iter([True, True, False])
    monitor = make_monitor(TRT, lambda _progress: next(answers))
    monitor.phase_start("build", None, 3)
    monitor.phase_start("optimise", "build", 2)
    assert monitor.step_complete("optimise", 0) is True  # so soon that it is not told
    assert monitor.step_complete("unheard of", 0) is True
    assert monitor.step_complete("build", 0) is False


def test_one_phase_is_not_told_more_often_than_an_eye_sees(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    told: list[BuildStep] = []
    monitor = make_monitor(TRT, lambda progress: told.append(progress) or True)
    monitor.phase_start("build", None, 100)
    for step in range(100):
        now[0] += compile._INTERVAL / 10
        assert monitor.step_complete("build", step) is True
    assert len(told) in {10, 11}
    monitor.phase_finish("build")
