"""``validate --labelled``: a significant loss of accuracy fails, and few pictures prove nothing."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import msn_export
from msn_export.cli import main
from msn_export.embedding import accuracy
from tests.builders.artifacts import alone
from tests.builders.tiny_artifacts import classifier, foreign, predicted
from tests.contracts import faults

LOOSE = ("--relative", "1e6")  # outputs may differ


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier with an embedding; its checkpoint lies beside it."""
    return classifier(tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, graph: Path) -> Path:
    """Forty pictures; the graph has 37 right."""
    return predicted(tmp_path_factory.mktemp("labelled") / "set", graph, 40, wrong=(3, 4, 5))


@pytest.fixture(scope="module")
def partial(graph: Path) -> Path:
    """The graph with a classifier that takes every picture for the middle class."""
    return faults.plant(graph, graph.with_name("partial.onnx"), _prefer)


def _prefer(model: ir.Model) -> None:
    faults.edit(model, "classifier.bias", lambda bias: bias + np.float32([0, 100, 0]))


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["validate", *map(str, arguments)])


def told(*arguments: object) -> dict[str, Any]:
    """Validate as a script does; the exit code goes with the verdict."""
    result = validate(*arguments, "--json")
    assert result.exit_code in {0, 1}, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["passed"] is (result.exit_code == 0) is (found["reasons"] == [])
    return found


