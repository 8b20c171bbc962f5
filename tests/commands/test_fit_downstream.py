"""What comes after ``fit`` takes its graph as any classifier's, and its checkpoint with it."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from msn_export.benchmark.contenders import Placement, artifact, origin_of
from msn_export.benchmark.worker import open_reference
from msn_export.cli import main
from msn_export.commands.drift import DriftJob, run_drift
from msn_export.commands.fit import FitJob, run_fit
from msn_export.commands.trt import TrtJob, run_trt
from msn_export.commands.validate import ValidateJob, run_validate
from msn_export.compare.inspection import inspect
from msn_export.errors import BenchError, GraphError
from msn_export.manifest import manifest_path, seal
from msn_export.manifest import read as read_manifest
from msn_export.runtime import open_runner
from msn_export.spec import ComputeCapability, Dtype, Head, ImageSize
from tests.builders import labelled
from tests.builders.checkpoints import hugging_face
from tests.builders.engine_builds import NEEDS_RTX


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled.write(tmp_path_factory.mktemp("fit") / "digits", each=8, classes=4)


@pytest.fixture(scope="module")
def graph(trained: Path, training: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier on the features of two blocks, with those beside it; not to be changed."""
    output = tmp_path_factory.mktemp("fitted") / "c.onnx"
    job = FitJob(str(trained), output, labelled=training, blocks=2, heads=(Head.FEATURES,))
    return run_fit(job)[0]


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_validate_gives_the_checkpoint_the_classifier(trained, graph, training) -> None:
    found = run_validate(ValidateJob(str(trained), str(graph), training))
    assert found.passed, found.reasons
    assert set(found.check.outputs) == {"logits", "features"}
    assert "the checkpoint's classifier is the one that was fitted for c.onnx" in found.notes


def test_validate_finds_another_backbone(graph, training, tmp_path) -> None:
    hugging_face(tmp_path / "other", num_hidden_layers=3, intermediate_size=256)
    found = run_validate(ValidateJob(str(tmp_path / "other"), str(graph), training))
    assert not found.passed


def test_weights_that_were_changed_are_not_the_fitted_ones(trained, graph, tmp_path) -> None:
    """Otherwise a classifier that was damaged would be compared with itself."""
    model = onnx.load(graph)
    (weight,) = [one for one in model.graph.initializer if tuple(one.dims) == (4, 128)]
    rows = onnx.numpy_helper.to_array(weight).copy()
    rows[0, 0] *= 1.001
    weight.CopyFrom(onnx.numpy_helper.from_array(rows, weight.name))
    changed = tmp_path / "c.onnx"
    onnx.save(model, changed)
    manifest = read_manifest(graph)
    assert manifest is not None
    content = changed.read_bytes()
    described = replace(manifest, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    manifest_path(changed).write_text(seal(described))
    with pytest.raises(GraphError, match="which the checkpoint does not have, and the fp32 graph"):
        run_validate(ValidateJob(str(trained), str(changed)))


def test_drift_walks_the_blocks_of_both(trained, graph, training) -> None:
    found = run_drift(DriftJob(str(trained), str(graph), training))
    assert found.passed, found.sentence
    assert {"logits", "features"} <= {stage.name for stage in found.stages}


def test_bench_times_pytorch_with_the_classifier(graph, training, tmp_path) -> None:
    (entry,) = [artifact(graph, Placement(1), graph.name)]
    origin = origin_of([entry], None, ("logits",), ImageSize(32, 32), folder=tmp_path)
    heads = open_reference(origin, "eager")
    with open_runner(graph, providers=["cpu"]) as runner:
        pixels = runner.preprocess(sorted(training.rglob("*.png"))[:5])
        wanted = runner(pixels)["logits"]
    with torch.inference_mode():
        (found,) = heads(torch.from_numpy(pixels))
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4)


def test_bench_says_that_a_classifier_is_not_there(graph, tmp_path) -> None:
    entry = artifact(graph, Placement(1), graph.name)
    assert entry.manifest is not None
    lost = replace(entry.manifest.fit, weights="00" * 32)
    other = replace(entry, manifest=replace(entry.manifest, fit=lost))
    with pytest.raises(BenchError, match="the fp32 graph that msn-export fit wrote is not beside"):
        origin_of([other], None, ("logits",), ImageSize(32, 32), folder=tmp_path)


def test_inspect_and_report_show_the_classifier(trained, graph, tmp_path) -> None:
    found = inspect(graph)
    assert found.fitted.startswith("4 classes fitted on msn features of 2 blocks of 32 images of ")
    page, card = tmp_path / "r.html", tmp_path / "r.md"
    invoke("report", graph, "-o", page, "--markdown", card)
    html = page.read_text()
    assert '<section id="classifier">' in html
    assert 'aria-label="Confusion matrix of 4 classes by the highest logit"' in html
    assert "## Classifier" in card.read_text()
    assert "* accuracy: " in card.read_text()


def test_a_report_without_accuracy_has_no_matrix(trained, tmp_path) -> None:
    folder = labelled.write(tmp_path / "digits", each=1, classes=2)
    job = FitJob(str(trained), tmp_path / "m.onnx", labelled=folder, check=False)
    output, manifest = run_fit(job)
    assert (manifest.check, manifest.fit.relative, manifest.fit.compared) == (None, None, 0)
    invoke("report", output, "-o", tmp_path / "r.html")
    html = (tmp_path / "r.html").read_text()
    assert '<section id="classifier">' in html
    assert "Confusion matrix" not in html


def test_triton_and_embed_give_the_names_of_the_classes(graph, training, tmp_path) -> None:
    invoke("triton", graph, "-o", tmp_path / "repository")
    names = sorted(path.read_text() for path in (tmp_path / "repository").rglob("*labels*.txt"))
    assert names == ["digit 0\ndigit 1\ndigit 2\ndigit 3\n"]
    invoke("embed", graph, training, "-o", tmp_path / "rows.npy", "--output-name", "features")
    lines = (tmp_path / "rows.npy.rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["label"] for row in rows} <= {f"digit {i}" for i in range(4)}
    right = [row["path"].startswith(f"{row['label']}/") for row in rows]
    assert np.mean(right) > 0.9
    assert np.load(tmp_path / "rows.npy").shape == (32, 128)


@pytest.mark.slow  # compiles
@NEEDS_RTX
def test_an_engine_keeps_the_record_and_attention_fused(trained, graph, training, tmp_path) -> None:
    source = tmp_path / "c.onnx"
    for path in (graph, manifest_path(graph)):
        shutil.copy(path, tmp_path)
    job = TrtJob(
        source, tmp_path / "c.engine", Dtype.FP16, "tensorrt-rtx", (ComputeCapability(8, 9),),
        images=training,
    )  # fmt: skip
    _, manifest = run_trt(job)
    before = read_manifest(source)
    assert before is not None
    assert manifest.fit == before.fit
    assert manifest.engine.fused_attention == 3
    assert manifest.labels == before.labels
