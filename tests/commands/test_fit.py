"""``msn-export fit``: the graph computes what scikit-learn does on the checkpoint's features."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from msn_export.cli import main
from msn_export.commands.evaluate import EvaluateJob, run_evaluate
from msn_export.commands.fit import FitJob, run_fit
from msn_export.manifest import Manifest
from msn_export.runtime import open_runner
from msn_export.spec import BatchRange, Dtype, Head, InputFormat, KeptPatches, Target
from tests.builders import labelled

Fitted = tuple[Path, Manifest]


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of each digit."""
    return labelled.write(tmp_path_factory.mktemp("fit") / "digits", each=12)


@pytest.fixture(scope="module")
def test_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine other pictures of each digit."""
    return labelled.write(tmp_path_factory.mktemp("fit") / "others", each=9, test=True)


@pytest.fixture(scope="module")
def fitted(trained: Path, training: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A classifier of all digits with the default options; not to be changed."""
    output = tmp_path_factory.mktemp("fitted") / "classifier.onnx"
    return run_fit(FitJob(str(trained), output, labelled=training))


def run(graph: Path, folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give pixels, logits and the names of the classes of a folder's pictures."""
    paths = sorted(folder.rglob("*.png"))
    with open_runner(graph, providers=["cpu"]) as runner:
        pixels = runner.preprocess(paths)
        logits = [runner(pixels[at : at + 32])["logits"] for at in range(0, len(pixels), 32)]
    return pixels, np.concatenate(logits), np.array([path.parent.name for path in paths])


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def weights_of(graph: Path, classes: int, width: int) -> np.ndarray:
    held = {one.name: numpy_helper.to_array(one) for one in onnx.load(graph).graph.initializer}
    (found,) = [array for array in held.values() if array.shape == (classes, width)]
    return found.astype(np.float64)


COMBINATIONS = [
    ("msn", 1, 10),
    ("embedding", 2, 2),
    *(
        pytest.param(features, blocks, classes, marks=pytest.mark.slow)  # as the two above
        for features in ("msn", "embedding")
        for blocks in (1, 2)
        for classes in (2, 10)
        if (features, blocks, classes) not in {("msn", 1, 10), ("embedding", 2, 2)}
    ),
]


@pytest.mark.parametrize(("features", "blocks", "classes"), COMBINATIONS)
def test_logits_are_the_decision_function_on_the_features_of_transformers(
    trained, tmp_path, features, blocks, classes
) -> None:
    folder = labelled.write(tmp_path / "digits", each=12, classes=classes)
    others = labelled.write(tmp_path / "others", each=9, classes=classes, test=True)
    output, manifest = run_fit(
        FitJob(str(trained), tmp_path / "m.onnx", labelled=folder, features=features, blocks=blocks)
    )
    rows = weights_of(output, classes, blocks * 64)
    peer = LogisticRegression(C=400.0, fit_intercept=False, tol=1e-12, max_iter=100_000)
    pixels, _, names = run(output, folder)
    peer.fit(labelled.features(trained, pixels, kind=features, blocks=blocks), names)
    pixels, logits, _ = run(output, others)
    held_out = labelled.features(trained, pixels, kind=features, blocks=blocks)
    # the same optimum, from features that round otherwise: 1.3e-5 was measured, on two blocks
    assert error(_decided(logits), peer.decision_function(held_out)) < 5e-5
    # and with the weights that were baked in
    peer.coef_ = rows if classes > 2 else rows[1:] - rows[:1]
    assert error(_decided(logits), peer.decision_function(held_out)) < 1e-5
    assert manifest.labels == tuple(peer.classes_)
    assert manifest.fit.relative < 1e-5
    assert (manifest.fit.same, manifest.fit.compared) == (1.0, min(64, 12 * classes))


def _decided(logits: np.ndarray) -> np.ndarray:
    return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits


def test_it_is_a_classifier_like_any_other(fitted, test_set) -> None:
    output, manifest = fitted
    _, logits, names = run(output, test_set)
    with open_runner(output) as runner:
        (guess,) = runner.top_k(logits[:1], k=1)[0]
        assert guess.label == manifest.labels[logits[0].argmax()]
        shares = np.exp(logits[0] - logits[0].max())
        assert guess.score == pytest.approx(shares.max() / shares.sum(), rel=1e-5)
        assert runner.selftest().passed
    assert manifest.scores == "softmax"
    assert manifest.attention.fused == manifest.attention.expected == 3
    found = run_evaluate(EvaluateJob(output, test_set))
    assert found.top1 == np.mean([manifest.labels[i] for i in logits.argmax(axis=1)] == names)
    assert found.top1 > 0.9


def test_the_manifest_says_what_was_fitted(fitted, training, trained) -> None:
    output, manifest = fitted
    record = manifest.fit
    assert (record.features, record.blocks, record.C, record.strengths) == ("msn", 1, 400.0, {})
    assert (record.images, record.classes, record.shots) == (120, 10, None)
    assert (record.labelled, record.broken, record.skipped) == (str(training), 0, {})
    assert record.gradient < 1e-4
    assert record.accuracy.how == "stratified cross-validation"
    assert record.accuracy.images == 120
    assert set(record.accuracy.per_class) == {f"digit {i}" for i in range(10)}
    assert np.sum(record.accuracy.confusion) == 120
    assert np.trace(record.accuracy.confusion) == round(120 * record.accuracy.top1)
    low, high = record.accuracy.interval
    assert low < record.accuracy.top1 < high
    assert manifest.checkpoint.source == str(trained)
    assert "the checkpoint's own classifier (10 classes) is not used" in manifest.checkpoint.notes
    assert {"scikit-learn", "torch", "onnxruntime-gpu"} <= manifest.versions.keys()
    assert manifest.check.passed
    assert manifest.check.source == str(training)
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "classifier.onnx", "classifier.onnx.json",
    ]  # fmt: skip


