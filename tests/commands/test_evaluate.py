"""``msn-export evaluate``: how often a model is right on labelled pictures, in whatever form."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from msn_export.cli import main
from msn_export.commands.evaluate import EvaluateJob, run_evaluate
from msn_export.errors import ImageError, MsnExportError
from msn_export.metrics.accuracy import votes
from msn_export.onnx_header import UNSEALED
from msn_export.runtime import open_runner
from tests.builders import tiny_artifacts
from tests.builders.artifacts import alone
from tests.builders.pages import read
from tests.builders.tiny_artifacts import predicted

CLASSES = ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny classifier with an embedding; its checkpoint lies beside it."""
    return tiny_artifacts.classifier(tmp_path_factory.mktemp("graph"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, graph: Path) -> Path:
    """Twelve pictures under the model's class names."""
    folder = tmp_path_factory.mktemp("labelled")
    with open_runner(graph) as runner:
        names = runner.labels
    for number in range(12):
        picture(folder / names[number % 3] / f"{number:02}.png", number)
    return folder


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def run(graph: Path, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[str, ...]]:
    """Give logits, embeddings and labels of a labelled folder, by the runner alone."""
    with open_runner(graph) as runner:
        paths = sorted(folder.rglob("*.png"))
        outputs = runner(runner.preprocess(paths))
        labels = np.array([runner.labels.index(path.parent.name) for path in paths])
        return outputs.logits, outputs.embedding, labels, runner.labels


def test_top_1_is_what_the_runner_says(graph, labelled) -> None:
    logits, _, labels, names = run(graph, labelled)
    found = run_evaluate(EvaluateJob(graph, labelled))
    right = logits.argmax(axis=1) == labels
    assert (found.images, found.given, found.output) == (12, 12, "logits")
    assert found.top1 == pytest.approx(right.mean())
    assert found.classes == names
    assert sum(map(sum, found.confusion)) == 12
    assert found.confusion[0][0] == int((right & (labels == 0)).sum())
    assert found.interval[0] <= found.top1 <= found.interval[1]
    assert found.knn is None
    assert found.selftest.startswith("selftest passed")
    assert "12 images say little: see the interval" in found.notes


def test_a_graph_without_its_manifest_is_judged_as_its_own_file_says(
    graph, labelled, tmp_path
) -> None:
    found = run_evaluate(EvaluateJob(alone(graph, tmp_path / "lone.onnx"), labelled))
    sealed = run_evaluate(EvaluateJob(graph, labelled))
    assert (found.top1, found.classes) == (sealed.top1, sealed.classes)
    assert UNSEALED in found.notes
    assert UNSEALED not in sealed.notes


def test_a_checkpoint_and_its_graph_are_right_equally_often(graph, labelled) -> None:
    checkpoint = run_evaluate(EvaluateJob(str(graph.parent / "checkpoint"), labelled, knn=3))
    exported = run_evaluate(EvaluateJob(graph, labelled, knn=3))
    assert checkpoint.top1 == exported.top1
    assert checkpoint.confusion == exported.confusion
    assert checkpoint.knn == exported.knn
    assert checkpoint.runner.startswith("torch ")


def test_a_checkpoints_pictures_are_made_as_its_file_or_the_user_says(graph, labelled) -> None:
    checkpoint = str(graph.parent / "checkpoint")
    own = run_evaluate(EvaluateJob(checkpoint, labelled, exif="ignore"))
    assert own.preprocessing == replace(
        run_evaluate(EvaluateJob(graph, labelled)).preprocessing, exif="ignore"
    )
    other = run_evaluate(EvaluateJob(checkpoint, labelled, preprocess="msn-eval"))
    assert str(other.preprocessing).startswith("msn-eval")
    assert other.preprocessing != own.preprocessing


def test_neighbours_vote_without_the_picture_itself(graph, labelled) -> None:
    _, embeddings, labels, _ = run(graph, labelled)
    found = run_evaluate(EvaluateJob(graph, labelled, knn=3))
    wanted = votes(embeddings, labels, 3, k=3).argmax(axis=1) == labels
    assert found.k == 3
    assert found.knn.top1 == pytest.approx(wanted.mean())


def test_neighbours_of_training_pictures_vote(graph, labelled, tmp_path) -> None:
    _, _, _, names = run(graph, labelled)
    for number in range(6):  # the very pictures: each finds itself
        picture(tmp_path / "train" / names[number % 3] / f"{number}.png", number)
    found = run_evaluate(EvaluateJob(graph, labelled, knn=1, train=tmp_path / "train", limit=12))
    assert found.train == str(tmp_path / "train")
    by_name = dict(zip(names, (found.knn.per_class[name] for name in names), strict=True))
    assert all(share >= 0.5 for share in by_name.values())  # two of each four are trained on


def test_a_model_without_logits_is_judged_by_twenty_neighbours(labelled, tmp_path) -> None:
    graph = tiny_artifacts.classifier(tmp_path / "graph", heads=("cls",))
    found = run_evaluate(EvaluateJob(graph, labelled))
    assert (found.k, found.output, found.top1) == (20, "embedding", None)
    assert found.knn.images == 12


def test_what_cannot_be_read_is_named_and_left_out(graph, labelled, tmp_path) -> None:
    folder = tmp_path / "set"
    for path in labelled.rglob("*.png"):
        target = folder / path.relative_to(labelled)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    broken = sorted(folder.rglob("*.png"))[5]
    broken.write_bytes(broken.read_bytes()[:60])
    found = run_evaluate(EvaluateJob(graph, folder))
    assert (found.images, found.given) == (11, 12)
    assert len(found.broken) == 1
    assert str(broken) in found.broken[0]


def test_what_a_model_answers_with_nan_is_wrong_not_left_out(tmp_path) -> None:
    """The foreign model has NaN for dark pictures, whose means are below zero."""
    for number in range(4):
        picture(tmp_path / "set" / "ab"[number % 2] / f"{number}.png", number)
    Image.new("RGB", (40, 48)).save(tmp_path / "set" / "a" / "dark.png")
    graph = tiny_artifacts.foreign(tmp_path / "f.onnx", ["b", 3, 32, 32], {"vector": 6}, bad=True)
    found = run_evaluate(EvaluateJob(graph, tmp_path / "set", knn=1))
    assert (found.images, found.given, found.broken) == (5, 5, ())
    assert any("vector has NaN or infinity on" in note for note in found.notes)
    assert found.knn.per_class["a"] < 1


def test_a_limit_is_spread_and_said(graph, labelled) -> None:
    found = run_evaluate(EvaluateJob(graph, labelled, limit=6))
    assert (found.images, found.given) == (6, 12)
    assert all(share is not None for share in found.per_class.values())


WRONG = [
    ({"knn": 3, "output_name": "nothing"}, "has no such output"),
    ({"variant": "vit-msn-small"}, "--variant, --weights and --labels are for a checkpoint"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=["output", "variant"])
def test_a_wrong_option_is_one_line(graph, labelled, options, message) -> None:
    with pytest.raises(MsnExportError) as error:
        run_evaluate(EvaluateJob(graph, labelled, **options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_class_that_the_model_lacks_is_named(graph, labelled, tmp_path) -> None:
    for name in ("cat", "dog"):
        picture(tmp_path / name / "1.png", len(name) + ord(name[0]))
    with pytest.raises(MsnExportError, match=r"has 2 classes \(cat, dog\) that model .* lacks"):
        run_evaluate(EvaluateJob(graph, tmp_path))


def test_neighbours_need_no_class_of_the_models(graph, tmp_path) -> None:
    for number in range(12):
        picture(tmp_path / "set" / ("cat", "dog")[number % 2] / f"{number:02}.png", number)
    with pytest.raises(ImageError, match=r"has 2 classes \(cat, dog\) that model .* lacks"):
        run_evaluate(EvaluateJob(graph, tmp_path / "set"))
    found = run_evaluate(EvaluateJob(graph, tmp_path / "set", knn=3))
    assert (found.top1, found.confusion, found.output) == (None, None, "embedding")
    assert (found.classes, found.knn.images) == (("cat", "dog"), 12)
    (note,) = [note for note in found.notes if "not judged" in note]
    assert note.startswith(f"logits were not judged: {tmp_path / 'set'} has 2 classes (cat, dog)")
    picture(tmp_path / "train" / "dog" / "a.png", 90)
    picture(tmp_path / "train" / "cat" / "b.png", 91)
    found = run_evaluate(EvaluateJob(graph, tmp_path / "set", knn=1, train=tmp_path / "train"))
    assert found.knn.images == 12


def test_logits_alone_have_no_neighbours(labelled, tmp_path) -> None:
    graph = tiny_artifacts.classifier(tmp_path / "graph", heads=("logits",))
    with pytest.raises(MsnExportError, match="has logits alone, which have no neighbours"):
        run_evaluate(EvaluateJob(graph, labelled, knn=3))


def test_the_command_prints_a_table_or_one_json_object(graph, labelled) -> None:
    arguments = ["evaluate", str(graph), str(labelled), "--knn", "3"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    assert "top-1" in shown.output
    assert "3 neighbours" in shown.output
    plain = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert {"images", "top1", "top5", "knn", "interval", "per_class", "confusion"} <= plain.keys()
    assert plain["knn"]["images"] == 12


def test_a_folder_that_is_not_there_is_a_mistake_of_usage(graph, tmp_path) -> None:
    shown = CliRunner().invoke(main, ["evaluate", str(graph), str(tmp_path / "none")])
    assert shown.exit_code == 2


# --- the page -------------------------------------------------------------------------------------


def test_a_page_shows_the_wrong_pictures(graph, tmp_path) -> None:
    folder = predicted(tmp_path / "set", graph, 20, wrong=(2, 3, 5))
    report = tmp_path / "page.html"
    arguments = ["evaluate", str(graph), str(folder), "--knn", "3", "--report", str(report)]
    shown = CliRunner().invoke(main, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    wrong = json.loads(shown.stdout)["wrong"]
    assert {Path(one["picture"]).name for one in wrong} == {"002.png", "003.png", "005.png"}
    assert all(one["true"] == Path(one["picture"]).parent.name for one in wrong)
    text, reader = report.read_text("utf-8"), read(report)
    assert "All 3 mistakes" in text
    assert reader.tags.count("img") == 3
    assert all(one["picture"] in text for one in wrong)
    assert "85.0 %" in text  # 17 of 20
    assert "3 neighbours in the other pictures" in text
    assert {path.name for path in tmp_path.iterdir()} == {"set", "page.html"}
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1
    assert f"output {report} exists; --force replaces it" in " ".join(again.stderr.split())
    assert CliRunner().invoke(main, [*arguments, "--force"]).exit_code == 0


@pytest.mark.parametrize("what", ["model", "manifest", "nowhere"])
def test_a_page_that_cannot_be_written_is_refused_before_the_work(
    graph, labelled, tmp_path, what
) -> None:
    path = {
        "model": graph,
        "manifest": graph.with_name(f"{graph.name}.json"),
        "nowhere": tmp_path / "none" / "page.html",
    }[what]
    before = graph.read_bytes()
    with pytest.raises(MsnExportError, match=r"is what is read|does not exist"):
        run_evaluate(EvaluateJob(graph, labelled, report=path, force=True))
    assert graph.read_bytes() == before


def test_a_page_needs_its_packages(graph, labelled, tmp_path, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("msn_export.reporting.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MsnExportError) as error:
        run_evaluate(EvaluateJob(graph, labelled, report=tmp_path / "page.html"))
    assert str(error.value) == (
        "--report needs the package matplotlib; pip install 'msn-export[report]'"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_is_gone_by_then_is_shown_as_such(graph, tmp_path, monkeypatch) -> None:
    folder = predicted(tmp_path / "set", graph, 6, wrong=(0,))

    def gone(path: Path, *_: object) -> None:
        raise ImageError(f"{path} is not a readable picture (No such file or directory)")

    monkeypatch.setattr("msn_export.reporting.gather.images.read", gone)
    run_evaluate(EvaluateJob(graph, folder, report=tmp_path / "page.html"))
    assert "cannot be read any more" in (tmp_path / "page.html").read_text("utf-8")


def test_a_graph_in_openvino_is_right_as_often_and_says_what_it_computes_in(
    graph, labelled, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = run_evaluate(EvaluateJob(graph, labelled, providers=("openvino",)))
    wanted = run_evaluate(EvaluateJob(graph, labelled, providers=("cpu",)))
    assert (found.top1, found.confusion) == (wanted.top1, wanted.confusion)
    assert str(found.precision) == "10 of 10 products in fp32, 2 attention in fp32"
    assert wanted.precision is None
    result = CliRunner().invoke(
        main, ["evaluate", str(graph), str(labelled), "--providers", "openvino"]
    )
    assert "10 of 10 products in fp32" in " ".join(result.output.split())
