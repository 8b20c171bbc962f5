"""A contender's process stands still between its turns, and how it ends is described."""

import os
import signal
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from msn_export.benchmark import session as sessions
from msn_export.benchmark.contenders import Placement, artifact
from msn_export.benchmark.session import BenchSession, ContenderProcess
from msn_export.errors import BenchError
from tests.builders.tiny_artifacts import classifier


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("bench"), "--batch", "1:4:8")


def test_a_process_stands_still_while_it_is_not_its_turn(model, tmp_path) -> None:
    entry = artifact(model, Placement(1), "tiny.onnx")
    with ContenderProcess("tiny.onnx", tmp_path / "log", 1, offline=True) as process:
        process.ask("open", **entry.opening)
        time.sleep(0.1)
        state = Path(f"/proc/{process.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state == "T"  # stopped
        with pytest.raises(BenchError, match=r"tiny\.onnx: KeyError"):
            process.ask("set_images")
    assert not Path(f"/proc/{process.process.pid}").exists()


def test_a_process_that_answers_no_more_and_does_not_end_is_ended(tmp_path, monkeypatch) -> None:
    code = "import os, sys, time; os.close(int(sys.argv[1])); time.sleep(600)"
    (tmp_path / "dawdler.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sessions, "CONTENDER", "dawdler")
    monkeypatch.setattr(sessions, "_ENDING", 1)
    with (
        ContenderProcess("dawdler", tmp_path / "log", 1, offline=True) as process,
        pytest.raises(BenchError, match="dawdler: its process answered nothing more and did not"),
    ):
        process.ask("open")


def test_what_is_left_out_holds_no_memory(model, tmp_path) -> None:
    with ExitStack() as stack:
        session = BenchSession(Placement(1), tmp_path, stack, offline=True)
        broken = replace(artifact(model, Placement(1), "tiny.onnx"), opening={"kind": "nothing"})
        with pytest.raises(BenchError):
            session.start(broken)
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        commands = [Path(f"/proc/{child}/cmdline").read_bytes() for child in children]
        assert not [line for line in commands if b"benchmark.worker" in line]


def test_a_process_that_dies_is_described(model, tmp_path) -> None:
    with ContenderProcess("victim", tmp_path / "log", 1, offline=True) as process:
        process.ask("open", **artifact(model, Placement(1), "tiny.onnx").opening)
        os.kill(process.process.pid, signal.SIGKILL)
        with pytest.raises(BenchError, match="victim: its process was killed, most likely because"):
            process.ask("memory")
