"""The compiler's process is fed, listened to, limited and ended, whatever it does.

That it is so with a real compiler at work is test_build.py's; here a module of a few lines stands
for TensorRT, which the child imports first.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from msn_export.engine.build import peak_rss, run_child
from msn_export.engine.options import BuildStep
from msn_export.errors import BuildError


@pytest.fixture
def raw():
    with tempfile.TemporaryFile() as file:
        yield file


def run(source: str, raw: IO[bytes], monkeypatch, tmp_path: Path, **limits: float) -> Any:
    """Run a job whose TensorRT module is ``source``; ``pipe`` is the pipe of events."""
    (tmp_path / "standin.py").write_text(f"import os, sys, time\npipe = int(sys.argv[1])\n{source}")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", paths)
    told: list[BuildStep] = []
    job = {"module": "standin", "padding": "x" * 200_000}  # more than a pipe holds
    return run_child(job, raw, told.append, **limits), told


def test_events_are_read_in_whatever_pieces_they_come(raw, monkeypatch, tmp_path) -> None:
    event = '{"progress": {"phase": "p", "step": 1, "steps": 2, "fraction": 0.5}}'
    done, told = run(
        f"""
for piece in ({event[:20]!r}, {event[20:]!r} + "\\n" + '{{"done": {{"ker', 'nels": []}}}}\\n'):
    os.write(pipe, piece.encode()); time.sleep(0.1)
time.sleep(60)
""",
        raw,
        monkeypatch,
        tmp_path,
    )
    assert done == {"kernels": []}
    assert told == [BuildStep("p", 1, 2, 0.5), BuildStep("done", 1, 1, 1.0)]


def children() -> set[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(child) for child in text.split()}


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    """Every test ends with the children it started with: other tests keep pools of processes."""
    before = children()
    yield
    assert children() <= before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("os.write(pipe, b'{\"failed\": \"no kernel\"}\\n'); time.sleep(60)", "no kernel"),
        ("print('last words'); os._exit(3)",
         "the TensorRT compiler ended without a result (exit 3). Its last line: last words"),
        ("os._exit(0)", "the TensorRT compiler ended without a result (exit 0)."),
        ("os.kill(os.getpid(), 6)", "the TensorRT compiler crashed (SIGABRT)."),
        ("os.kill(os.getpid(), 35)", "the TensorRT compiler crashed (signal 35)."),
        ("os.kill(os.getpid(), 9)", "the TensorRT compiler was killed (SIGKILL), most likely "
         "because memory ran out; build on a machine with more, or lower --batch."),
    ],
    ids=["failed", "exit", "silence", "abort", "real-time signal", "killed"],
)  # fmt: skip
def test_every_end_without_an_engine_is_told(raw, monkeypatch, tmp_path, source, message) -> None:
    with pytest.raises(BuildError) as raised:
        run(source, raw, monkeypatch, tmp_path)
    assert str(raised.value) == message


def test_the_last_line_of_a_long_log_is_quoted_and_cut(raw, monkeypatch, tmp_path) -> None:
    with pytest.raises(BuildError) as raised:
        run("print('x\\n' * 100_000 + 'y' * 999); os._exit(1)", raw, monkeypatch, tmp_path)
    assert str(raised.value).endswith(f"Its last line: {'y' * 200}")


def test_an_error_of_the_system_arrives_as_one(raw, monkeypatch, tmp_path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        run("raise FileNotFoundError(2, 'No such file', 'x.engine')", raw, monkeypatch, tmp_path)
    assert raised.value.filename == "x.engine"
    with pytest.raises(OSError, match="No space left") as full:
        run("raise OSError(28, 'No space left on device')", raw, monkeypatch, tmp_path)
    assert full.value.errno == 28


def test_a_child_that_says_nothing_is_ended_in_time(raw, monkeypatch, tmp_path) -> None:
    started = time.monotonic()
    with pytest.raises(BuildError, match=r"the build took longer than its limit of 1\.5 s"):
        run("time.sleep(60)", raw, monkeypatch, tmp_path, timeout=1.5)
    assert time.monotonic() - started < 30


def test_memory_is_what_is_touched_and_not_what_is_reserved(raw, monkeypatch, tmp_path) -> None:
    reserve = "import mmap; held = mmap.mmap(-1, 4 << 30)"
    finish = "os.write(pipe, b'{\"done\": {}}\\n'); time.sleep(60)"
    limit = 600 << 20
    assert run(f"{reserve}; {finish}", raw, monkeypatch, tmp_path, memory=limit)[0] == {}
    touch = "held = b'x' * (700 << 20); time.sleep(60)"
    with pytest.raises(BuildError, match=r"needs more than its memory limit of 0\.59 GiB \(it wa"):
        run(touch, raw, monkeypatch, tmp_path, memory=limit)


def test_peak_memory_is_this_processs_own_and_zero_for_one_that_has_ended() -> None:
    assert 20 << 20 < peak_rss() < 64 << 30
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    assert peak_rss(ended.pid) == 0


def test_an_interrupt_in_the_display_ends_the_child(raw, monkeypatch, tmp_path) -> None:
    def interrupt(_progress: BuildStep) -> None:
        raise KeyboardInterrupt

    event = '{"progress": {"phase": "p", "step": 1, "steps": 2, "fraction": 0.5}}\\n'
    (tmp_path / "standin.py").write_text(
        f"import os, sys, time\nos.write(int(sys.argv[1]), b'{event}'); time.sleep(60)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run_child({"module": "standin"}, raw, interrupt)
