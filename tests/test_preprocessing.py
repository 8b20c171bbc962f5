"""Presets, and Hugging Face's preprocessor_config.json: hostile input, read strictly."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.errors import ImageError, SpecError
from msn_export.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    from_processor_config,
    preset,
    resized,
)
from msn_export.spec import ImageSize

SQUARE = ImageSize(224, 224)
IMAGENET = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}


# --- presets --------------------------------------------------------------------------------------


def test_hf_squashes_and_msn_eval_crops() -> None:
    assert preset("hf", SQUARE) == Preprocessing("hf", SQUARE, None, "bilinear")
    assert preset("msn-eval", SQUARE) == Preprocessing("msn-eval", SQUARE, 256, "bilinear")


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
    assert hf.makes_the_same_as(replace(hf, name="preprocessor_config.json"))
    for other in (
        preset("msn-eval", SQUARE),
        preset("hf", ImageSize(192, 192)),
        replace(hf, resample="bicubic"),
        replace(hf, mean=(0.5, 0.5, 0.5)),
        replace(hf, std=(0.5, 0.5, 0.5)),
        replace(hf, scale=1.0),
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
    with pytest.raises(SpecError, match="preprocessing 'clip' is unknown; expected hf or msn-eval"):
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
    ],
)
def test_a_preprocessing_that_cannot_be_carried_out_does_not_exist(fields, message) -> None:
    with pytest.raises(SpecError) as raised:
        Preprocessing(**{"name": "x", "size": SQUARE, **fields})
    assert message in str(raised.value)


# --- preprocessor_config.json ---------------------------------------------------------------------


def test_what_is_not_said_is_vit_image_processors_default() -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    written = ViTImageProcessorPil().to_dict()
    made = from_processor_config({}, None)
    assert made == from_processor_config(written, None)
    assert made == Preprocessing(
        "preprocessor_config.json",
        SQUARE,
        None,
        "bilinear",
        crop_rounds_down=True,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )


READ: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "published": (
        {"do_normalize": True, "do_resize": True, "resample": 2, "size": 224, **IMAGENET,
         "feature_extractor_type": "ViTFeatureExtractor"},
        {"size": SQUARE, "short_side": None, "resample": "bilinear", "mean": IMAGENET_MEAN},
    ),
    "not square": ({"size": {"height": 32, "width": 48}}, {"size": ImageSize(32, 48)}),
    "crop": (
        {"size": {"shortest_edge": 256}, "do_center_crop": True,
         "crop_size": {"height": 224, "width": 200}},
        {"size": ImageSize(224, 200), "short_side": 256, "crop_rounds_down": True},
    ),
    "crop of one number": (
        {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224},
        {"size": SQUARE, "short_side": 256},
    ),
    "crop that is not done": (
        {"size": {"height": 8, "width": 8}, "do_center_crop": False, "crop_size": 4},
        {"size": ImageSize(8, 8), "short_side": None},
    ),
    "bicubic": ({"resample": 3}, {"resample": "bicubic"}),
    "no resize": ({"do_resize": False, "size": 64}, {"resample": None, "size": ImageSize(64, 64)}),
    "no rescale": ({"do_rescale": False}, {"scale": 1.0}),
    "rescale": ({"rescale_factor": 0.5}, {"scale": 0.5}),
    "no normalize": ({"do_normalize": False}, {"mean": (0.0,) * 3, "std": (1.0,) * 3}),
    "one mean for all": ({"image_mean": 0.25}, {"mean": (0.25,) * 3}),
    "null": ({"resample": None, "image_mean": None, "size": None}, {"resample": "bilinear"}),
    "done anyway": ({"do_convert_rgb": True, "do_pad": None, "do_reduce_labels": False}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("config", "wanted"), READ.values(), ids=READ.keys())
def test_what_it_says_is_done(config, wanted) -> None:
    made = from_processor_config(config, None)
    assert {name: getattr(made, name) for name in wanted} == wanted


def test_another_size_keeps_the_proportion() -> None:
    config = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}
    made = from_processor_config(config, ImageSize(448, 448))
    assert (made.size, made.short_side) == (ImageSize(448, 448), 512)
    assert resized(made, ImageSize(112, 336)).short_side == 336


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"do_flip_channel_order": True}, "do_flip_channel_order is not done here"),
    ({"do_pad": True}, "do_pad is not done here"),
    ({"resample": 6}, "resample is 6; expected one of Pillow's codes 0 to 5"),
    ({"resample": -1}, "resample is -1; expected one of Pillow's codes 0 to 5"),
    ({"resample": True}, "resample is True; expected one of Pillow's codes 0 to 5"),
    ({"resample": 2.5}, "resample is 2.5; expected one of Pillow's codes 0 to 5"),
    ({"resample": "bicubic"}, "resample is 'bicubic'; expected one of Pillow's codes 0 to 5"),
    ({"resample": []}, "resample is []; expected one of Pillow's codes 0 to 5"),
    ({"size": {"longest_edge": 5}}, "size is {'longest_edge': 5}; expected height and width"),
    ({"size": {"height": math.inf, "width": 1}}, "size.height is inf; expected a number of pixels"),
    ({"size": {"height": "1", "width": 1}}, "size.height is '1'; expected a number of pixels"),
    ({"size": True}, "size.height is True; expected a number of pixels"),
    ({"size": "big"}, "size.height is 'big'; expected a number of pixels"),
    ({"size": 0}, "image size 0x0 is out of range; expected 1 to 16384 pixels a side"),
    ({"size": {"shortest_edge": 256}}, "size.shortest_edge without do_center_crop gives no fixed"),
    (
        {"size": {"shortest_edge": 2, "longest_edge": 3}, "do_center_crop": True, "crop_size": 2},
        "size.shortest_edge with longest_edge is not done here",
    ),
    (
        {"size": {"shortest_edge": -4}, "do_center_crop": True, "crop_size": 224},
        "short side -4 is out of range; expected 1 to 16384",
    ),
    (
        {"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224},
        "do_center_crop after a resize to another fixed size is not done here",
    ),
    (
        {"size": 224, "do_center_crop": True, "crop_size": 224},
        "size 224 with do_center_crop has two meanings; write it as shortest_edge, or as height",
    ),
    ({"rescale_factor": 10**400}, "rescale_factor is 1000"),
    ({"rescale_factor": "x"}, "rescale_factor is 'x'; expected a number"),
    ({"rescale_factor": 0}, "mean, std and scale must be finite, std and scale above zero"),
    ({"image_mean": [0.5, 0.5]}, "image_mean has 2 channels, the model takes 3"),
    ({"image_std": [0.5, "x", 0.5]}, "image_std is 'x'; expected a number"),
    ({"image_std": [0.5, 0, 0.5]}, "mean, std and scale must be finite, std and scale above zero"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_what_is_not_done_here_is_refused_by_name(config, message) -> None:
    with pytest.raises(ImageError) as raised:
        from_processor_config(config, None)
    assert str(raised.value).startswith(f"preprocessor_config.json: {message}")
    assert str(raised.value).endswith("; mend it or choose --preprocess hf or msn-eval")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
sizes = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("height", "width", "shortest_edge", "longest_edge"), anything)
)
FIELDS = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_center_crop"), anything),
    **dict.fromkeys(("resample", "rescale_factor", "image_mean", "image_std"), anything),
    **dict.fromkeys(("size", "crop_size"), anything | sizes),
}


@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_whatever_is_written_there_raises_nothing_else(config) -> None:
    try:
        made = from_processor_config(config, ImageSize(32, 32))
    except ImageError as error:
        assert str(error).startswith("preprocessor_config.json: ")
    else:
        assert (made.size, made.channels) == (ImageSize(32, 32), 3)
