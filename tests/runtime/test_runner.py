"""What all runners share: pictures, labels, the likeliest classes."""

import io
import tempfile
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTMSNConfig
from transformers.pipelines.image_classification import ImageClassificationPipeline

from msn_export import image_folder, images
from msn_export.errors import ImageError, InputError, ManifestError
from msn_export.models.config import PROBLEM_TYPES
from msn_export.runtime import open_runner
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.runtime.runner import Guess, scores_of, top_k
from msn_export.spec import Scores
from tests.builders.artifacts import classifier
from tests.builders.networks import Network


def test_pictures_are_preprocessed_as_the_manifest_says(photographs) -> None:
    paths = image_folder.find(photographs).paths[:3]
    with open_runner(classifier()) as runner:
        known = runner.manifest.preprocessing
        batch = runner.preprocess(paths)
        np.testing.assert_array_equal(batch, images.preprocess(paths, known))
        one = runner.preprocess(str(paths[1]))
        np.testing.assert_array_equal(one, batch[1:2])
        with Image.open(paths[2]) as picture:
            np.testing.assert_array_equal(runner.preprocess(picture), batch[2:])
            pixels = np.asarray(picture.convert("RGB"))
        for decoded in (pixels, [pixels], pixels[None]):
            np.testing.assert_array_equal(runner.preprocess(decoded), batch[2:])
        assert runner(batch).logits.shape == (3, 3)


def test_a_picture_is_also_the_bytes_of_a_file_or_an_open_file(photographs, tmp_path) -> None:
    paths = image_folder.find(photographs).paths[:2]
    contents = [path.read_bytes() for path in paths]
    with open_runner(classifier()) as runner:
        batch = runner.preprocess(paths)
        for kind in (bytes, bytearray, memoryview, io.BytesIO):
            np.testing.assert_array_equal(runner.preprocess(kind(contents[0])), batch[:1])
            np.testing.assert_array_equal(runner.preprocess([kind(c) for c in contents]), batch)
        with paths[1].open("rb") as one, tempfile.SpooledTemporaryFile() as upload:
            upload.write(contents[0])
            upload.seek(0)
            np.testing.assert_array_equal(runner.preprocess([upload, one]), batch)
            assert not one.closed
        wanted = runner(batch).logits
        np.testing.assert_array_equal(runner(contents).logits, wanted)
        np.testing.assert_allclose(runner(contents[0]).logits, wanted[:1], atol=1e-5)
        np.testing.assert_allclose(runner(io.BytesIO(contents[1])).logits, wanted[1:], atol=1e-5)


def test_bytes_and_files_that_are_no_picture_are_named(tmp_path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"none")
    with open_runner(classifier()) as runner:
        with pytest.raises(
            ImageError, match=r"^picture 1 is not a readable picture \(cannot ident"
        ):
            runner.preprocess(b"none")
        with pytest.raises(ImageError, match=r"^picture 2 is not a readable picture"):
            runner([photograph(), b""])
        with path.open("rb") as opened, pytest.raises(ImageError, match=f"^{path} is not a reada"):
            runner.preprocess(opened)
        with (
            path.open() as text,
            pytest.raises(ImageError, match="it is open as text; open it in mode"),
        ):
            runner.preprocess(text)


def photograph() -> bytes:
    packed = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), 99, np.uint8)).save(packed, "PNG")
    return packed.getvalue()


@pytest.mark.parametrize("providers", [["cpu"], ["openvino"]], ids=str)
def test_it_is_shown_with_its_file_its_tensors_and_what_runs_it(providers) -> None:
    if providers == ["openvino"]:
        pytest.importorskip("openvino")
    path = classifier()
    with open_runner(path, providers=providers) as runner:
        shown = repr(runner)
        assert shown == (
            f"<Runner of {path}: pixel_values float [batch, 3, 32, 32] -> logits float [batch, 3]; "
            f"batch {runner.batch}; {runner.name}>"
        )
        assert ("OpenVINO" in shown) is (providers == ["openvino"])
    assert repr(runner).endswith("; closed>")


def test_pictures_themselves_are_run(photographs) -> None:
    paths = image_folder.find(photographs).paths[:2]
    with open_runner(classifier()) as runner:
        wanted = runner(runner.preprocess(paths)).logits
        np.testing.assert_array_equal(runner(paths).logits, wanted)
        np.testing.assert_allclose(runner(str(paths[0])).logits, wanted[:1], atol=1e-5)
        with Image.open(paths[1]) as picture:
            np.testing.assert_allclose(runner([picture]).logits, wanted[1:], atol=1e-5)


def test_a_graph_of_bytes_is_given_bytes(photographs) -> None:
    paths = image_folder.find(photographs).paths[:2]
    with (
        open_runner(classifier("--input", "uint8")) as of_bytes,
        open_runner(classifier()) as of_floats,
    ):
        batch = of_bytes.preprocess(paths)
        assert batch.dtype == np.uint8
        assert batch.shape == (2, 32, 32, 3)
        np.testing.assert_allclose(
            of_bytes(batch).logits, of_floats(of_floats.preprocess(paths)).logits, atol=1e-3
        )