def refused(*arguments: object) -> str:
    result = validate(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    line: str = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_a_checkpoint_and_its_graph_are_right_equally_often(graph, labelled) -> None:
    found = told(graph.parent / "checkpoint", graph, "--labelled", labelled)
    assert found["passed"]
    record = found["check"]["accuracy"]
    assert record["reference"]["top1"] == record["candidate"]["top1"] == 37 / 40
    assert record["reference"]["interval"] == pytest.approx([0.8014, 0.9742], abs=1e-4)
    assert (record["lost"], record["gained"], record["p_value"]) == (0, 0, 1.0)
    assert (record["images"], record["given"], record["classes"]) == (40, 40, 3)
    assert (record["by"], record["labelled"]) == ("logits", str(labelled))
    assert record["conclusion"] == "no significant loss"
    # the labelled pictures are those that the outputs are compared on, where no others are given
    assert (found["check"]["source"], found["check"]["images"]) == (str(labelled), 40)


def test_the_pictures_of_a_table_are_those_that_outputs_are_compared_on(
    graph, labelled, tmp_path
) -> None:
    """Also where the candidate makes other pixels of them, and where they lie elsewhere."""
    pictures = sorted(labelled.rglob("*.png"))
    table = tmp_path / "labels.csv"
    rows = [f"{path},{path.parent.name}" for path in pictures]
    table.write_text("path,label\n" + "\n".join(rows))
    found = told(graph, graph, "--labelled", table, "--preprocess", "msn-eval", *LOOSE)
    assert (found["check"]["source"], found["check"]["images"]) == (str(table), 40)
    assert found["check"]["per_image"][0]["name"] == str(pictures[0])
    assert found["check"]["accuracy"]["images"] == 40
    assert not any("noise" in note for note in found["notes"])


def test_a_significant_loss_fails_though_the_outputs_may_differ(graph, labelled, partial) -> None:
    found = told(graph, partial, "--labelled", labelled, *LOOSE)
    (reason,) = found["reasons"]
    record = found["check"]["accuracy"]
    assert record["lost"] > 20
    assert record["gained"] <= 3  # what is labelled wrong
    assert reason.startswith(f"accuracy {record['candidate']['top1']:.1%} of 40 labelled images, ")
    assert reason.endswith("below 0.01 it is a significant loss")
    assert found["check"]["passed"] is record["passed"] is False
    allowed = told(graph, partial, "--labelled", labelled, *LOOSE, "--accuracy-drop", "1")
    assert allowed["passed"]
    assert allowed["check"]["accuracy"]["conclusion"] == "allowed loss"


def test_the_table_has_both_accuracies_and_the_test_beside_them(graph, labelled) -> None:
    result = validate(graph, graph, "--labelled", labelled)
    text = " ".join(result.stdout.replace("│", " ").split())
    assert (
        "accuracy 92.5% (80.1% to 97.4%) in the candidate, 92.5% (80.1% to 97.4%) in the reference"
    ) in text
    assert "by logits on 40 images of " in text
    assert "no significant loss: 0 lost, 0 gained, McNemar's exact test p = 1; with 95 %" in text


def test_few_pictures_are_no_proof_and_that_is_said(graph, partial, tmp_path) -> None:
    few = predicted(tmp_path / "few", graph, 6)
    found = told(graph, partial, "--labelled", few, *LOOSE)
    assert found["passed"]
    record = found["check"]["accuracy"]
    assert (record["reference"]["top1"], record["candidate"]["top1"]) == (1, 2 / 6)
    assert (record["conclusion"], record["p_value"]) == ("too few images", 1 / 16)
    assert any(
        re.fullmatch(
            r"6 labelled images are too few to tell: a loss of up to 8\d\.\d points .*", note
        )
        for note in found["notes"]
    )


def test_a_model_without_logits_is_judged_by_its_neighbours(labelled, tmp_path) -> None:
    graph = classifier(tmp_path / "graph", heads=("cls",))
    found = told(graph.parent / "checkpoint", graph, "--labelled", labelled)
    record = found["check"]["accuracy"]
    assert record["by"] == "20 neighbours of embedding"
    assert record["reference"]["top1"] > 0.6  # three classes of colours
    evaluated = msn_export.evaluate(graph, labelled)
    assert record["candidate"]["top1"] == pytest.approx(evaluated.knn.top1)
    spoiled = faults.plant(graph, tmp_path / "spoiled.onnx", _forget)
    lost = told(graph, spoiled, "--labelled", labelled, *LOOSE)
    assert "it is a significant loss" in lost["reasons"][-1]


def _forget(model: ir.Model) -> None:
    """Let all images have almost the same embedding: half a last bit of noise is left."""
    faults.edit(model, "norm.weight", lambda weight: weight * np.float32(1e-9))


def test_pictures_are_decoded_once_for_both_sides(graph, labelled, monkeypatch) -> None:
    decoded = []

    def counting(paths: Any, *arguments: Any) -> Any:
        decoded.append(len(paths))
        return original(paths, *arguments)

    original = accuracy.decoded
    monkeypatch.setattr(accuracy, "decoded", counting)
    told(graph, graph, "--labelled", labelled)
    assert decoded == [40]
    told(graph, graph, "--labelled", labelled, "--preprocess", "msn-eval", *LOOSE)
    assert decoded == [40, 40, 40]


def test_each_side_is_fed_as_in_production(graph, tmp_path) -> None:
    """Pictures with a broad frame: msn-eval cuts it off, so the candidate sees another class."""
    folder = predicted(tmp_path / "set", graph, 40)
    for path in folder.rglob("*.png"):
        inner = Image.open(path).convert("RGB").resize((24, 24))
        framed = Image.new("RGB", (32, 32), (255, 0, 255))
        framed.paste(inner, (4, 4))
        framed.save(path)
    found = told(graph, graph, "--labelled", folder, "--preprocess", "msn-eval", *LOOSE)
    record = found["check"]["accuracy"]
    assert record["reference"]["top1"] != record["candidate"]["top1"]
    by_hand = msn_export.evaluate(graph, folder, preprocess="msn-eval")
    assert record["candidate"]["top1"] == pytest.approx(by_hand.top1)


def test_an_answer_that_is_no_number_fails(graph, labelled, tmp_path) -> None:
    """The foreign model has NaN for dark pictures, and none of the checked ones is dark."""
    bright = tmp_path / "bright"
    for number in range(4):
        (bright / "all").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (255, 255, 200 + number)).save(bright / "all" / f"{number}.png")
    spoiled = foreign(tmp_path / "n.onnx", ["b", 3, 32, 32], {"logits": 3}, bad=True)
    given = ("--labelled", labelled, "--images", bright)
    found = told(graph, spoiled, *given, "--numbers-only", *LOOSE)
    assert any(
        re.fullmatch(r"NaN or infinity on \d+ of 40 labelled images", reason)
        for reason in found["reasons"]
    )
    assert not found["check"]["accuracy"]["passed"]
    message = refused(spoiled, graph, *given)
    assert f"the reference itself is not finite: output 'logits' of {spoiled} has NaN" in message


