"""What a preprocessing is, and its presets."""

import math
from dataclasses import replace

import pytest

from msn_export.errors import SpecError
from msn_export.preprocessing import (
    Preprocessing,
    assumed,
    preset,
    resized,
)
from msn_export.spec import ImageSize

SQUARE = ImageSize(224, 224)


# --- presets --------------------------------------------------------------------------------------


def test_hf_squashes_and_msn_eval_crops() -> None:
    assert preset("hf", SQUARE) == Preprocessing("hf", SQUARE, None, "bilinear", exif="apply")
    assert preset("msn-eval", SQUARE) == Preprocessing(
        "msn-eval", SQUARE, 256, "bilinear", exif="apply"
    )


def test_raw_gives_a_resized_pictures_bytes_as_floats() -> None:
    made = preset("raw", SQUARE)
    assert (made.scale, made.mean, made.std) == (1.0, (0.0,) * 3, (1.0,) * 3)
    assert made.geometry == preset("hf", SQUARE).geometry


def test_what_was_assumed_says_so_and_what_it_is() -> None:
    made = assumed(SQUARE)
    assert made.makes_the_same_as(preset("hf", SQUARE))
    assert preset("hf", SQUARE).notes == ()
    assert made.notes == (
        "preprocessing hf was assumed: nothing says how the model's pictures are made, "
        "--preprocess does",
    )


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "x: resized to 224x224 (bilinear), EXIF orientation ignored; scale 1/255, mean 0.485"),
        ({"assumed": True}, "x (assumed): resized to"),
        ({"exif": "apply", "resample": None}, "x: only pictures of 224x224, EXIF orientation appl"),
        ({"short_side": 256}, "x: short side to 256 (bilinear), centre 224x224, EXIF"),
        ({"squash": ImageSize(256, 300)}, "x: resized to 256x300 (bilinear), centre 224x224, EXIF"),
        ({"scale": 0.5}, "; scale 0.5, mean"),
    ],
)
def test_all_of_it_is_said_in_one_line(fields, text) -> None:
    assert text in str(Preprocessing("x", SQUARE, **fields))


def test_a_squash_and_a_short_side_keep_their_proportion() -> None:
    squashed = Preprocessing("x", SQUARE, squash=ImageSize(256, 256))
    assert resized(squashed, ImageSize(112, 448)).squash == ImageSize(128, 512)
    short = Preprocessing("x", SQUARE, short_side=256)
    assert resized(short, ImageSize(448, 448)).short_side == 512
    assert resized(short, ImageSize(112, 336)).short_side == 336


@pytest.mark.parametrize(
    ("size", "short_side"),
    [((224, 224), 256), ((448, 448), 512), ((112, 112), 128), ((224, 448), 448), ((32, 32), 37)],
)
def test_msn_eval_keeps_its_proportion_and_covers_the_crop(size, short_side) -> None:
    assert preset("msn-eval", ImageSize(*size)).short_side == short_side


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_have_plain_statistics(channels) -> None:
    made = preset("hf", SQUARE, channels)
    assert made.channels == channels
    assert made.mean == made.std == (0.5,) * channels


@pytest.mark.parametrize("channels", [0, 2, 5, 10**9])
def test_pictures_with_other_channels_do_not_exist(channels) -> None:
    with pytest.raises(SpecError, match=f"pictures have no {channels} channels; expected 1, 3 or"):
        preset("hf", SQUARE, channels)


def test_two_make_the_same_whatever_they_are_called() -> None:
    hf = preset("hf", SQUARE)
    assert hf.makes_the_same_as(replace(hf, name="preprocessor_config.json", assumed=True))
    for other in (
        preset("msn-eval", SQUARE),
        preset("hf", ImageSize(192, 192)),
        replace(hf, resample="bicubic"),
        replace(hf, mean=(0.5, 0.5, 0.5)),
        replace(hf, std=(0.5, 0.5, 0.5)),
        replace(hf, scale=1.0),
        replace(hf, exif="ignore"),
        replace(hf, squash=ImageSize(256, 256)),
    ):
        assert not hf.makes_the_same_as(other)
        assert not other.makes_the_same_as(hf)


def test_where_a_crop_begins_matters_only_where_something_is_cropped() -> None:
    for name, same in (("hf", True), ("msn-eval", False)):
        made = preset(name, SQUARE)
        other = replace(made, crop_rounds_down=not made.crop_rounds_down)
        assert made.makes_the_same_as(other) is same
        assert other.makes_the_same_as(made) is same


def test_an_unknown_preset_is_named() -> None:
    with pytest.raises(SpecError, match="preprocessing 'clip' is unknown; expected hf, msn-eval, "):
        preset("clip", SQUARE)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resample": "cubic"}, "resampling 'cubic' is unknown; expected one of nearest, lanczos"),
        ({"mean": (0.5, 0.5)}, "mean has 2 channels and std 3; expected the same number, one of 1"),
        ({"mean": (), "std": ()}, "mean has 0 channels and std 0"),
        ({"mean": (math.nan, 0.5, 0.5)}, "mean, std and scale must be finite, std and scale above"),
        ({"std": (0.5, 0.5, 0.0)}, "mean, std and scale must be finite, std and scale above zero"),
        ({"scale": 0.0}, "mean, std and scale must be finite, std and scale above zero"),
        ({"scale": math.inf}, "mean, std and scale must be finite, std and scale above zero"),
        ({"short_side": 0}, "short side 0 is out of range; expected 1 to 16384"),
        ({"short_side": 10**9}, "short side 1000000000 is out of range; expected 1 to 16384"),
        (
            {"short_side": 8, "squash": SQUARE},
            "short_side and squash contradict each other; give one",
        ),
    ],
)
def test_a_preprocessing_that_cannot_be_carried_out_does_not_exist(fields, message) -> None:
    with pytest.raises(SpecError) as raised:
        Preprocessing(**{"name": "x", "size": SQUARE, **fields})
    assert message in str(raised.value)
