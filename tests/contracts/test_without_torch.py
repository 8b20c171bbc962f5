"""Where [graph] is installed and [export] is not: all that begins with a graph works there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.artifacts import TARGET, classifier
from tests.builders.tiny_artifacts import pictures

ABSENT = ("torch", "safetensors", "huggingface_hub", "transformers")
COMMANDS = {
    "trt": ("trt", "{graph}", "-o", "{out}/e.engine", "--fp16", *TARGET),
    "calibrate": ("calibrate", "{graph}", "--int8", "-o", "{out}/q.onnx", "--no-compile"),
    "validate": ("validate", "{graph}", "{graph}"),
    "drift": ("drift", "{graph}", "{graph}"),
    "report": ("report", "{graph}", "-o", "{out}/r.html"),
    "embed": ("embed", "{graph}", "{pictures}", "-o", "{out}/v.npy"),
    "bench": ("bench", "{graph}", "--against", "none", "--rounds", "1", "--seconds", "0.1"),
}
NO_PICTURES = {"embed"}  # they are its argument


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make pictures, and a folder in which a package that is absent shadows one that is here."""
    folder = tmp_path_factory.mktemp("place")
    pictures(folder / "pictures", 12)
    for name in ABSENT:
        text = f'raise ModuleNotFoundError("No module named {name}", name="{name}")\n'
        (folder / "absent" / name).mkdir(parents=True)
        (folder / "absent" / name / "__init__.py").write_text(text)
    return folder


def invoke(place: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run a command, and whatever it starts, without them."""
    return subprocess.run(
        [sys.executable, "-m", "msn_export", *arguments],
        env=os.environ | {"PYTHONPATH": str(place / "absent")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_graphs_needs_no_torch(place, tmp_path, command) -> None:
    if command == "trt":
        pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    names = {"graph": classifier(), "out": tmp_path, "pictures": place / "pictures"}
    arguments = [part.format(**names) for part in COMMANDS[command]]
    if command not in NO_PICTURES:
        arguments += ["--images", str(place / "pictures")]
    run = invoke(place, *arguments)
    assert run.returncode == 0, run.stderr


def test_a_command_on_a_checkpoint_says_what_to_install(place) -> None:
    run = invoke(place, "onnx", "random:vit-msn-small", "-o", str(place / "m.onnx"))
    assert run.returncode == 1
    assert run.stderr == (
        "error: package torch is not installed; pip install 'msn-export[export]'\n"
    )


def test_bench_says_why_pytorch_is_left_out(place) -> None:
    run = invoke(place, "bench", str(classifier()), "--rounds", "1", "--seconds", "0.1", "--json")
    assert run.returncode == 0, run.stderr
    left_out = {one["name"]: one["skipped"] for one in json.loads(run.stdout)["contenders"]}
    assert "torch" in left_out["sdpa"]
    assert "msn-export[export]" in left_out["sdpa"]
