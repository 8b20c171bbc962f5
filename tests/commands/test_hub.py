"""A folder that ``hub`` wrote is whole, checked, and what transformers would have written."""

import json
import os
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, ViTMSNForImageClassification

import msn_export
from msn_export import manifest as manifests
from msn_export.cli import main
from msn_export.commands.hub import push
from msn_export.errors import GraphError, OutputError, ToleranceError
from msn_export.hub_folder import GRAPHS
from msn_export.metrics import evaluate
from msn_export.runtime import open_runner
from msn_export.spec import Dtype
from tests.builders.checkpoints import hugging_face, processor
from tests.builders.tiny_artifacts import pictures
from tests.fakes.hub import receive

FILES = [
    "README.md", "config.json",
    *(f"onnx/{name}.onnx{end}" for name in ("model", "model_fp16", "model_quantized")
      for end in ("", ".json")),
    "preprocessor_config.json",
]  # fmt: skip


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["hub", *map(str, arguments)])


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier that crops its pictures."""
    folder = tmp_path_factory.mktemp("hub") / "checkpoint"
    hugging_face(folder, labels=3)
    processor(folder, image_processor_type="DeiTImageProcessor", size={"height": 36, "width": 36},
              crop_size={"height": 32, "width": 32}, do_center_crop=True, resample=3)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def written(checkpoint: Path, photographs: Path) -> tuple[Path, dict]:
    """The folder of that, with all graphs, and what ``--json`` says; not to be changed."""
    folder = checkpoint.with_name("folder")
    result = run(checkpoint, "-o", folder, "--images", photographs, "--json")
    assert result.exit_code == 0, result.output
    return folder, json.loads(result.stdout)


def test_a_folder_has_its_files_and_no_other(written) -> None:
    folder, told = written
    assert files_in(folder) == sorted(FILES)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["checkpoint", "folder"]
    assert [one["file"] for one in told["graphs"]] == list(GRAPHS.values())
    assert told["task"] == "image-classification"
    assert told["pushed"] == ""


def test_every_graph_passed_its_check_and_its_manifest_describes_it(written) -> None:
    folder, told = written
    for one in told["graphs"]:
        manifest = manifests.read(folder / one["file"])
        assert manifest is not None
        assert manifest.check is not None
        assert manifest.check.passed
        assert one["check"]["passed"] is True
        assert (manifest.sha256, manifest.dtype) == (one["sha256"], one["dtype"])
        assert [spec.name for spec in manifest.outputs] == ["logits"]
        assert [spec.dtype for spec in (*manifest.inputs, *manifest.outputs)] == ["float"] * 2
        assert (manifest.target, manifest.opset) == ("portable", 17)


def test_transformers_reads_the_configuration_as_that_of_the_checkpoint(
    checkpoint, written
) -> None:
    folder, _ = written
    found, own = (AutoConfig.from_pretrained(path).to_dict() for path in (folder, checkpoint))
    for name in ("_name_or_path", "transformers_version", "dtype"):
        found.pop(name, None)
        own.pop(name, None)
    assert found == own
    assert found["id2label"] == {0: "class 0", 1: "class 1", 2: "class 2"}


@pytest.mark.parametrize("dtype", GRAPHS)
def test_transformers_pixels_give_transformers_logits(
    checkpoint, written, photographs, dtype
) -> None:
    folder, _ = written
    model = ViTMSNForImageClassification.from_pretrained(checkpoint).eval()
    made = AutoImageProcessor.from_pretrained(folder, backend="pil")
    opened = [Image.open(path).convert("RGB") for path in sorted(photographs.iterdir())[:4]]
    pixels = made(opened, return_tensors="pt")["pixel_values"]
    right = model(pixels).logits.detach().numpy()
    with open_runner(folder, dtype=dtype, providers=["cpu"]) as runner:
        assert runner.manifest.dtype is dtype
        rows = runner(pixels.numpy()).logits
        # the folder's own preprocessing is what transformers makes of its file
        np.testing.assert_allclose(runner.preprocess(opened), pixels.numpy(), atol=1e-5)
    cosines = (rows * right).sum(1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(right, axis=1)
    least = {Dtype.FP32: 0.9999, Dtype.FP16: 0.999, Dtype.INT8: 0.98}  # the gates'
    assert cosines.min() >= least[dtype]


def test_the_card_has_the_hubs_metadata_and_the_figures(written) -> None:
    folder, told = written
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers.js",
        "pipeline_tag": "image-classification",
        "tags": ["onnx", "vit_msn", "msn-export"],
    }
    for one in told["graphs"]:
        assert f"`{one['file']}`" in body
        assert f"{one['check']['relative']:.1e}" in body
    assert str(folder.parent) not in body


def test_an_encoder_gives_every_token(tmp_path) -> None:
    hugging_face(tmp_path / "encoder")
    found = msn_export.hub(tmp_path / "encoder", tmp_path / "out", dtypes="fp16")
    assert found.task == "image-feature-extraction"
    assert files_in(tmp_path / "out/onnx") == ["model_fp16.onnx", "model_fp16.onnx.json"]
    manifest = manifests.read(tmp_path / "out/onnx/model_fp16.onnx")
    assert [spec.name for spec in manifest.outputs] == ["last_hidden_state"]
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == ["ViTMSNModel"]
    assert "id2label" not in config
    assert any("preprocessing hf was assumed" in note for note in found.notes)
    assert "preprocessing hf was assumed" in (tmp_path / "out/README.md").read_text()


def test_int8_alone_is_quantised_from_an_fp32_graph_that_is_not_kept(tmp_path, photographs) -> None:
    hugging_face(tmp_path / "encoder")
    result = run(tmp_path / "encoder", "-o", tmp_path / "out", "--dtype", "int8",
                 "--images", photographs)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert files_in(tmp_path / "out/onnx") == ["model_quantized.onnx", "model_quantized.onnx.json"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    hugging_face(folder / "backbone")
    pictures(folder / "labelled", 12)
    msn_export.fit(folder / "backbone", folder / "labelled", folder / "m.onnx", preprocess="raw")
    return folder / "m.onnx"


def test_a_fitted_classifier_becomes_one_of_transformers(fitted, tmp_path) -> None:
    result = run(fitted, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["ViTMSNForImageClassification"]
    assert config.id2label == {0: "a", 1: "b"}
    own = manifests.read(fitted)
    images = np.random.default_rng(0).uniform(0, 255, (3, 3, 32, 32)).astype(np.float32)
    with open_runner(fitted) as runner:
        right = runner(images).logits
    for dtype, close in (("fp32", 1e-5), ("fp16", 2e-2)):
        with open_runner(tmp_path / "out", dtype=dtype) as runner:
            assert runner.labels == ("a", "b")
            assert runner.manifest.fit == own.fit
            np.testing.assert_allclose(runner(images).logits, right, rtol=close, atol=close)
    _, front, body = (tmp_path / "out/README.md").read_text().split("---\n", 2)
    (index,) = yaml.safe_load(front)["model-index"]
    (result,) = index["results"]
    assert result["dataset"] == {"name": "labelled", "type": "imagefolder"}
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("accuracy", round(own.fit.accuracy.top1, 4))
    assert "## Classifier" in body
    assert str(fitted.parent) not in body


def test_a_graph_keeps_its_image_size_labels_and_preprocessing(checkpoint, tmp_path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\nbird\n")
    msn_export.export(
        checkpoint, tmp_path / "m.onnx", image_size="48", labels=tmp_path / "labels.txt",
        preprocess="msn-eval", exif="ignore", check=False,
    )  # fmt: skip
    msn_export.hub(tmp_path / "m.onnx", tmp_path / "out", dtypes=["fp32"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["image_size"], list(config["label2id"])) == (48, ["cat", "dog", "bird"])
    manifest = manifests.read(tmp_path / "out/onnx/model.onnx")
    made = manifest.preprocessing
    assert (made.size.height, made.short_side, made.exif) == (48, 55, "ignore")
    assert manifest.labels == ("cat", "dog", "bird")


# --- what is refused -----------------------------------------------------------------------------


def test_a_graph_that_fails_its_gate_leaves_nothing(checkpoint, tmp_path, monkeypatch) -> None:
    def failing(self: object, *_: object) -> None:
        raise ToleranceError("the fp16 graph differs")

    real = evaluate.Evaluation.require

    def require(self: evaluate.Evaluation, what: str) -> object:
        return failing(self) if what == "the fp16 graph" else real(self, what)

    monkeypatch.setattr(evaluate.Evaluation, "require", require)
    line = refused(checkpoint, "-o", tmp_path / "out", "--dtype", "fp32,fp16")
    assert line == "error: the fp16 graph differs"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_and_names_nothing(checkpoint, tmp_path, monkeypatch) -> None:
    """Graphs that lay in the staging folder went with it."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("msn_export.files._written", deque())
    monkeypatch.setattr("msn_export.commands.hub.HubCard", interrupted)
    result = run(checkpoint, "-o", tmp_path / "out", "--dtype", "fp32")
    assert result.exit_code == 130
    line = result.stderr.strip().splitlines()[-1]
    assert line == "error: interrupted; nothing was written"
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_whole_and_only_if_asked_to(checkpoint, tmp_path) -> None:
    out = tmp_path / "out"
    assert run(checkpoint, "-o", out, "--dtype", "fp16").exit_code == 0
    assert refused(checkpoint, "-o", out) == (
        f"error: output {out} exists; --force replaces it, -o writes elsewhere"
    )
    assert run(checkpoint, "-o", out, "--dtype", "fp32", "--force").exit_code == 0
    assert files_in(out / "onnx") == ["model.onnx", "model.onnx.json"]
    (out / "notes.txt").touch()
    assert refused(checkpoint, "-o", out, "--force") == (
        f"error: output {out} holds notes.txt, which msn-export hub does not write; move it away, "
        "or choose another -o"
    )
    assert list(tmp_path.iterdir()) == [out]