def test_two_runs_write_the_same_bytes(fitted, trained, training, tmp_path) -> None:
    output, manifest = run_fit(FitJob(str(trained), tmp_path / "again.onnx", labelled=training))
    assert output.read_bytes() == fitted[0].read_bytes()
    assert manifest.fit.accuracy == fitted[1].fit.accuracy


def test_accuracy_on_a_test_set_is_that_of_the_graph(trained, training, test_set, tmp_path) -> None:
    job = FitJob(str(trained), tmp_path / "m.onnx", labelled=training, test=test_set)
    output, manifest = run_fit(job)
    found, accuracy = run_evaluate(EvaluateJob(output, test_set)), manifest.fit.accuracy
    assert accuracy.how == f"test set {test_set}"
    assert (accuracy.images, accuracy.top1, accuracy.top5) == (90, found.top1, found.top5)
    assert accuracy.confusion == found.confusion
    assert accuracy.interval == pytest.approx(found.interval)
    assert manifest.fit.test == str(test_set)
    assert manifest.fit.test_sha256 != manifest.fit.labelled_sha256


def test_accuracy_of_shots_is_that_on_the_images_not_drawn(trained, training, tmp_path) -> None:
    output, manifest = run_fit(
        FitJob(str(trained), tmp_path / "m.onnx", labelled=training, shots=2, seed=5)
    )
    record, accuracy = manifest.fit, manifest.fit.accuracy
    assert (record.shots, record.images, record.seed) == (2, 20, 5)
    assert (accuracy.how, accuracy.images) == ("the images not drawn", 100)
    assert len(accuracy.draws) == 3
    assert accuracy.draws[0] == accuracy.top1
    assert accuracy.mean == pytest.approx(np.mean(accuracy.draws))
    assert accuracy.deviation == pytest.approx(np.std(accuracy.draws, ddof=1))
    assert "the graph is fitted on the first of 3 draws" in manifest.notes
    # the graph is fitted on twenty of the images, and the figure is of the others: had it been on
    # all, the drawn ones, which it has right, would be among them
    _, logits, names = run(output, training)
    right = np.array(manifest.labels)[logits.argmax(axis=1)] == names
    assert right.sum() - 20 == round(100 * accuracy.top1)


