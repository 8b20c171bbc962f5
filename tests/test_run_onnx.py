"""``msn-export onnx``: what it writes has passed its check; what fails leaves nothing behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import TINY, hugging_face, processor
from click.testing import CliRunner
from torch.multiprocessing.reductions import StorageWeakRef

from msn_export import images, manifest, run_onnx
from msn_export.check import gate
from msn_export.cli import main
from msn_export.preprocessing import from_processor_config
from msn_export.spec import Dtype

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    hugging_face(folder, labels=3)
    processor(folder, size={"height": 32, "width": 32}, resample=3, **IMAGENET)
    return folder


def export(checkpoint: object, output: Path, *options: str):
    arguments = ["onnx", str(checkpoint), "-o", str(output), "--json", *options]
    return CliRunner().invoke(main, arguments)


def test_json_and_manifest_say_what_was_made(checkpoint, photographs, tmp_path) -> None:
    output = tmp_path / "m.onnx"
    result = export(checkpoint, output, "--images", str(photographs))
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["output"] == str(output)
    assert told["bytes"] == output.stat().st_size
    assert told["attention"] == {"expected": 2, "fused": 2, "form": "4-D Attention"}
    assert sum(told["ops"].values()) == told["nodes"] == 46
    check = told["check"]
    assert check["images"] == 16
    assert check["source"] == str(photographs)
    assert check["batches"] == [1, 8, 32]
    assert check["passed"] is True
    assert check["max_abs"] <= 1e-4
    assert check["executed_on"].startswith("onnxruntime")
    assert told["seconds"] > 0
    assert told["peak_rss_bytes"] > 1e8
    written = manifest.read(output)
    assert written is not None
    manifest.require_match(output, written)
    assert written.labels == ("class 0", "class 1", "class 2")
    assert written.preprocessing.resample == "bicubic"
    assert written.checkpoint.source == str(checkpoint)
    assert written.outputs[0].name == "logits"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx.json"]


def test_the_file_agrees_with_transformers(tmp_path, photographs) -> None:
    reference = hugging_face(tmp_path / "hf", labels=3)
    processor(tmp_path / "hf", size={"height": 32, "width": 32}, **IMAGENET)
    output = tmp_path / "m.onnx"
    assert export(tmp_path / "hf", output, "--head", "logits", "--head", "tokens").exit_code == 0
    config = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    pictures = images.preprocess(images.find(photographs), from_processor_config(config, None))
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    logits, tokens = session.run(["logits", "last_hidden_state"], {"pixel_values": pictures})
    with torch.no_grad():
        wanted = reference(torch.from_numpy(pictures), output_hidden_states=False)
        hidden = reference.vit(torch.from_numpy(pictures)).last_hidden_state
    np.testing.assert_allclose(logits, wanted.logits, atol=1e-4)
    np.testing.assert_allclose(tokens, hidden, atol=1e-4)


def test_metadata_travels_inside_the_file(checkpoint, tmp_path) -> None:
    output = tmp_path / "m.onnx"
    assert export(checkpoint, output).exit_code == 0
    model = onnx.load(output)
    props = {prop.key: prop.value for prop in model.metadata_props}
    assert props["product"].startswith("msn-export ")
    assert props["checkpoint"] == str(checkpoint)
    assert json.loads(props["preprocessing"])["name"] == "preprocessor_config.json"
    assert model.producer_name == "msn-export"


def test_two_exports_give_the_same_bytes(checkpoint, tmp_path) -> None:
    for name in ("a.onnx", "b.onnx"):
        assert export(checkpoint, tmp_path / name).exit_code == 0
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


VARIATIONS = {
    "fp16": (["--dtype", "fp16"], {"dtype": "fp16"}),
    "bf16": (["--dtype", "bf16"], {"dtype": "bf16"}),
    "uint8": (["--input", "uint8"], {}),
    "uint8 fp16": (["--input", "uint8", "--dtype", "fp16"], {"dtype": "fp16"}),
    "onnxruntime": (["--target", "onnxruntime"], {"opset": 23}),
    "tensorrt-8": (["--target", "tensorrt-8"], {"opset": 17}),
    "tensorrt-8 fp16": (["--target", "tensorrt-8", "--dtype", "fp16"], {"opset": 17}),
    "static": (["--batch", "3"], {"profiles": [{"min": 3, "opt": 3, "max": 3}]}),
    "size": (["--image-size", "48x64"], {}),
    "all heads": ([f"--head={head}" for head in ("cls", "mean", "tokens", "logits")], {}),
    "not simplified": (["--no-simplify"], {"simplified": "not asked for"}),
    "msn-eval": (["--preprocess", "msn-eval"], {}),
    "no islands": (["--dtype", "fp16", "--islands", "none"], {"islands": {}}),
}


@pytest.mark.parametrize(("options", "expected"), VARIATIONS.values(), ids=VARIATIONS.keys())
def test_every_option_passes_its_check(checkpoint, tmp_path, options, expected) -> None:
    result = export(checkpoint, tmp_path / "m.onnx", *options)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["check"]["passed"] is True
    assert told["attention"]["fused"] == 2
    assert {key: told[key] for key in expected} == expected
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)


def test_bf16_says_how_it_was_run(checkpoint, tmp_path) -> None:
    told = json.loads(export(checkpoint, tmp_path / "m.onnx", "--dtype", "bf16").stdout)
    assert "bf16 emulated" in told["check"]["executed_on"]


def test_without_images_the_noise_is_called_noise(checkpoint, tmp_path) -> None:
    told = json.loads(export(checkpoint, tmp_path / "m.onnx").stdout)
    assert told["check"]["source"] == "seeded noise (no --images given)"


def test_pytorch_holds_no_weights_while_the_graph_is_checked(
    checkpoint, tmp_path, monkeypatch
) -> None:
    storages: list[StorageWeakRef] = []
    expired: list[bool] = []
    load, verify = run_onnx.load_checkpoint, run_onnx.verify

    def loaded(*arguments, **options):
        found = load(*arguments, **options)
        weights = found.model.parameters()
        storages.extend(StorageWeakRef(weight.untyped_storage()) for weight in weights)
        return found

    def verified(*arguments):
        expired.extend(storage.expired() for storage in storages)
        return verify(*arguments)

    monkeypatch.setattr(run_onnx, "load_checkpoint", loaded)
    monkeypatch.setattr(run_onnx, "verify", verified)
    assert export(checkpoint, tmp_path / "m.onnx").exit_code == 0
    assert expired == [True] * len(storages)
    assert storages


def test_no_check_says_so(checkpoint, tmp_path) -> None:
    told = json.loads(export(checkpoint, tmp_path / "m.onnx", "--no-check").stdout)
    assert told["check"] is None


def test_a_broken_picture_among_good_ones_is_named_and_skipped(
    checkpoint, photographs, tmp_path
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("coffee.png", "chelsea.png"):
        (folder / name).write_bytes((photographs / name).read_bytes())
    (folder / "broken.png").write_bytes(b"not a picture")
    told = json.loads(export(checkpoint, tmp_path / "m.onnx", "--images", str(folder)).stdout)
    assert told["check"]["images"] == 2
    assert len(told["notes"]) == 1
    assert "broken.png is not a readable picture" in told["notes"][0]


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
    "missing file": (
        lambda tmp: (tmp / "none.safetensors", []),
        "does not exist; expected a folder, a weights file",
    ),
    "another model": (
        lambda tmp: (changed_config(tmp / "c", model_type="vit"), []),
        "is of model type 'vit'; expected 'vit_msn'",
    ),
    "mis-shaped": (
        lambda tmp: (changed_config(tmp / "c", intermediate_size=96), []),
        "keys of another shape (encoder.layer.0.intermediate.dense.bias is [128], expected [96]",
    ),
    "no weights": (lambda tmp: (fill(tmp / "c") and tmp / "c", []), "config.json is missing"),
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
        "none.json cannot be read",
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
    monkeypatch.setitem(gate.GATES, Dtype.FP32, gate.Gate(max_abs=1e-12))
    result = export(checkpoint, tmp_path / "m.onnx")
    assert result.exit_code == 1
    assert "output 'logits', does not agree with its reference: max_abs" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_nothing_at_the_output_and_the_next_run_cleans_up(
    checkpoint, tmp_path
) -> None:
    output = tmp_path / "m.onnx"
    command = [sys.executable, "-m", "msn_export.cli", "onnx", str(checkpoint), "-o", str(output)]
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
    command = [sys.executable, "-m", "msn_export.cli", "onnx", str(checkpoint), "-o", "m.onnx"]
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


def test_tiny_is_what_the_fixtures_make() -> None:
    assert TINY["hidden_size"] // TINY["num_attention_heads"] == 32
