"""The command line's own process: streams that are full or closed, interrupts at any moment."""

import subprocess
import sys
from pathlib import Path

import pytest

from msn_export.manifest import manifest_path
from tests.builders.checkpoints import hugging_face

COMMAND = f"{sys.executable} -m msn_export"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    (folder / "tiny").mkdir()
    hugging_face(folder / "tiny", labels=3)
    return folder


def shell(command: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["sh", "-c", f"{COMMAND} {command}"],
        cwd=folder, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("redirected", "reason"),
    [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")],
    ids=["full", "closed"],
)
def test_a_standard_output_that_takes_nothing_is_told_with_what_was_written(
    place, redirected, reason
) -> None:
    run = shell(f"onnx tiny -o o.onnx --no-check --force {redirected}", place)
    assert run.returncode == 1
    assert run.stderr.endswith(
        f"error: standard output: {reason}; o.onnx, o.onnx.json were written\n"
    )
    assert manifest_path(place / "o.onnx").is_file()
    run = shell(f"--help {redirected}", place)
    assert run.returncode == 1
    assert run.stderr == f"error: {reason}\n"


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-", "<&-"])
def test_without_a_standard_error_or_input_the_work_is_done(place, redirected) -> None:
    run = shell(f"inspect tiny/config.json {redirected}", place)
    assert run.returncode == 1  # it is no manifest
    run = shell(f"onnx tiny -o e.onnx --no-check --force --json {redirected}", place)
    assert run.returncode == 0
    assert run.stdout.startswith("{")


def test_a_reader_that_goes_ends_it_quietly(place) -> None:
    run = shell("--help | true", place)
    assert run.returncode == 0
    assert "Traceback" not in run.stderr


INTERRUPTED = """
import builtins, os, signal, sys
how, number, wanted = sys.argv[2:]
del sys.argv[2:]
from msn_export.__main__ import run
given, left = builtins.__import__, [wanted]
def interrupted(name, *args, **options):
    if name in left:
        left.remove(name)
        try:
            os.kill(os.getpid(), getattr(signal, number))
            for _ in range(1000):
                pass
        except KeyboardInterrupt:
            if how == "swallowed":
                raise ImportError("a library makes its own error of it")
            raise
    return given(name, *args, **options)
builtins.__import__ = interrupted
run()
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("name", ["click", "msn_export.commands.doctor"])
@pytest.mark.parametrize("how", ["swallowed", "raised"])
def test_an_interrupt_while_packages_are_imported_ends_with_130(
    tmp_path, number, name, how
) -> None:
    arguments = [sys.executable, "-c", INTERRUPTED, "doctor", how, number, name]
    run = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 130, run.stderr
    assert run.stderr == "error: interrupted; nothing was written\n"
    assert run.stdout == ""