def test_a_graph_without_a_way_to_its_weights_is_refused(checkpoint, fitted, tmp_path) -> None:
    lone = tmp_path / "lone.onnx"
    shutil.copy(fitted, lone)
    assert refused(lone, "-o", tmp_path / "out") == (
        f"error: {lone} has no manifest that names its checkpoint; give the checkpoint itself"
    )
    shutil.copytree(checkpoint, tmp_path / "moved")
    graph = tmp_path / "m.onnx"
    msn_export.export(tmp_path / "moved", graph, check=False)
    hugging_face(tmp_path / "moved", labels=3, seed=1)
    assert "has other weights than" in refused(graph, "-o", tmp_path / "out")
    shutil.rmtree(tmp_path / "moved")
    line = refused(graph, "-o", tmp_path / "out")
    assert line.startswith(f"error: {graph} was exported from what cannot be read: checkpoint ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_format": "uint8"}, "takes uint8, which transformers.js and optimum do not feed"),
        ({"keep_patches": "0.5"}, r"computes 8 patches alone \(--keep-patches\)"),
    ],
)
def test_a_graph_that_no_client_runs_whole_is_refused(
    checkpoint, tmp_path, options, message
) -> None:
    msn_export.export(checkpoint, tmp_path / "m.onnx", check=False, **options)
    with pytest.raises(GraphError, match=message.replace("--keep-patches", "keep_patches")):
        msn_export.hub(tmp_path / "m.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- uploads -------------------------------------------------------------------------------------


def test_what_is_pushed_is_the_folder(checkpoint, tmp_path) -> None:
    """In a process of its own: huggingface_hub reads its environment once."""
    out = tmp_path / "out"
    own = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    with receive(private=True) as (address, files):
        done = subprocess.run(
            [sys.executable, "-m", "msn_export", "hub", checkpoint, "-o", out, "--dtype", "fp32",
             "--push", "me/model", "--private", "--json"],
            env={**own, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
                 "HF_ENDPOINT": address, "HF_TOKEN": "hf_x"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"] == f"{address}/me/model"
    assert files == {name: (out / name).read_bytes() for name in files_in(out)}
    assert '"me/model"' in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("refuse", "private", "reason"),
    [
        ("preupload", False, "no write access); check the name, the token and the network, and"),
        ("", True, "repository me/model is public; leave --private out, or name another"),
    ],
)
def test_what_cannot_be_pushed_is_written_and_that_is_said(
    written, monkeypatch, refuse, private, reason
) -> None:
    folder, _ = written
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with receive(refuse=refuse) as (address, files):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        with pytest.raises(OutputError, match=f"{folder} is written and not pushed") as raised:
            push(folder, "me/model", private=private)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)
    assert files == {}


def test_without_a_token_nothing_is_begun(checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert refused(checkpoint, "-o", tmp_path / "out", "--push", "me/model") == (
        "error: --push needs a token of the hub; run 'hf auth login', or set HF_TOKEN"
    )
    assert list(tmp_path.iterdir()) == []
