"""A folder of 2,000 real files in three classes, through every command that counts what is right.

The pictures are simulated textiles, whole or with a local or a global defect (conformal-clip-data,
MIT). The models have random weights: the figures show that the commands work, and say nothing of
ViT-MSN.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from msn_export.cli import main
from tests.builders.tiny_artifacts import classifier

textiles = pytest.importorskip(
    "conformal_clip_data", reason="pip install conformal-clip-data (45 MB of pictures)"
)
pytestmark = pytest.mark.slow
COUNTS = {"global": 500, "local": 500, "nominal": 1000}


@pytest.fixture(scope="module")
def folder() -> Path:
    root: Path = textiles.textile_simulated_root()
    return root


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone's features; its checkpoint lies beside it."""
    return classifier(tmp_path_factory.mktemp("graph"), heads=("features",))


def told(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_evaluate_judges_all_pictures_by_their_neighbours(graph, folder, tmp_path) -> None:
    report = tmp_path / "page.html"
    found = told("evaluate", graph, folder, "--report", report)
    assert (found["images"], found["broken"], found["classes"]) == (2000, [], [*COUNTS])
    knn = found["knn"]
    assert [sum(row) for row in knn["confusion"]] == [*COUNTS.values()]
    assert knn["class_images"] == COUNTS
    low, high = knn["interval"]
    assert low < knn["top1"] < high < low + 0.05  # two thousand images tell
    assert not any("say little" in note for note in found["notes"])
    assert "The 24 clearest of " in report.read_text("utf-8")
    few = told("evaluate", graph, folder, "--limit", 200)
    assert (few["images"], few["given"]) == (200, 2000)
    assert few["knn"]["class_images"] == {"global": 50, "local": 50, "nominal": 100}


def test_an_int8_graph_and_its_source_are_compared_on_pictures_not_calibrated_on(
    graph, folder, tmp_path
) -> None:
    output = tmp_path / "int8.onnx"
    options = ("--images", folder, "--labelled", folder, "--no-compile", "--smooth", "off")
    found = told("calibrate", graph, "--int8", "-o", output, *options)
    record = found["check"]["accuracy"]
    assert (record["images"], record["given"]) == (2000 - 512, 2000)
    assert record["by"] == "20 neighbours of features"
    assert record["conclusion"] == "no significant loss"
    assert record["loss_bound"] < 0.05
    again = told("validate", graph, output, "--labelled", folder)
    assert again["check"]["accuracy"]["images"] == 2000
    assert again["passed"]


def table(path: Path, folder: Path, first: int, last: int) -> Path:
    """Write a table of some pictures of each class."""
    rows = [
        f"{picture},{name}"
        for name in COUNTS
        for picture in sorted((folder / name).iterdir())[first:last]
    ]
    path.write_text("\n".join(["path,label", *rows]))
    return path


def test_a_fitted_classifier_is_as_accurate_as_fit_says_and_stays_so_in_fp16(
    graph, folder, tmp_path
) -> None:
    train, test = (
        table(tmp_path / f"{name}.csv", folder, *rows)
        for name, rows in {"train": (0, 100), "test": (100, 500)}.items()
    )
    checkpoint, output = graph.parent / "checkpoint", tmp_path / "classifier.onnx"
    fitted = told("fit", checkpoint, train, "--test", test, "-o", output)
    accuracy = fitted["accuracy"]
    assert (accuracy["images"], fitted["labels"]) == (1200, [*COUNTS])
    assert accuracy["interval"][0] > 1 / 3  # noise has a third of these right
    found = told("evaluate", output, test)
    # the graph computes in fp32 what scikit-learn computes in fp64
    assert abs(found["top1"] - accuracy["top1"]) <= 1 / 1200
    assert np.abs(np.subtract(found["confusion"], accuracy["confusion"])).sum() <= 2
    half = tmp_path / "half.onnx"
    told("fit", checkpoint, train, "--test", test, "-o", half, "--dtype", "fp16")
    record = told("validate", output, half, "--images", folder, "--labelled", test)
    record = record["check"]["accuracy"]
    assert (record["by"], record["images"], record["given"]) == ("logits", 1200, 1200)
    assert record["reference"]["top1"] == pytest.approx(found["top1"])
    assert record["conclusion"] == "no significant loss"
