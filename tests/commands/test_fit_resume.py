"""``msn-export fit`` that ended in the middle goes on, to the same graph."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from msn_export.commands.fit import FitJob, run_fit
from msn_export.embedding.inference import LocalExecutor
from msn_export.errors import OutputError
from tests.builders.checkpoints import hugging_face
from tests.builders.labelled import noise

EACH, CLASSES = 30, 2
SCRIPT = """
import sys
from msn_export.embedding import outputs
outputs.SECONDS = 0.0  # each batch a part: a tiny run would be over before its first
from msn_export.cli import main
if __name__ == "__main__":
    main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    hugging_face(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise(tmp_path_factory.mktemp("set"), each=EACH, classes=CLASSES)


def interrupted(checkpoint: Path, folder: Path, output: Path, number: int, lines: int = 3) -> str:
    """Start a run, end it by a signal when some parts are done, and give its stderr."""
    script = output.parent / "slow_parts.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), "fit", str(checkpoint), str(folder), "-o", str(output)]
    journal = output.parent / f"{output.name}.fit" / "training.npy.parts" / "parts.jsonl"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        until = time.monotonic() + 120
        while not journal.exists() or len(journal.read_text().splitlines()) < lines:
            assert time.monotonic() < until, "it did not happen in time"
            assert run.poll() is None, run.stderr
            time.sleep(0.002)
        run.send_signal(number)
        stderr = run.communicate(timeout=60)[1]
    assert run.returncode == (130 if number == signal.SIGINT else -number)
    assert not output.exists()
    return stderr


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the rows that are made from here on."""
    made, rows = LocalExecutor.rows, list[int]()

    def counted(self: Any, *arguments: Any) -> Any:
        for start, batch in made(self, *arguments):
            rows.append(len(batch.vectors))
            yield start, batch

    monkeypatch.setattr(LocalExecutor, "rows", counted)
    return rows


def test_killed_and_started_again_it_writes_the_same_bytes(
    checkpoint, folder, tmp_path, monkeypatch
) -> None:
    (tmp_path / "whole").mkdir()
    whole, _ = run_fit(FitJob(str(checkpoint), tmp_path / "whole" / "m.onnx", labelled=folder))
    output = tmp_path / "m.onnx"
    interrupted(checkpoint, folder, output, signal.SIGKILL)
    rows = counting(monkeypatch)
    resumed, manifest = run_fit(FitJob(str(checkpoint), output, labelled=folder))
    assert 0 < sum(rows) < EACH * CLASSES
    assert resumed.read_bytes() == whole.read_bytes()
    assert manifest.fit.images == EACH * CLASSES
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "m.onnx", "m.onnx.json", "slow_parts.py", "whole",
    ]  # fmt: skip


def test_an_interruption_says_how_to_go_on_and_another_run_starts_over_by_force(
    checkpoint, folder, tmp_path, monkeypatch
) -> None:
    output = tmp_path / "m.onnx"
    stderr = interrupted(checkpoint, folder, output, signal.SIGINT)
    line = stderr.splitlines()[-1]
    assert line.startswith("error: interrupted; ")
    assert line.endswith(
        f" of {EACH * CLASSES} rows are kept in {output}.fit/training.npy.parts, the same command "
        "goes on from there"
    )
    assert "Traceback" not in stderr
    other = {"features": "embedding", "labelled": folder}
    with pytest.raises(OutputError, match=r"another features \(msn, now embedding\); --force sta"):
        run_fit(FitJob(str(checkpoint), output, **other))
    kept = json.loads((tmp_path / "m.onnx.fit" / "fit.json").read_text())
    assert kept["features"] == "msn"
    rows = counting(monkeypatch)
    run_fit(FitJob(str(checkpoint), output, force=True, **other))
    assert sum(rows) == EACH * CLASSES
