"""A disagreement is put down to a mistake only where undoing it makes the candidate agree."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from msn_export.metrics.diagnose import diagnose
from msn_export.metrics.evaluate import Sample, run_reference
from msn_export.metrics.tolerances import GATES
from msn_export.preprocessing import preset
from msn_export.spec import Dtype, ImageSize, InputFormat

HF = preset("hf", ImageSize(8, 8))
RGB_TO_BGR = slice(None, None, -1)
MEAN, STD = (np.float32(x).reshape(3, 1, 1) for x in (HF.mean, HF.std))


@pytest.fixture
def sample() -> Sample:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8) // np.uint8([1, 2, 4])
    return Sample(pixels, tuple("abcde"), "test", HF)


class Model:
    """Logits of four classes from normalised pixels, by way of what ``before`` makes of them."""

    name = "model"

    def __init__(self, before: Callable = lambda x: x, after: Callable = lambda y: y) -> None:
        self.before, self.after = before, after
        self.weights = np.random.default_rng(1).standard_normal((3 * 64, 4)) / 8

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        if images.dtype == np.uint8:
            images = images.transpose(0, 3, 1, 2) / np.float32(255)
            images = (images - MEAN) / STD
        flat = self.before(images).reshape(len(images), -1)
        return {"logits": self.after(flat @ self.weights).astype(np.float32)}


def cause(
    candidate: Model, sample: Sample, input_format: InputFormat = InputFormat.FLOAT
) -> str | None:
    reference = run_reference(Model(), sample, input_format)
    return diagnose(candidate, reference, input_format, GATES[Dtype.FP16])


def raw(images: np.ndarray) -> np.ndarray:
    return images * STD + MEAN  # 0 to 1


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (lambda x: x[:, RGB_TO_BGR], "when it is given BGR: it was made for channels in that"),
        # in that order already when it is normalised
        (lambda x: (raw(x)[:, RGB_TO_BGR] - MEAN) / STD, "when it is given BGR"),
        (lambda x: (x / 255 - MEAN) / STD, "when it is given pixels from 0 to 255, not normalised"),
        (lambda x: (x - MEAN) / STD, "when it is given pixels from 0 to 1, not normalised"),
        (lambda x: ((x + 1) / 2 - MEAN) / STD, "when it is given pixels from -1 to 1"),
    ],
    ids=["BGR", "BGR before its own normalisation", "bytes", "unit", "centred"],
)
def test_a_candidate_made_for_other_pixels_is_found_out(before, words, sample) -> None:
    found = cause(Model(before), sample)
    assert found is not None
    assert found.startswith(f"the candidate agrees {words}")


@pytest.mark.parametrize("shift", [1, -1])
def test_classes_shifted_by_one_are_found_out(shift, sample) -> None:
    shifted = Model(after=lambda y: np.roll(y, shift, axis=-1))
    assert cause(shifted, sample) == (
        f"the candidate's classes are the reference's shifted by {shift:+d}"
    )


def test_a_graph_of_bytes_is_asked_about_its_channels_alone(sample) -> None:
    found = cause(Model(lambda x: (raw(x)[:, RGB_TO_BGR] - MEAN) / STD), sample, InputFormat.UINT8)
    assert found is not None
    assert "BGR" in found
    assert cause(Model(lambda x: (x - MEAN) / STD), sample, InputFormat.UINT8) is None


def test_images_that_agree_have_no_cause(sample) -> None:
    grey = replace(sample, pixels=np.repeat(sample.pixels[..., :1], 3, axis=-1))

    def fault(logits: np.ndarray) -> np.ndarray:
        return np.concatenate([logits[:4], -logits[4:]])  # the fifth image alone

    assert cause(Model(after=fault), grey) is None


def test_what_nothing_explains_is_put_down_to_nothing(sample) -> None:
    assert cause(Model(after=lambda y: -y), sample) is None
    assert cause(Model(after=lambda y: y * np.nan), sample) is None