def test_with_a_test_set_only_the_drawn_pictures_are_run(
    trained, training, test_set, tmp_path
) -> None:
    broken = labelled.write(tmp_path / "digits", each=12)
    job = FitJob(
        str(trained), tmp_path / "m.onnx", labelled=broken, shots=1, draws=2, test=test_set
    )
    _, manifest = run_fit(job)
    accuracy = manifest.fit.accuracy
    assert (len(accuracy.draws), accuracy.images) == (2, 90)
    assert manifest.fit.images == 10
    assert manifest.check.images == 16  # of the twenty that were run


def test_a_strength_is_chosen_on_the_training_images(trained, test_set, tmp_path) -> None:
    folder = labelled.write(tmp_path / "digits", each=5, classes=3)
    _, manifest = run_fit(FitJob(str(trained), tmp_path / "m.onnx", labelled=folder, C=None))
    record = manifest.fit
    assert list(record.strengths) == ["0.4", "4", "40", "400", "4000", "40000"]
    assert record.strengths[f"{record.C:g}"] == max(record.strengths.values())
    assert record.accuracy.how == "stratified cross-validation"


def test_a_broken_picture_is_named_and_not_trained_on(trained, tmp_path) -> None:
    folder = labelled.write(tmp_path / "digits", each=4, classes=2)
    (folder / "digit 0" / "notes.txt").write_text("no picture")
    broken = sorted(folder.rglob("*.png"))[1]
    broken.write_bytes(broken.read_bytes()[:60])
    output, manifest = run_fit(FitJob(str(trained), tmp_path / "m.onnx", labelled=folder))
    record = manifest.fit
    assert (record.broken, record.images, record.skipped) == (1, 7, {"no picture": 1})
    assert str(broken) in record.errors[0]
    (note,) = [note for note in manifest.notes if "were not trained on" in note]
    assert note.startswith(f"1 of 8 pictures of {folder} were not trained on: {broken}")
    broken.unlink()
    run_fit(FitJob(str(trained), tmp_path / "without.onnx", labelled=folder))
    assert error(weights_of(tmp_path / "without.onnx", 2, 64), weights_of(output, 2, 64)) < 1e-6


def test_pictures_of_a_table_are_fitted_on_too(trained, tmp_path) -> None:
    folder = labelled.write(tmp_path / "digits", each=4, classes=2)
    lines = [
        f"digits/digit {i}/{path.name},{'even' if i == 0 else 'odd'}"
        for i in range(2)
        for path in sorted((folder / f"digit {i}").iterdir())
    ]
    table = tmp_path / "labels.csv"
    table.write_text("path,label\n" + "\n".join(lines) + "\n")
    output, manifest = run_fit(FitJob(str(trained), tmp_path / "m.onnx", labelled=table))
    assert manifest.labels == ("even", "odd")
    assert manifest.check.source == str(table)
    assert manifest.check.per_image[0].name == lines[0].split(",")[0]
    _, logits, names = run(output, folder)
    assert (logits.argmax(axis=1) == (names == "digit 1")).all()


def test_pictures_of_both_sets_are_not_tested_on(trained, training, tmp_path) -> None:
    others = labelled.write(tmp_path / "others", each=3, test=True)
    copied = next((training / "digit 4").iterdir())
    (others / "digit 4" / "copy.png").write_bytes(copied.read_bytes())
    job = FitJob(str(trained), tmp_path / "m.onnx", labelled=training, test=others)
    _, manifest = run_fit(job)
    assert manifest.fit.accuracy.images == 30
    assert (
        f"1 of 31 pictures of {others} are among those of {training}: not tested on"
        in manifest.notes
    )


def test_too_few_images_are_said_instead_of_a_number(trained, tmp_path) -> None:
    folder = labelled.write(tmp_path / "digits", each=1)
    _, manifest = run_fit(FitJob(str(trained), tmp_path / "m.onnx", labelled=folder))
    assert manifest.fit.accuracy is None
    assert manifest.fit.unmeasured == (
        "class 'digit 0' has 1 of the 2 images that cross-validation takes; give more, or --test"
    )
    assert f"accuracy was not measured: {manifest.fit.unmeasured}" in manifest.notes
    more = labelled.write(tmp_path / "more", each=2, classes=2)
    job = FitJob(str(trained), tmp_path / "n.onnx", labelled=more, shots=2, draws=1)
    _, manifest = run_fit(job)
    assert manifest.fit.accuracy is None
    assert manifest.fit.unmeasured == ("every image is trained on; give fewer --shots, or --test")
    _, manifest = run_fit(FitJob(str(trained), tmp_path / "o.onnx", labelled=more))
    assert "4 images say little: see the interval" in manifest.notes