def test_a_side_without_names_takes_the_others(graph, labelled) -> None:
    nameless = graph.with_name("nameless.onnx")
    alone(graph, nameless, product="")
    found = told(graph, nameless, "--labelled", labelled, *LOOSE)
    assert found["check"]["accuracy"]["candidate"]["top1"] == 37 / 40
    assert refused(nameless, nameless, "--labelled", labelled) == (
        f"error: {nameless} does not name its classes, so the labels of {labelled} cannot be "
        "matched with them; name them with --labels when the checkpoint is exported"
    )


# --- pictures that cannot be judged by ------------------------------------------------------------


def test_a_broken_picture_is_left_out_and_named(graph, labelled, tmp_path) -> None:
    folder = tmp_path / "set"
    shutil.copytree(labelled, folder)
    broken = sorted(folder.rglob("*.png"))[7]
    broken.write_bytes(broken.read_bytes()[:50])
    (folder / "notes.txt").write_text("no picture")
    found = told(graph, graph, "--labelled", folder)
    record = found["check"]["accuracy"]
    assert (record["images"], record["given"]) == (39, 40)
    assert any(str(broken) in note for note in found["notes"])
    assert "skipped 1 no picture" in found["notes"]


def one_class(folder: Path) -> None:
    for path in list(folder.iterdir())[1:]:
        shutil.rmtree(path)


def empty_class(folder: Path) -> None:
    (folder / "fish").mkdir()


def twice(folder: Path) -> None:
    first, second, *_ = sorted(folder.iterdir())
    path = next(first.iterdir())
    shutil.copy(path, second / "copy.png")


def unknown_class(folder: Path) -> None:
    next(folder.iterdir()).rename(folder / "zebra")


def unreadable(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        path.write_bytes(path.read_bytes()[:40] + path.name.encode())


BAD = [
    (one_class, "a classifier needs two or more"),
    (empty_class, "has 1 class (fish) without a picture that can be read"),
    (twice, "has one picture in two classes: "),
    (unknown_class, "has 1 class (zebra) that "),
    (unreadable, "none of the 40 pictures of "),
]


@pytest.mark.parametrize(("spoil", "message"), BAD, ids=lambda x: getattr(x, "__name__", ""))
def test_bad_labels_are_one_line(graph, labelled, photographs, tmp_path, spoil, message) -> None:
    folder = tmp_path / "set"
    shutil.copytree(labelled, folder)
    spoil(folder)
    line = refused(graph, graph, "--labelled", folder, "--images", photographs, "--limit", 4)
    assert message in line


@pytest.mark.parametrize(
    ("option", "value"), [("--labelled", "nowhere"), ("--accuracy-drop", "1.5")]
)
def test_a_bad_option_is_named(graph, option, value) -> None:
    result = validate(graph, graph, option, value)
    assert result.exit_code == 2
    assert option in result.stderr


def test_the_python_function_takes_it_too(graph, labelled) -> None:
    found = msn_export.validate(graph, graph, labelled=str(labelled), accuracy_drop=0.01)
    assert found.check.accuracy.allowed == 0.01
    with pytest.raises(msn_export.errors.MsnExportError, match="accuracy_drop is 2"):
        msn_export.validate(graph, graph, labelled=labelled, accuracy_drop=2)
