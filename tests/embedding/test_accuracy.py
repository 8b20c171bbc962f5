"""Labelled pictures through open models: rows by output, who is right, and what is left out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msn_export.embedding.accuracy import (
    LabelledModel,
    LabelledReference,
    OutputRows,
    compare_accuracy,
    output_to_compare,
    require_classes,
    run_labelled,
    vector_of,
)
from msn_export.errors import ImageError, SpecError, ToleranceError
from msn_export.feed import Feed
from msn_export.labelled import Labelled, read_labelled
from msn_export.preprocessing import preset
from msn_export.progress import SILENT
from msn_export.spec import ImageSize, InputFormat

RAW = preset("raw", ImageSize(4, 4))
CLASSES = ("dark", "light")


class Brightness:
    """A model whose logits and vectors are the mean of a picture's bytes, of any input format."""

    name = "brightness"

    def __init__(self, middle: float = 127.0) -> None:
        self.middle = middle

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        mean = images.astype(np.float32).mean(axis=(1, 2, 3))[:, None]
        return {
            "logits": np.hstack([self.middle - mean, mean - self.middle]),
            "tokens": np.stack([np.hstack([mean, 255 - mean]), np.hstack([mean, mean])], axis=1),
        }


def model(output: str = "logits", middle: float = 127.0, **changes: object) -> LabelledModel:
    feed = Feed(InputFormat.UINT8, RAW)
    given = {"labels": CLASSES, "feed": feed, **changes}
    return LabelledModel("m", Brightness(middle), outputs=(output,), **given)


@pytest.fixture
def labelled(tmp_path: Path) -> Labelled:
    """Five dark and five light pictures, evenly spread from 5 to 235."""
    for number in range(10):
        path = tmp_path / "set" / CLASSES[number // 5] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (5 + 25 * number,) * 3).save(path)
    return read_labelled(tmp_path / "set")


def rows(labelled: Labelled, *models: LabelledModel, batch: int = 4) -> list[OutputRows]:
    return run_labelled(labelled, models, batch, SILENT)


def test_rows_come_in_order_and_do_not_depend_on_the_batch(labelled) -> None:
    one, *_ = rows(labelled, model("tokens"))
    other, *_ = rows(labelled, model("tokens"), batch=3)
    assert one.values["tokens"].shape == (10, 2)
    assert (np.diff(one.values["tokens"][:, 0]) > 0).all()
    np.testing.assert_array_equal(one.values["tokens"], other.values["tokens"])


def test_of_logits_the_answers_are_kept_and_not_the_numbers(labelled) -> None:
    (found,) = rows(labelled, model(middle=60))
    assert found.values == {}
    assert found.answers.guesses.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    # the answer's logit above the right class's: nothing where it is right
    np.testing.assert_allclose(found.answers.margins, [0, 0, 0, 40, 90, 0, 0, 0, 0, 0])


def test_models_of_other_input_formats_share_the_decoded_pictures(labelled) -> None:
    whole, planes = rows(labelled, model(), model(feed=Feed(InputFormat.FLOAT, RAW)))
    np.testing.assert_array_equal(whole.answers.guesses, planes.answers.guesses)


def test_of_tokens_the_first_is_kept(labelled) -> None:
    (found,) = rows(labelled, model("tokens"))
    assert found.values["tokens"].shape == (10, 2)
    np.testing.assert_allclose(found.values["tokens"].sum(axis=1), 255)


def test_a_broken_picture_and_one_that_is_withheld_are_left_out(labelled) -> None:
    labelled.paths[2].write_bytes(b"no picture")
    withhold = lambda pixels: int(pixels[0, 0, 0]) == 5 + 25 * 7  # noqa: E731
    (found,) = run_labelled(labelled, [model()], 4, SILENT, withhold)
    assert list(found.errors) == [2]
    assert found.withheld == {7}
    assert found.whole().tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
    assert str(labelled.paths[2]) in found.notes[0]


def test_no_picture_that_can_be_read_is_an_error(labelled) -> None:
    for path in labelled.paths:
        path.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"none of the 10 pictures of .* can be read; the first: "):
        rows(labelled, model())


def test_two_sides_are_compared_picture_by_picture(labelled) -> None:
    sides = model(), model(middle=60)  # takes 80 and 105, which are dark, for light
    first, second = rows(labelled, *sides)
    found = compare_accuracy(labelled, (sides[0], first), (sides[1], second), allowed=0.0)
    assert (found.reference.top1, found.candidate.top1) == (1.0, 0.8)
    assert (found.lost, found.gained, found.images, found.given) == (2, 0, 10, 10)
    assert (found.by, found.classes, found.labelled) == ("logits", 2, str(labelled.source))