def test_the_likeliest_labels_come_first() -> None:
    logits = np.array([[1.0, 3.0, 2.0], [1000.0, 0.0, -1000.0]], np.float32)
    with open_runner(classifier()) as runner:
        first, second = runner.top_k(logits, k=2)
        assert [guess.label for guess in first] == ["class 1", "class 2"]
        assert first[0].probability == pytest.approx(np.exp(3) / np.exp([1, 3, 2]).sum())
        assert second[0] == Guess("class 0", 1.0, 0, 1.0)
        assert [len(row) for row in runner.top_k(logits, k=9)] == [3, 3]
        for bad, k, message in (
            (logits[0], 1, r"logits have shape \[3\] and k is 1; expected \[b, 3\]"),
            (logits[:, :2], 1, r"have shape \[2, 2\]"),
            (logits, 0, "k of at least 1"),
            (logits * np.nan, 1, "logits are not all finite"),
        ):
            with pytest.raises(InputError, match=message):
                runner.top_k(bad, k)


# transformers refuses a single label of one class
PROBLEMS = [
    (problem, classes)
    for problem in (None, *PROBLEM_TYPES)
    for classes in (1, 2, 5)
    if (problem, classes) != ("single_label_classification", 1)
]


@pytest.mark.parametrize(("problem", "classes"), PROBLEMS)
def test_scores_are_those_of_the_pipeline_of_transformers(problem, classes) -> None:
    config = ViTMSNConfig(problem_type=problem, num_labels=classes)
    pipeline: Any = SimpleNamespace(model=SimpleNamespace(config=config))
    logits = np.random.default_rng(0).normal(0, 3, (20, classes)).astype(np.float32)
    scores = Scores.of(problem, classes)
    ours = top_k(logits, list(config.id2label.values()), scores, k=3)
    for row, guesses in zip(logits, ours, strict=True):
        outputs = {"logits": torch.from_numpy(row)[None]}
        theirs = ImageClassificationPipeline.postprocess(pipeline, outputs, top_k=3)
        assert [guess.label for guess in guesses] == [one["label"] for one in theirs]
        for guess, one in zip(guesses, theirs, strict=True):
            assert guess.score == pytest.approx(one["score"], rel=1e-5)
            assert guess.probability == (None if problem == "regression" else guess.score)
    if problem is None:  # where nothing says it, the number of classes decides
        assert top_k(logits, list(config.id2label.values()), None, k=3) == ours


def test_a_single_output_is_no_certainty() -> None:
    ((yes,), (no,)) = top_k([[2.0], [-2.0]], ["cat"])
    assert yes.probability == pytest.approx(0.8808, abs=1e-4)
    assert no.probability == pytest.approx(0.1192, abs=1e-4)


def test_a_sigmoid_of_any_logit_is_from_0_to_1() -> None:
    scored = scores_of(np.array([[-1e5, 0.0, 1e5]]), Scores.SIGMOID)
    np.testing.assert_array_equal(scored, [[0.0, 0.5, 1.0]])


def test_labels_alike_keep_their_order_and_no_image_weighs_on_another() -> None:
    logits = np.array([[2.0, 2.0, 2.0], [5000.0, 5000.0, 0.0]], np.float32)
    with open_runner(classifier()) as runner:
        first, second = runner.top_k(logits, k=3)
    assert [guess.label for guess in first] == ["class 0", "class 1", "class 2"]
    assert [guess.probability for guess in first] == pytest.approx([1 / 3] * 3)
    assert [guess.label for guess in second] == ["class 0", "class 1", "class 2"]
    assert [guess.probability for guess in second] == pytest.approx([0.5, 0.5, 0.0])


def test_many_labels_alike_keep_their_order_too() -> None:
    """NumPy's other sorts keep the order of 16 or fewer by chance."""
    logits = np.zeros((2, 64), np.float32)
    logits[:, ::2] = 1
    for guesses in top_k(logits, [str(number) for number in range(64)], k=64):
        assert [guess.number for guess in guesses] == [*range(0, 64, 2), *range(1, 64, 2)]


def test_without_a_manifest_labels_are_numbers_and_pictures_are_refused(tmp_path) -> None:
    runner = OrtRunner(Network().graph(tmp_path / "m.onnx"))
    assert runner.labels == ()
    assert runner.top_k(np.array([[0.0, 1.0]]), 1)[0][0].label == "1"
    with pytest.raises(ManifestError, match="there is no manifest that says how pictures are"):
        runner.preprocess(["a.png"])
    with pytest.raises(ManifestError, match="there is no manifest with a golden input"):
        runner.selftest()
