"""The compiler's process speaks JSON on a pipe of its own, and never outlives its parent."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from msn_export.schema import to_plain
from tests.builders.engine_builds import graph, rtx, spec_of
from tests.builders.engine_graphs import Vit

DEEP = Vit(depth=24)


def run(job: dict[str, Any], *, listening: bool = True, **environment: str):
    """Run the child on a job; give what it printed, and its events."""
    reading, writing = os.pipe()
    if not listening:
        os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "msn_export.engine.worker", str(writing)],
        input=json.dumps(job).encode() + b"\n",
        capture_output=True,
        pass_fds=(writing,),
        env={**os.environ, **environment},
        check=False,
    )
    os.close(writing)
    if not listening:
        return done, []
    with os.fdopen(reading, "rb") as pipe:
        return done, [json.loads(line) for line in pipe.read().splitlines()]


def job(vit: Vit, output: Path, **changes: Any) -> dict[str, Any]:
    rtx()
    plain = {**to_plain(spec_of(vit)), "model": str(graph(vit))}
    return {
        "module": "tensorrt_rtx",
        "spec": plain,
        "output": str(output),
        "parent": os.getpid(),
        **changes,
    }


def test_a_build_is_reported_and_written(tmp_path) -> None:
    done, events = run(job(Vit(), tmp_path / "x.engine"))
    assert done.returncode == 0
    assert {*events[0], *events[-2]} == {"progress"}
    result = events[-1]["done"]
    assert set(result) == {"version", "kernels", "notes", "warnings", "peak_rss"}
    assert len(result["kernels"]) == 22
    assert (tmp_path / "x.engine").stat().st_size > 1_000_000
    assert b"[V] Layers:" in done.stdout


def test_names_of_any_alphabet_reach_the_log_whatever_the_terminals(tmp_path) -> None:
    path = tmp_path / "граф.onnx"
    path.write_bytes(graph(Vit()).read_bytes())
    spec = {**job(Vit(), tmp_path / "x.engine")["spec"], "model": str(path)}
    done, events = run(
        job(Vit(), tmp_path / "x.engine", spec=spec), PYTHONIOENCODING="ascii", PYTHONUTF8="0"
    )
    assert done.returncode == 0
    assert "done" in events[-1], events[-1]


@pytest.mark.parametrize(
    ("source", "event"),
    [
        ("raise MemoryError", {"failed": "there is not enough memory; build on a larger machine"}),
        ("raise OSError(28, 'full', 'x')", {"os_error": [28, "full", "x"]}),
        ("raise TypeError('odd')",
         {"failed": "TensorRT's Python module raised TypeError: odd"}),
        ("__version__ = '3.0'", {"failed": "standin 3.0 is not supported"}),
    ],
)  # fmt: skip
def test_whatever_the_module_raises_is_one_event(tmp_path, source, event) -> None:
    (tmp_path / "standin.py").write_text(source)
    wanted = {"module": "standin", "parent": os.getpid()}
    done, events = run(wanted, PYTHONPATH=str(tmp_path))
    assert events == [event]
    assert done.returncode == 0


def test_a_child_that_nobody_listens_to_stops(tmp_path) -> None:
    done, _ = run(job(DEEP, tmp_path / "x.engine"), listening=False)
    assert done.returncode == 0
    assert b"Layers:" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_child_whose_parent_is_gone_ends_at_once(tmp_path) -> None:
    done, events = run(job(Vit(), tmp_path / "x.engine", parent=1))
    assert done.returncode == 1
    assert events == []
    assert list(tmp_path.iterdir()) == []
