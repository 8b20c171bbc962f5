"""``calibrate --labelled``: the accuracy of fp32, of the rest's precision and of 8 bits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from msn_export import manifest as manifests
from msn_export.calibration.images import hash_of
from msn_export.commands import calibrate as command
from msn_export.images import read
from msn_export.metrics.accuracy import compared
from msn_export.preprocessing import preset
from msn_export.reporting.describe import artifact_rows
from msn_export.spec import ImageSize
from tests.builders.calibrations import QUICK, done, refused
from tests.builders.tiny_artifacts import classifier, pictures, predicted


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"), 12)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, graph: Path) -> Path:
    """Forty pictures; the fp32 graph has 38 right."""
    return predicted(tmp_path_factory.mktemp("labelled") / "set", graph, 40, wrong=(0, 9))


def test_the_accuracy_of_all_three_is_part_of_the_verdict(graph, images, labelled) -> None:
    output = graph.with_name("int8.onnx")
    found = done(graph, images, output, "--int8", *QUICK, "--labelled", str(labelled))
    record = found["check"]["accuracy"]
    assert record["reference"]["top1"] == 38 / 40
    assert record["passed"]
    assert (record["images"], record["by"]) == (40, "logits")
    base = found["quantization"]["twin"]["accuracy"]
    assert base["reference"]["top1"] == 38 / 40
    assert base["lost"] <= record["lost"] + record["gained"] + 2
    assert (
        f"accuracy {record['candidate']['top1']:.1%} (fp16: {base['candidate']['top1']:.1%}, "
        f"fp32: 95.0%; {record['conclusion']})"
    ) in found["quantization"]["verdict"]
    written = manifests.read(output)
    assert written is not None
    shown = [text for _, text in artifact_rows(written)]
    assert any("95.0% (83.5% to 98.6%) in the reference" in text for text in shown)


def test_pictures_that_were_calibrated_on_are_not_judged_by(graph, labelled, tmp_path) -> None:
    options = ("--int8", *QUICK, "--labelled", str(labelled))
    found = done(graph, labelled, tmp_path / "m.onnx", *options)
    record = found["check"]["accuracy"]
    assert found["quantization"]["calibration_images"] == 30
    assert (record["images"], record["given"]) == (10, 40)
    assert (
        "30 of 40 labelled pictures were calibrated on, and are not judged by" in (found["notes"])
    )
    assert any("labelled images are too few to tell" in note for note in found["notes"])


def test_a_loss_that_no_choice_of_blocks_avoids_is_refused(
    graph, images, labelled, tmp_path, monkeypatch
) -> None:
    """Random weights lose nothing in 8 bits: the candidates' answers are counted as wrong here."""
    judged = []

    def losing(self, runner, allowed, progress):
        judged.append(runner.name)
        right = np.ones(40, bool)
        return compared(right, ~right, allowed=allowed)

    monkeypatch.setattr(command.LabelledReference, "accuracy_of", losing)
    line = refused(
        graph, images, tmp_path / "m.onnx", "--int8", *QUICK, "--labelled", str(labelled)
    )
    assert line == (
        "error: every choice of blocks in int8 fails on labelled pictures (accuracy 0.0% of 40 "
        "labelled images, the reference's 100.0%: 40 lost, 0 gained, McNemar's p = 9.1e-13, below "
        "0.01 it is a significant loss); keep fp16, or allow it with --accuracy-drop"
    )
    assert len(judged) == 2  # all blocks in 8 bits, then one of the two kept
    allowed = ("--accuracy-drop", "1", "--labelled", str(labelled))
    found = done(graph, images, tmp_path / "allowed.onnx", "--int8", *QUICK, *allowed)
    assert found["check"]["accuracy"]["conclusion"] == "allowed loss"


def test_what_cannot_be_judged_by_is_one_line_and_leaves_nothing(
    graph, images, labelled, tmp_path
) -> None:
    few = tmp_path / "few"
    shutil.copytree(labelled, few)
    for path in sorted(few.rglob("*.png"))[::2]:
        path.unlink()
    output = tmp_path / "m.onnx"
    calibrated = done(graph, few, tmp_path / "first.onnx", "--int8", *QUICK)
    assert calibrated["quantization"]["calibration_images"] == 15
    ranges = str(tmp_path / "first.ranges.json")
    taken = _calibrated_on(few, tmp_path, ranges)
    line = refused(
        graph, labelled, output, "--int8", *QUICK[:1], "--ranges", ranges, "--labelled", str(taken)
    )
    assert "were calibrated on; give others with --labelled, or calibrate on fewer" in line
    (few / next(iter(p.name for p in few.iterdir()))).rename(few / "zebra")
    line = refused(graph, images, output, "--int8", *QUICK, "--labelled", str(few))
    assert "has 1 class (zebra) that " in line


def _calibrated_on(folder: Path, tmp_path: Path, ranges: str) -> Path:
    """Copy the pictures that ranges were taken on."""
    hashes = set(json.loads(Path(ranges).read_text())["images"]["sha256"])
    for path in folder.rglob("*.png"):
        if hash_of(read(path, preset("hf", ImageSize(32, 32)))) in hashes:
            target = tmp_path / "taken" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    return tmp_path / "taken"
