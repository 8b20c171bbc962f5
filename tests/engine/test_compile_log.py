"""The log is sorted into what is kept."""

import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

from msn_export.engine.compile import BuilderLog, make_log
from tests.builders.engine_builds import rtx

# What the real module's classes are to their subclasses: bases with an __init__
TRT = SimpleNamespace(ILogger=type("ILogger", (), {}))


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


def test_nor_does_a_message_after_the_build() -> None:
    heard, raw = BuilderLog(), io.StringIO()
    log = make_log(TRT, heard, raw)
    raw.close()
    log.log(severity("ERROR"), "late")
    assert heard.errors == ["late"]


def test_a_later_build_has_the_messages_of_the_one_logger() -> None:
    first, second = BuilderLog(), BuilderLog()
    log = make_log(TRT, first, io.StringIO())
    assert make_log(TRT, second, io.StringIO()) is log
    log.log(severity("WARNING"), "careful")
    assert (first.warnings, second.warnings) == ([], ["careful"])


TWO_BUILDS = """
import gc, io
trt = __import__("tensorrt_rtx")
from msn_export.engine.compile import BuilderLog, make_log

def build():
    said = BuilderLog()
    log = make_log(trt, said, io.StringIO())
    builder = trt.Builder(log)
    network = builder.create_network(1)
    parser = trt.OnnxParser(network, log)
    parser.parse(b"no graph")
    return (builder, network, parser), said

first, _ = build()
second, _ = build()
del first
gc.collect()
third, said = build()
print(len(said.errors), said.warnings)
"""


def test_the_real_builder_writes_to_the_build_at_work_after_the_first_is_gone() -> None:
    rtx()
    run = subprocess.run(
        [sys.executable, "-c", TWO_BUILDS], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    errors, warnings = run.stdout.split(maxsplit=1)
    assert int(errors) > 0
    assert warnings.strip() == "[]"  # that the logger is another


def test_the_real_modules_classes_can_be_extended() -> None:
    rtx()  # skips where it is not installed
    trt = pytest.importorskip("tensorrt_rtx")
    heard = BuilderLog()
    log = make_log(trt, heard, io.StringIO())
    log.log(trt.ILogger.Severity.WARNING, "careful")
    assert heard.warnings == ["careful"]
    assert isinstance(log, trt.ILogger)
