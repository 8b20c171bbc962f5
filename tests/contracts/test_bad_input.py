"""Hostile, broken and missing input through the command line: one line, exit 1, nothing left."""

import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file, save_file

from msn_export import manifest
from msn_export.cli import main
from tests.builders.checkpoints import Bomb, hugging_face, processor
from tests.fakes.hub import COMMIT, cached


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    hugging_face(folder, labels=3)
    return folder


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    """Copy the checkpoint, for a test to break."""
    return Path(shutil.copytree(tiny, tmp_path / "checkpoint"))


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs"


def export(checkpoint: object, outputs: Path, *options: str) -> Result:
    output = str(outputs / "m.onnx")
    return CliRunner().invoke(main, ["onnx", str(checkpoint), "-o", output, *options])


def last_line(result: Result) -> str:
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    line: str = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def refused(checkpoint: object, outputs: Path, *options: str) -> str:
    message = last_line(export(checkpoint, outputs, *options))
    assert list(outputs.iterdir()) == []
    return message


# --- checkpoints ----------------------------------------------------------------------------------


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_a_key(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        del state["vit.layernorm.bias"]
        state["layer.\x1b[2Jscale"] = torch.zeros(2)

    change_weights(folder, change)


def with_nan(folder: Path) -> None:
    change_weights(folder, lambda state: state["classifier.bias"].fill_(float("nan")))


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def replaced_by_a_bomb(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": Bomb(folder / "ran")}, folder / "pytorch_model.bin")


def index_that_leaves(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    index = {"weight_map": {"vit.layernorm.bias": "../secret.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"vit.layernorm.bias": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def quantised(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> None:
        state["classifier.weight"] = state["classifier.weight"].to(torch.int8)

    change_weights(folder, change)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "keys": (
        without_a_key,
        "1 key missing (norm.bias), 1 key unexpected ('layer.\\x1b[2Jscale'), 0 keys of another "
        "shape; the file is not whole, or of another model",
    ),
    "NaN": (with_nan, "weight 'classifier.bias' has NaN or infinity"),
    "truncated": (truncated, "is not a whole safetensors file ("),
    "code": (
        replaced_by_a_bomb,
        "pytorch_model.bin is refused: it names exec, and a pickle can execute code; convert it",
    ),
    "index": (index_that_leaves, "points outside its folder: '../secret.safetensors'; refused"),
    "shard": (
        missing_shard,
        "model-00001-of-00002.safetensors, a shard of the weights, is missing",
    ),
    "quantised": (quantised, "weight 'classifier.weight' is int8; expected dense floating-point"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "has weights and no config.json; put",
    ),
    "config": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is not JSON: Expecting property name",
    ),
    "depth": (
        lambda folder: change_json(folder / "config.json", num_hidden_layers=10**9),
        "config.json: layers 1000000000 is out of range; expected 1 to 1024",
    ),
    "labels": (
        lambda folder: change_json(folder / "config.json", id2label={"0": "a"}),
        "config.json: the classifier has 3 rows and id2label 1 labels: 2 ids missing (1, 2), 0",
    ),
    "activation": (
        lambda folder: change_json(folder / "config.json", hidden_act="prelu"),
        "activation 'prelu' has learned parameters; it is not supported",
    ),
    "preprocessing": (
        lambda folder: processor(folder, do_flip_channel_order=True),
        "preprocessor_config.json: do_flip_channel_order is not done here; correct it, or choose "
        "--preprocess hf, msn-eval or another file",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "holds no weights; expected one of model.safetensors, pytorch_model.bin, model.safetensors",
    ),
}


@pytest.mark.parametrize(("harm", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_checkpoint_is_one_message(checkpoint, outputs, harm, message) -> None:
    harm(checkpoint)
    assert message in refused(checkpoint, outputs)
    assert not (checkpoint / "ran").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "checkpoint '' does not exist; expected a folder, a weights file"),
        ("none.pth.tar", "checkpoint 'none.pth.tar' does not exist; expected a folder"),
        ("x" * 9000, "cannot be read: File name too long"),
    ],
    ids=["empty", "missing", "long"],
)
def test_what_is_no_checkpoint_is_one_message(outputs, source, message) -> None:
    result = export(source, outputs)
    assert result.exit_code == 2
    said = result.stderr.strip().splitlines()[-1]
    assert said.startswith("Error: Invalid value for 'CHECKPOINT': ")
    assert message in said
    assert len(said) < 2100


def test_a_seed_that_is_none_is_one_message(outputs) -> None:
    said = refused("random:vit-msn-small:x", outputs)
    assert "is malformed; expected random:VARIANT[:SEED]" in said


def test_a_batch_that_memory_cannot_check_is_refused_before_the_work(tiny, outputs) -> None:
    result = export(tiny, outputs, "--batch", "999999")
    assert "error: batch 999999:999999:999999: memory affords a check of about" in last_line(result)
    assert "trace" not in result.stderr


def test_a_head_that_is_named_twice_is_one_output(tiny, outputs) -> None:
    result = export(tiny, outputs, "--head", "cls", "--head", "mean", "--head", "cls", "--json")
    told = json.loads(result.stdout)
    assert [output["name"] for output in told["outputs"]] == ["embedding", "mean_embedding"]


def test_a_variant_where_the_shape_is_said_is_refused(tiny, outputs) -> None:
    assert "says its own shape; --variant is for a weights file" in refused(
        tiny, outputs, "--variant", "vit-msn-base"
    )


# --- the hub, without a network: it reads its environment once, so each in a process --------------


def offline(home: Path, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "msn_export", "onnx", *arguments],
        env={
            **os.environ,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_HUB_OFFLINE": "1",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_hub_id_that_is_not_in_the_cache_needs_a_network(tmp_path, outputs) -> None:
    run = offline(tmp_path / "home", outputs, "facebook/vit-msn-small@v1")
    assert run.returncode == 1
    assert run.stdout == ""
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("error: hub checkpoint 'facebook/vit-msn-small@v1' cannot be had (")
    assert "outgoing traffic has been disabled" in last
    assert last.endswith("); check the name and the network, or give a local folder")
    assert list(outputs.iterdir()) == []


def test_one_that_is_in_the_cache_is_exported(tiny, tmp_path, outputs) -> None:
    cached(tmp_path / "home", "facebook/vit-msn-tiny", tiny)
    run = offline(tmp_path / "home", outputs, "facebook/vit-msn-tiny", "--no-check", "--json")
    assert run.returncode == 0, run.stderr
    told = json.loads(run.stdout)
    assert told["checkpoint"]["source"] == f"facebook/vit-msn-tiny@{COMMIT}"
    assert told["output"] == "vit-msn-tiny.onnx"
    assert sorted(p.name for p in outputs.iterdir()) == [
        "vit-msn-tiny.onnx",
        "vit-msn-tiny.onnx.json",
    ]


# --- pictures -------------------------------------------------------------------------------------


def test_bombs_and_deep_pictures_are_named_counted_and_skipped(tiny, tmp_path, outputs) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (40, 40), (9, 9, 200)).save(folder / "good.png")
    Image.new("RGB", (40, 40), (200, 9, 9)).save(folder / "too.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")  # 400 million pixels in 49 KB
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(folder / "deep.png")
    (folder / "caf\udce9.png").write_bytes(b"")  # a name that is no text: latin-1 on disk
    result = export(tiny, outputs, "--images", str(folder), "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["check"]["images"] == 2
    assumed, *notes, builder = told["notes"]
    assert assumed.startswith("preprocessing hf was assumed")
    assert [note.split(" is not a readable picture")[0] for note in notes] == [
        f"skipped: {folder / name}" for name in ("bomb.png", "caf\ufffd.png", "deep.png")
    ]
    assert "could be decompression bomb" in notes[0]
    assert "it has more than 8 bits a channel" in notes[2]
    written = manifest.read(outputs / "m.onnx")
    assert written is not None
    assert list(written.notes) == [assumed, *notes, builder]


def test_nothing_but_bombs_is_an_error(tiny, tmp_path, outputs) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    message = refused(tiny, outputs, "--images", str(folder))
    assert "all 1 pictures of" in message
    assert "could be decompression bomb" in message


@pytest.mark.parametrize("which", ["checkpoint", "output"])
def test_a_path_that_no_library_can_open_is_refused_at_once(tiny, tmp_path, outputs, which) -> None:
    folder = tmp_path / "mod\udce8le"  # as Python reads a latin-1 name from a disk
    folder.mkdir()
    result = export(folder, outputs) if which == "checkpoint" else export(tiny, folder)
    assert r"mod\udce8le" in last_line(result)
    assert "is not UTF-8; rename it" in last_line(result)
    assert "load checkpoint" not in result.stderr


# --- outputs --------------------------------------------------------------------------------------


def test_an_output_that_is_what_is_read_is_refused(checkpoint) -> None:
    weights = checkpoint / "model.safetensors"
    before, output = weights.read_bytes(), checkpoint / "m.onnx"
    output.hardlink_to(weights)
    for source in (weights, checkpoint):
        result = CliRunner().invoke(main, ["onnx", str(source), "-o", str(output), "--force"])
        assert f"output {output} is what is read; choose another with -o" in last_line(result)
        assert weights.read_bytes() == before


def test_a_device_is_never_replaced(tiny, tmp_path) -> None:
    output = tmp_path / "m.onnx"
    output.symlink_to("/dev/null")
    result = CliRunner().invoke(main, ["onnx", str(tiny), "-o", str(output), "--force"])
    assert f"output {output} is a device or a pipe; name a file with -o" in last_line(result)
    assert Path("/dev/null").is_char_device()


def test_a_folder_that_is_not_there_is_named(tiny, tmp_path) -> None:
    result = export(tiny, tmp_path / "none")
    assert f"output folder {tmp_path / 'none'} does not exist; create it" in last_line(result)


def mounted(folder: Path, options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:  # noqa: PLW1510
        pytest.skip("only root may mount a file system")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ro", "is not writable; choose another with -o"),
        ("size=64k", "(No space left on device); free some or choose another -o"),
    ],
    ids=["read-only", "full"],
)
def test_a_file_system_that_takes_no_more_is_named(tiny, outputs, options, message) -> None:
    mounted(outputs, options)
    try:
        assert message in refused(tiny, outputs)
    finally:
        subprocess.run(["umount", str(outputs)], check=True)


def test_an_error_of_the_system_that_nobody_expects_is_one_line_too(
    tiny, outputs, monkeypatch
) -> None:
    def broken(path: Path, *_: object, **__: object) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("msn_export.files._written", deque())  # of other tests in this process
    monkeypatch.setattr("msn_export.input_files.os.open", broken)
    assert refused(tiny, outputs).endswith("config.json cannot be read: Input/output error")
    monkeypatch.undo()
    monkeypatch.setattr("msn_export.files._written", deque())
    monkeypatch.setattr("msn_export.commands.onnx.sha256_of", broken)
    assert refused(tiny, outputs).endswith("m.onnx: Input/output error")
