"""A golden input is drawn again from its recipe, and what it cannot be drawn from is refused."""

from dataclasses import replace

import numpy as np
import pytest

from msn_export import golden
from msn_export.errors import ManifestError
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize, InputFormat

PREPROCESSING = preset("hf", ImageSize(2, 3))
DRAWN = [241, 180, 249, 180, 130, 80]  # numpy 1.26 and 2.x give the same: NEP 19


def tokens(images: np.ndarray) -> dict[str, np.ndarray]:
    """Three tokens an image, the first the mean of the image's bytes."""
    first = images.reshape(len(images), -1).mean(axis=1, dtype=np.float32)
    rows = np.stack([first, first + 1], axis=1)
    return {"tokens": np.stack([rows, rows * 0, rows * 2], axis=1), "other": rows}


def recorded(count: int = 2):
    return golden.record(tokens, "the mean", PREPROCESSING, InputFormat.UINT8, count)


def test_the_bytes_are_those_of_the_seed_on_every_machine() -> None:
    assert golden.draw(2022, (1, 1, 2, 3)).ravel().tolist() == DRAWN
    assert golden.draw(2022, (1, 2, 2, 3)).ravel()[:6].tolist() == DRAWN


def test_the_first_token_of_each_image_is_kept() -> None:
    found = recorded()
    images = golden.input_of(found, PREPROCESSING, InputFormat.UINT8)
    assert (found.output, found.shape, found.dim) == ("tokens", (2, 2, 3, 3), 2)
    np.testing.assert_array_equal(golden.values_of(found), tokens(images)["tokens"][:, 0])
    assert recorded(1).shape == (1, 2, 3, 3)


def test_the_limit_is_a_margin_over_the_error_and_never_below_what_pictures_were_allowed() -> None:
    def off(images: np.ndarray) -> dict[str, np.ndarray]:
        return {"tokens": tokens(images)["tokens"] * np.float32(1.01)}

    def limit(least: float) -> float | None:
        taken = (PREPROCESSING, InputFormat.UINT8)
        return golden.with_limit(recorded(), off, *taken, least).limit

    assert limit(0.0) == pytest.approx(golden.MARGIN * 0.01, rel=1e-4)  # fp32 values of 100
    assert limit(0.5) == 0.5


@pytest.mark.parametrize(
    "change",
    [{"generator": "another"}, {"shape": (3, 2, 3, 3)}, {"shape": (2, 3, 2, 3)}, {"seed": -1}],
)
def test_an_input_that_cannot_be_drawn_is_refused(change) -> None:
    with pytest.raises(ManifestError, match="is none this version can draw; upgrade msn-export"):
        golden.input_of(replace(recorded(), **change), PREPROCESSING, InputFormat.UINT8)


@pytest.mark.parametrize("change", [{"values": "?"}, {"values": "AAAA"}, {"dim": 3}])
def test_values_that_cannot_be_read_are_refused(change) -> None:
    with pytest.raises(ManifestError, match=r"golden values cannot be read \(.+\); export the"):
        golden.values_of(replace(recorded(), **change))