OPTIONS = [
    {"dtype": Dtype.FP16},
    {"input_format": InputFormat.UINT8, "batch": BatchRange(2, 2, 2)},
    {"keep_patches": KeptPatches(0.5), "target": Target.ONNXRUNTIME},
    {"heads": (Head.FEATURES, Head.CLS), "blocks": 2, "exif": "ignore", "preprocess": "msn-eval"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["fp16", "uint8", "kept", "heads"])
def test_the_options_of_an_export_are_those_of_fit(trained, tmp_path, options) -> None:
    folder = labelled.write(tmp_path / "digits", each=6, classes=3)
    output, manifest = run_fit(
        FitJob(str(trained), tmp_path / "m.onnx", labelled=folder, **options)
    )
    record = manifest.fit
    assert record.same == 1.0
    assert record.relative < (1e-2 if manifest.dtype is Dtype.FP16 else 1e-5)
    assert manifest.check.passed
    with open_runner(output, providers=["cpu"]) as runner:
        found = runner(runner.preprocess(sorted(folder.rglob("*.png"))[:4]))
    if "heads" in options:
        assert [spec.name for spec in manifest.outputs] == ["logits", "features", "embedding"]
        wanted = found["features"].astype(np.float64) @ weights_of(output, 3, 128).T
        assert error(found["logits"], wanted) < 1e-5
        assert (manifest.preprocessing.name, manifest.preprocessing.exif) == ("msn-eval", "ignore")
    if "keep_patches" in options:
        assert len(manifest.config["kept"]) == 8


def test_fp16_gives_the_same_classes(trained, training, test_set, fitted, tmp_path) -> None:
    output, _ = run_fit(
        FitJob(str(trained), tmp_path / "m.onnx", labelled=training, dtype=Dtype.FP16)
    )
    (_, half, _), (_, single, _) = run(output, test_set), run(fitted[0], test_set)
    assert (half.argmax(axis=1) == single.argmax(axis=1)).all()
    assert 0 < error(half, single) < 5e-3


def test_int8_is_within_its_gate(fitted, training, test_set, tmp_path) -> None:
    files = {"--images": training, "--labelled": test_set, "-o": tmp_path / "m.onnx"}
    arguments = ["calibrate", str(fitted[0]), "--int8", "--no-compile", "--base", "fp32", "--json"]
    for flag, path in files.items():
        arguments += [flag, str(path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    manifest = json.loads(result.stdout)
    assert manifest["check"]["passed"]
    assert manifest["check"]["cosine_p1"] >= 0.99
    assert manifest["labels"] == [f"digit {i}" for i in range(10)]
    assert manifest["fit"]["weights"] == fitted[1].fit.weights
    accuracy = manifest["check"]["accuracy"]
    assert accuracy["passed"]
    assert accuracy["difference"] >= -0.02


def test_the_command_prints_a_table_or_one_json_object(trained, tmp_path, monkeypatch) -> None:
    labelled.write(tmp_path / "digits", each=4, classes=2)
    monkeypatch.chdir(tmp_path)  # a long path would break the lines of the table elsewhere
    output = "m.onnx"
    arguments = ["fit", str(trained), "digits", "-o", output, "--shots", "2", "--C", "4000"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    for text in ("fitted on", "2 of each class", "[CLS] before the final LayerNorm", "3 draws:"):
        assert text in shown.output
    result = CliRunner().invoke(main, [*arguments, "--force", "--json"])
    assert result.exit_code == 0, result.output
    plain = json.loads(result.stdout)
    assert {"top1", "interval", "images", "per_class"} <= plain["accuracy"].keys()
    assert plain["classes"] == ["digit 0", "digit 1"]
    assert (plain["shots"], plain["C"], plain["output"]) == (2, 4000.0, output)
    assert plain["check"]["passed"]
    written = json.loads(Path(f"{output}.json").read_text())
    assert written["fit"]["accuracy"] == plain["accuracy"]
