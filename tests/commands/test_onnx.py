"""``msn-export onnx``: what it writes has passed its check; what fails leaves nothing behind."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch.multiprocessing.reductions import StorageWeakRef

from msn_export import image_folder, images, manifest
from msn_export.commands import onnx as run_onnx
from msn_export.processor_config import from_processor_config
from msn_export.spec import ImageSize
from tests.builders.checkpoints import TINY, hugging_face, processor
from tests.builders.exports import export

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    hugging_face(folder, labels=3)
    processor(folder, size={"height": 32, "width": 32}, resample=3, **IMAGENET)
    return folder


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
    assert check["batches"] == [1, 7, 8]  # each image once
    assert check["images_apart"] is True
    assert check["passed"] is True
    assert check["max_abs"] <= 1e-4
    assert check["executed_on"].startswith("onnxruntime")
    assert told["seconds"] > 0
    assert told["peak_rss_bytes"] > 1e8
    written = manifest.read(output)
    assert written is not None
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
    paths = image_folder.find(photographs).paths
    pictures = images.preprocess(paths, from_processor_config(config, None))
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
    "portable": (["--target", "portable"], {"opset": 17, "target": "portable"}),
    "tensorrt-8 fp16": (
        ["--target", "tensorrt-8", "--dtype", "fp16"],
        {"opset": 17, "target": "portable"},
    ),
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


def test_no_name_of_an_output_is_one_of_ours(checkpoint, tmp_path) -> None:
    for name in ("emulated.onnx", "observed.onnx"):
        result = export(checkpoint, tmp_path / name, "--dtype", "bf16")
        assert result.exit_code == 0, result.output


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
    load, evaluate = run_onnx.load_checkpoint, run_onnx.evaluate

    def loaded(*arguments, **options):
        found = load(*arguments, **options)
        weights = found.model.parameters()
        storages.extend(StorageWeakRef(weight.untyped_storage()) for weight in weights)
        return found

    def evaluated(*arguments):
        expired.extend(storage.expired() for storage in storages)
        return evaluate(*arguments)

    monkeypatch.setattr(run_onnx, "load_checkpoint", loaded)
    monkeypatch.setattr(run_onnx, "evaluate", evaluated)
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
    broken, unbuildable = told["notes"]
    assert "broken.png is not a readable picture" in broken
    assert "parser and builder alone do not build this fp32 graph" in unbuildable


def test_tiny_is_what_the_fixtures_make() -> None:
    assert TINY["hidden_size"] // TINY["num_attention_heads"] == 32


# --- preprocessing --------------------------------------------------------------------------------


def test_sizes_that_differ_are_both_named_and_one_is_to_be_chosen(tmp_path) -> None:
    hugging_face(tmp_path / "hf", image_size=48)
    processor(tmp_path / "hf", size={"height": 32, "width": 32}, **IMAGENET)
    result = export(tmp_path / "hf", tmp_path / "m.onnx")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'hf'}: preprocessor_config.json makes images of 32x32 and the model's "
        "configuration says 48x48; choose one with --image-size"
    )
    assert not (tmp_path / "m.onnx").exists()
    for size in ("32", "48"):
        result = export(tmp_path / "hf", tmp_path / f"{size}.onnx", "--image-size", size)
        assert result.exit_code == 0, result.output
        known = manifest.read(tmp_path / f"{size}.onnx")
        assert known.preprocessing.size == ImageSize(int(size), int(size))
    # one that is chosen does not come from the file that differs
    assert export(tmp_path / "hf", tmp_path / "hf.onnx", "--preprocess", "hf").exit_code == 0


def test_a_processor_config_goes_before_a_preprocessor_config(tmp_path) -> None:
    hugging_face(tmp_path / "hf")
    processor(tmp_path / "hf", size=32, resample=3)
    nested = {"image_processor": {"size": 32, "resample": 0}, "processor_class": "X"}
    (tmp_path / "hf" / "processor_config.json").write_text(json.dumps(nested))
    assert export(tmp_path / "hf", tmp_path / "m.onnx").exit_code == 0
    made = manifest.read(tmp_path / "m.onnx").preprocessing
    assert (made.name, made.resample) == ("processor_config.json", "nearest")
    (tmp_path / "hf" / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    assert export(tmp_path / "hf", tmp_path / "m.onnx", "--force").exit_code == 0
    assert manifest.read(tmp_path / "m.onnx").preprocessing.name == "preprocessor_config.json"


def test_what_is_assumed_unused_turned_or_skipped_is_noted(tmp_path) -> None:
    hugging_face(tmp_path / "hf")
    folder = tmp_path / "pictures"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.radial_gradient("L").convert("RGB").save(folder / "a.jpg", exif=exif)
    Image.linear_gradient("L").convert("RGB").save(folder / "c.jpg")
    (folder / "b.txt").write_text("no picture")
    result = export(tmp_path / "hf", tmp_path / "m.onnx", "--images", folder, "--json")
    told = json.loads(result.stdout)
    assert told["preprocessing"]["assumed"] is True
    assert told["preprocessing"]["exif"] == "apply"
    assert told["check"]["skipped"] == {"no picture": 1}
    assert told["notes"][:-1] == [
        "preprocessing hf was assumed: nothing says how the model's pictures are made, "
        "--preprocess does",
        "skipped 1 no picture",
        "pictures turned by their EXIF orientation: 1",
    ]
    processor(tmp_path / "hf", size=32, zoom=2)
    options = ("--images", folder, "--json", "--exif", "ignore", "--force")
    told = json.loads(export(tmp_path / "hf", tmp_path / "m.onnx", *options).stdout)
    assert told["preprocessing"]["assumed"] is False
    assert told["preprocessing"]["exif"] == "ignore"
    assert told["notes"][:-1] == [
        "preprocessor_config.json: not used, as unknown here: 'zoom'",
        "skipped 1 no picture",
    ]
