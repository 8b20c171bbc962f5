"""``msn-export onnx``: what is refused, fails or is stopped leaves nothing behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest

from msn_export.metrics import tolerances
from msn_export.metrics.metrics import Errors
from tests.builders.checkpoints import hugging_face
from tests.builders.exports import export


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    hugging_face(folder, labels=3)
    return folder


def fill(folder: Path, *names: str) -> str:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"nothing")
    return str(folder)


def changed_config(folder: Path, **config: object) -> Path:
    hugging_face(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


BAD = {
    "another model": (
        lambda tmp: (changed_config(tmp / "c", model_type="deit"), []),
        "is of model type 'deit'; expected 'vit_msn' or 'vit'",
    ),
    "mis-shaped": (
        lambda tmp: (changed_config(tmp / "c", intermediate_size=96), []),
        "keys of another shape (encoder.layer.0.intermediate.dense.bias is [128], expected [96]",
    ),
    "no weights": (
        lambda tmp: (fill(tmp / "c") and tmp / "c", []),
        "has no config.json and no weights",
    ),
    "bf16 for TensorRT 8.6": (
        lambda tmp: (TINY_FOLDER(tmp), ["--dtype", "bf16", "--target", "tensorrt-8"]),
        "bf16 needs opset 22 and portable is opset 17, whose convolution has no bf16; take fp16",
    ),
    "empty image folder": (
        lambda tmp: (TINY_FOLDER(tmp), ["--images", fill(tmp / "i")]),
        "holds no picture",
    ),
    "no image": (
        lambda tmp: (TINY_FOLDER(tmp), ["--images", fill(tmp / "i", "a.txt")]),
        "holds no picture",
    ),
    "all broken": (
        lambda tmp: (TINY_FOLDER(tmp), ["--images", fill(tmp / "i", "a.png", "b.jpg")]),
        "all 2 pictures of",
    ),
    "image size": (
        lambda tmp: (TINY_FOLDER(tmp), ["--image-size", "33"]),
        "image height 33 is not divisible by the patch's 8; nearest sizes are 32 and 40",
    ),
    "logits": (
        lambda tmp: (TINY_FOLDER(tmp), ["--head", "logits"]),
        "head logits needs a classifier, this checkpoint has none; use cls",
    ),
    "islands file": (
        lambda tmp: (TINY_FOLDER(tmp), ["--dtype", "fp16", "--islands", str(tmp / "none.json")]),
        "none.json does not exist",
    ),
    "unknown variant": (
        lambda tmp: ("random:vit-msn-huge", []),
        "variant 'vit-msn-huge' is unknown; expected one of vit-msn-small",
    ),
}


def TINY_FOLDER(tmp: Path) -> Path:  # noqa: N802
    hugging_face(tmp / "tiny")
    return tmp / "tiny"


@pytest.mark.parametrize(("prepare", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_message_and_nothing_left_behind(prepare, message, tmp_path) -> None:
    checkpoint, options = prepare(tmp_path)
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    result = export(checkpoint, outputs / "m.onnx", *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert list(outputs.iterdir()) == []


def test_an_existing_output_is_kept_unless_forced(checkpoint, tmp_path) -> None:
    output = tmp_path / "m.onnx"
    output.write_bytes(b"mine")
    result = export(checkpoint, output)
    assert result.exit_code == 1
    assert f"output {output} exists; --force replaces it" in result.stderr
    assert output.read_bytes() == b"mine"
    assert export(checkpoint, output, "--force").exit_code == 0
    assert onnx.load(output).producer_name == "msn-export"


def test_a_failed_check_publishes_nothing(checkpoint, tmp_path, monkeypatch) -> None:
    none = tolerances.Limit(Errors.uniform(0.0))
    monkeypatch.setattr(tolerances.Limit, "of_rounding", lambda *_: none)
    result = export(checkpoint, tmp_path / "m.onnx")
    assert result.exit_code == 1
    assert "output 'logits', does not agree with its reference: relative error" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_at_the_output_and_the_next_run_cleans_up(
    checkpoint, tmp_path
) -> None:
    output = tmp_path / "m.onnx"
    command = [sys.executable, "-m", "msn_export", "onnx", str(checkpoint), "-o", str(output)]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list(tmp_path.iterdir()):
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not output.exists()
    assert export(checkpoint, output).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_exits_with_130_and_leaves_nothing(checkpoint, tmp_path, number) -> None:
    command = [sys.executable, "-m", "msn_export", "onnx", str(checkpoint), "-o", "m.onnx"]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=tmp_path, text=True)
    while not list(tmp_path.iterdir()):
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(number)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 130
    assert stderr.strip().splitlines()[-1] == "error: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(checkpoint, tmp_path) -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from msn_export.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "onnx", str(checkpoint), "-o", "m.onnx"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 1
    assert "error: no room left in . (File too large)" in run.stderr
    assert list(tmp_path.iterdir()) == []
