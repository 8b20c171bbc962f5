"""Ten thousand pictures, and many classes: memory grows by the features, nothing else."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from msn_export.logistic_regression import solver_bytes
from tests.builders.checkpoints import hugging_face
from tests.builders.labelled import noise

COUNT, CLASSES, BLOCKS, DIM = 10_000, 10, 4, 384
SCRIPT = """
import json, sys
from pathlib import Path
from msn_export.cli import main
from msn_export.commands import fit
from msn_export.host import peak_rss, reset_peak, rss

of_draw, taken = fit._of_draw, {}

def measured(*arguments):
    taken["before"] = rss()
    reset_peak()
    found = of_draw(*arguments)
    taken["peak"] = peak_rss()
    Path(sys.argv[1]).write_text(json.dumps(taken))
    return found

if __name__ == "__main__":
    fit._of_draw = measured
    main(sys.argv[2:])
"""

pytestmark = pytest.mark.slow  # minutes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide features from few products: two tokens, four blocks."""
    folder = tmp_path_factory.mktemp("checkpoint")
    hugging_face(
        folder, hidden_size=DIM, num_hidden_layers=BLOCKS, num_attention_heads=6,
        intermediate_size=64, image_size=8, patch_size=8,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise(tmp_path_factory.mktemp("set"), each=COUNT // CLASSES, classes=CLASSES)


def start(place: Path, *arguments: object) -> subprocess.Popen[str]:
    script = place / "measured.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, place / "memory.json", "fit", *arguments, "--json"]
    return subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(run: subprocess.Popen[str]) -> dict[str, Any]:
    stdout, stderr = run.communicate(timeout=3000)
    assert run.returncode == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    return found


def test_ten_thousand_pictures_take_the_memory_of_their_features_and_are_resumed(
    checkpoint, folder, tmp_path
) -> None:
    (tmp_path / "whole").mkdir()
    whole, output = tmp_path / "whole" / "m.onnx", tmp_path / "m.onnx"
    options = ("--blocks", BLOCKS, "--no-check", "--C", "0.4")  # a hundred steps on noise
    with start(tmp_path / "whole", checkpoint, folder, "-o", whole, *options) as run:
        first = finished(run)
    assert first["fit"]["images"] == COUNT
    memory = json.loads((tmp_path / "whole" / "memory.json").read_text())
    features = COUNT * BLOCKS * DIM * 8
    solver = solver_bytes(COUNT, BLOCKS * DIM, CLASSES)
    # the rest is constant: scikit-learn's modules, lbfgs' steps, parts of rows
    assert features < memory["peak"] - memory["before"] < features + solver + 48 * 2**20

    with start(tmp_path, checkpoint, folder, "-o", output, *options) as run:
        journal = tmp_path / "m.onnx.fit" / "training.npy.parts" / "parts.jsonl"
        until = time.monotonic() + 600
        while not journal.exists() or len(journal.read_text().splitlines()) < 3:
            assert time.monotonic() < until
            assert run.poll() is None
            time.sleep(0.002)
        run.send_signal(signal.SIGKILL)
        run.communicate(timeout=60)
    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert 0 < rows[-1]["done"] < COUNT
    with start(tmp_path, checkpoint, folder, "-o", output, *options) as run:
        second = finished(run)
    assert output.read_bytes() == whole.read_bytes()
    assert second["fit"] == first["fit"]
    assert second["accuracy"] == first["accuracy"]


def test_a_thousand_classes_are_written_with_their_names(tmp_path) -> None:
    hugging_face(tmp_path / "checkpoint")
    folder = noise(tmp_path / "set", each=2, classes=1000)
    output = tmp_path / "m.onnx"
    with start(tmp_path, tmp_path / "checkpoint", folder, "-o", output) as run:
        found = finished(run)
    assert len(found["classes"]) == 1000
    assert found["outputs"][0]["shape"] == ["batch", 1000]
    assert found["check"]["passed"]
    assert found["fit"]["relative"] < 1e-5
    assert found["accuracy"]["confusion"] is None
    assert len(found["accuracy"]["per_class"]) == 1000
    assert Path(f"{output}.json").stat().st_size < 2**20