def test_each_side_has_its_own_order_of_classes(labelled) -> None:
    class Swapped(Brightness):
        def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
            return {"logits": super().__call__(images)["logits"][:, ::-1]}

    other = LabelledModel("s", Swapped(), model().feed, ("logits",), CLASSES[::-1])
    first, second = rows(labelled, model(), other)
    found = compare_accuracy(labelled, (model(), first), (other, second), allowed=0.0)
    assert found.candidate.top1 == 1.0


def test_only_pictures_that_both_sides_read_count(labelled) -> None:
    first, second = rows(labelled, model(), model())
    second = replace(second, errors={0: "x", 1: "y"})
    found = compare_accuracy(labelled, (model(), first), (model(), second), allowed=0.0)
    assert (found.images, found.given) == (8, 10)
    none = replace(second, errors=dict.fromkeys(range(10), "x"))
    with pytest.raises(ToleranceError, match=r"no picture of .* is left to judge by"):
        compare_accuracy(labelled, (model(), first), (model(), none), allowed=0.0)


def test_neighbours_tell_the_class_of_what_has_no_logits(labelled) -> None:
    sides = model("tokens"), model("tokens")
    first, second = rows(labelled, *sides)
    found = compare_accuracy(labelled, (sides[0], first), (sides[1], second), allowed=0.0)
    assert found.by == "9 neighbours of tokens"
    assert found.reference.top1 == found.candidate.top1 > 0.5


class Spoiled(Brightness):
    """One that answers with no number for the fourth picture."""

    def __init__(self, bad: float) -> None:
        super().__init__()
        self.bad = bad

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = super().__call__(images)
        for values in outputs.values():
            values[images.mean(axis=(1, 2, 3)) == 5 + 25 * 3] = self.bad
        return outputs


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("output", ["logits", "tokens"])
def test_what_is_no_number_fails_in_the_candidate_and_ends_it_in_the_reference(
    labelled, output, bad
) -> None:
    spoiled = replace(model(output), runner=Spoiled(bad))
    first, second = rows(labelled, model(output), spoiled)
    found = compare_accuracy(labelled, (model(output), first), (spoiled, second), allowed=1.0)
    assert (found.not_finite, found.passed) == (1, False)
    assert found.candidate.top1 < found.reference.top1
    with pytest.raises(
        ToleranceError, match=r"the reference itself is not finite: .*3\.png \(1 of"
    ):
        compare_accuracy(labelled, (spoiled, second), (model(output), first), allowed=1.0)


def test_logits_of_other_classes_are_refused(labelled) -> None:
    with pytest.raises(SpecError, match="m has 2 logits and 3 names of classes"):
        rows(labelled, model(labels=("dark", "light", "grey")))
    with pytest.raises(ImageError, match=r"has 1 class \(light\) that m lacks"):
        rows(labelled, model(labels=("dark", "grey")))


def test_a_reference_is_run_once_for_several_candidates(labelled) -> None:
    labelled.paths[9].write_bytes(b"no picture")
    reference = LabelledReference.run(labelled, model(), SILENT, lambda pixels: pixels[0, 0, 0] < 9)
    assert (len(reference.labelled), reference.given, reference.withheld) == (8, 10, 1)
    assert reference.accuracy_of(Brightness(), 0.0, SILENT).lost == 0
    found = reference.accuracy_of(Brightness(60), 0.0, SILENT)
    assert (found.lost, found.images, found.given) == (2, 8, 10)


def test_the_output_to_compare_is_logits_else_the_best_vector() -> None:
    assert output_to_compare(("embedding", "logits")) == "logits"
    assert output_to_compare(("last_hidden_state", "embedding", "features")) == "features"
    assert output_to_compare(("logits",)) == "logits"
    assert vector_of(("logits",)) is None
    assert vector_of(("logits", "theirs")) == "theirs"


def test_classes_are_required_of_classifiers_alone(labelled) -> None:
    require_classes(labelled, ("embedding",), (), "m")
    with pytest.raises(ImageError, match="m does not name its classes, so the labels of"):
        require_classes(labelled, ("logits",), (), "m")
    with pytest.raises(ImageError, match=r"has 1 class \(light\) that m lacks"):
        require_classes(labelled, ("logits",), ("dark", "grey"), "m")
