"""Hugging Face's preprocessor_config.json: hostile input, done as transformers does or refused."""

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor
from transformers.processing_utils import ImagesKwargs

from msn_export import images
from msn_export.errors import ImageError, SpecError
from msn_export.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    assumed,
    preset,
)
from msn_export.processor_config import (
    FIELDS,
    TYPES,
    choose,
    from_processor_config,
    require_choice,
    size_in,
    to_processor_config,
)
from msn_export.spec import ImageSize, InputFormat

SQUARE = ImageSize(224, 224)
IMAGENET = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}

# --- what is read ---------------------------------------------------------------------------------


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
        exif="apply",
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
    "null of a step that is off": (
        {"crop_size": None, "do_rescale": False, "rescale_factor": None, "do_normalize": False,
         "image_mean": None},
        {"scale": 1.0, "mean": (0.0,) * 3},
    ),
    "null turns a step off": ({"do_resize": None, "do_normalize": None},
                              {"resample": None, "mean": (0.0,) * 3}),
    "list": ({"size": [32, 48]}, {"size": ImageSize(32, 48)}),
    "one number, of a CLIP": (
        {"size": 256, "crop_size": [192, 224], "image_processor_type": "CLIPImageProcessor"},
        {"size": ImageSize(192, 224), "short_side": 256, "squash": None},
    ),
    "DeiT": (
        {"image_processor_type": "DeiTImageProcessor"},
        {"size": SQUARE, "squash": ImageSize(256, 256), "short_side": None, "resample": "bicubic"},
    ),
    "DeiT whose cut is all of it": (
        {"image_processor_type": "DeiTImageProcessor", "crop_size": 256},
        {"size": ImageSize(256, 256), "squash": None},
    ),
    "no resize of a CLIP": (
        {"image_processor_type": "CLIPImageProcessor", "do_resize": False, "do_center_crop": False,
         "size": 32, "default_to_square": True},
        {"size": ImageSize(32, 32), "resample": None, "short_side": None},
    ),
    "text": ({"resample": "bicubic"}, {"resample": "bilinear"}),
    "by torchvision": ({"image_processor_type": "ViTImageProcessorFast"}, {"resample": "bilinear"}),
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


def test_without_a_resize_the_models_size_is_the_pictures() -> None:
    still = {"do_resize": False}
    assert from_processor_config(still, ImageSize(48, 48)).size == ImageSize(48, 48)
    assert size_in(still) is None
    assert size_in({"size": 48}) == ImageSize(48, 48)
    assert size_in({"size": 48, "image_mean": [0.5], "image_std": [0.5]}) == ImageSize(48, 48)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"do_flip_channel_order": True}, "do_flip_channel_order is not done here"),
    ({"do_pad": True}, "do_pad is not done here"),
    ({"resample": 6}, "resample is 6; expected one of Pillow's codes 0 to 5"),
    ({"resample": -1}, "resample is -1; expected one of Pillow's codes 0 to 5"),
    ({"resample": True}, "resample is True; expected one of Pillow's codes 0 to 5"),
    ({"resample": 2.5}, "resample is 2.5; expected one of Pillow's codes 0 to 5"),
    ({"resample": 3.0}, "resample is 3.0; expected one of Pillow's codes 0 to 5"),
    ({"resample": []}, "resample is []; expected one of Pillow's codes 0 to 5"),
    ({"size": {"longest_edge": 5}}, "size is {'longest_edge': 5}; expected height and width, or "),
    ({"size": {"height": math.inf, "width": 1}}, "size.height is inf; expected a number of pixels"),
    ({"size": {"height": "1", "width": 1}}, "size.height is '1'; expected a number of pixels"),
    ({"size": True}, "size.height is True; expected a number of pixels"),
    ({"size": "big"}, "size.height is 'big'; expected a number of pixels"),
    ({"size": 0}, "image size 0x0 is out of range; expected 1 to 16384 pixels a side"),
    ({"size": {"shortest_edge": 256}}, "size.shortest_edge without do_center_crop gives no fixed"),
    (
        {"size": {"shortest_edge": 2, "longest_edge": 3}, "do_center_crop": True, "crop_size": 2},
        "size is {'shortest_edge': 2, 'longest_edge': 3}; expected height and width, or shor",
    ),
    (
        {"size": {"shortest_edge": -4}, "do_center_crop": True, "crop_size": 224},
        "short side -4 is out of range; expected 1 to 16384",
    ),
    ({"size": [224]}, "size is [224]; expected [height, width]"),
    ({"size": [224, 224, 3]}, "size is [224, 224, 3]; expected [height, width]"),
    (
        {"size": {"height": 2, "width": 2, "shortest_edge": 2}},
        "size is {'height': 2, 'width': 2, 'shortest_edge': 2}; expected height and width, or",
    ),
    *(
        (
            {name: None, "image_processor_type": "CLIPImageProcessor"},
            f"{name} is null, which transformers refuses; leave it out for a default",
        )
        for name in ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
    ),
    ({"do_center_crop": True}, "do_center_crop is set and crop_size is missing"),
    (
        {"do_center_crop": True, "crop_size": {"shortest_edge": 4}},
        "crop_size is {'shortest_edge': 4}; expected height and width",
    ),
    (
        {"do_resize": False, "do_center_crop": True, "crop_size": 4},
        "do_center_crop without do_resize is not done here",
    ),
    ({"do_resize": "false"}, "do_resize is 'false'; expected true or false"),
    ({"do_something_new": True}, "do_something_new is not done here"),
    *(
        ({field.name: 0.5}, f"{field.name} is not done here")
        for field in FIELDS
        if field.treatment == "refused"
    ),
    (
        {"image_processor_type": "ConvNextImageProcessor"},
        "image_processor_type 'ConvNextImageProcessor' is not read here; expected ViTImage",
    ),
    ({"feature_extractor_type": 7}, "feature_extractor_type 7 is not read here; expected ViT"),
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
    assert str(raised.value).endswith(
        "; correct it, or choose --preprocess hf, msn-eval or another file"
    )


def test_what_is_unknown_or_text_is_noted() -> None:
    config = {"size": 224, "zoom": 2, "aspect": None, "resample": "bicubic"}
    assert from_processor_config(config, None).notes == (
        "preprocessor_config.json: not used, as unknown here: 'zoom'",
        "preprocessor_config.json: resample 'bicubic' is text, which transformers reads as "
        "bilinear; Pillow's codes are 2 for bilinear, 3 for bicubic",
    )
    assert from_processor_config({"size": 224, "resample": 3}, None).notes == ()


def test_the_table_has_every_field_that_transformers_knows_once() -> None:
    names = [field.name for field in FIELDS]
    assert len(names) == len(set(names))
    assert set(get_type_hints(ImagesKwargs)) <= set(names)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
sizes = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("height", "width", "shortest_edge", "longest_edge"), anything)
)
HOSTILE = {
    **dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_center_crop"), anything),
    **dict.fromkeys(("resample", "rescale_factor", "image_mean", "image_std"), anything),
    **dict.fromkeys(("size", "crop_size"), anything | sizes),
}


@given(st.fixed_dictionaries({}, optional=HOSTILE))
def test_whatever_is_written_there_raises_nothing_else(config) -> None:
    try:
        made = from_processor_config(config, ImageSize(32, 32))
    except ImageError as error:
        assert str(error).startswith("preprocessor_config.json: ")
    else:
        assert (made.size, made.channels) == (ImageSize(32, 32), 3)


# --- transformers ---------------------------------------------------------------------------------


def picture(height: int, width: int) -> Image.Image:
    """Draw a smooth picture with an edge: what resampling filters treat differently."""
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    drawn = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    drawn.paste((255, 0, 10), (width // 3, height // 4, width // 2 + 1, height // 2 + 1))
    return drawn


side = st.integers(8, 40)
whole = st.one_of(
    side,
    st.tuples(side, side).map(list),
    st.fixed_dictionaries({"height": side, "width": side}),
)
of_channels = st.floats(0.1, 0.9) | st.lists(st.floats(0.1, 0.9), min_size=3, max_size=3)
configs = st.fixed_dictionaries(
    {
        "image_processor_type": st.sampled_from([*TYPES, "ViTImageProcessorFast"]),
        "size": whole | st.fixed_dictionaries({"shortest_edge": side}),
    },
    optional={
        "crop_size": whole | st.none(),
        "do_resize": st.sampled_from([True, True, True, False, None]),
        "do_center_crop": st.sampled_from([True, True, False, None]),
        "do_rescale": st.booleans(),
        "do_normalize": st.booleans(),
        "do_convert_rgb": st.booleans(),
        "default_to_square": st.booleans(),
        "rescale_factor": st.sampled_from([1 / 255, 1 / 127.5, 1.0, None]),
        "image_mean": st.none() | of_channels,
        "image_std": of_channels,
        "data_format": st.just("channels_first"),
        "pad_size": st.just(64),
        "zoom": st.just(2),
    },
)


def compare_with_transformers(
    config: dict[str, Any], height: int, width: int, folder: Path
) -> Preprocessing | None:
    """Compare the floats of one picture to the last bit, or require the same refusal."""
    try:
        made = from_processor_config(config, None)
    except ImageError:
        made = None
    drawn = picture(height, width)
    if made is not None and made.resample is None:
        drawn = picture(made.size.height, made.size.width)  # it takes no other
    folder.joinpath("preprocessor_config.json").write_text(json.dumps(config))
    try:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        theirs = processor(drawn, return_tensors="np").pixel_values.astype(np.float32)
    except (ValueError, TypeError, AttributeError):
        assert made is None, f"transformers refuses what was read as {made}"
        return None
    if made is not None:  # else it is refused by name: the test above says what
        np.testing.assert_array_equal(images.preprocess([drawn], made), theirs)
    return made


@pytest.mark.parametrize("resample", [0, 1, 2, 3, 4, 5, "nearest", "bicubic"])
def test_any_configuration_makes_the_floats_of_transformers_or_is_refused(
    resample, tmp_path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit_msn"}')
    compared: list[Preprocessing] = []

    @settings(max_examples=40, derandomize=True, deadline=None)
    @given(configs, st.integers(8, 60), st.integers(8, 60))
    def compare(config: dict[str, Any], height: int, width: int) -> None:
        made = compare_with_transformers(config | {"resample": resample}, height, width, tmp_path)
        compared.extend([made] if made is not None and made.resample is not None else [])

    compare()
    # 8 times 8 and more: what is drawn depends on Hypothesis, what is asked of it does not
    assert len(compared) >= 8, "too few of the combinations were compared"
    ways = {(made.short_side is None, made.squash is None) for made in compared}
    assert len(ways) >= 2, "too few kinds of resize were compared"


# --- choosing -------------------------------------------------------------------------------------

SMALL = ImageSize(32, 32)


def test_a_choice_goes_before_what_is_known_and_that_before_an_assumption(tmp_path) -> None:
    known = from_processor_config({"size": 32}, None)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"size": 40, "resample": 3}))
    assert choose(known, SMALL, 3) is known
    assert choose(known, SMALL, 3, preprocess="auto") is known
    assert choose(None, SMALL, 3) == assumed(SMALL)
    assert choose(known, SMALL, 3, preprocess="raw") == preset("raw", SMALL)
    mine = choose(known, SMALL, 3, preprocess=str(file))
    assert (mine.name, mine.size, mine.resample) == ("mine.json", SMALL, "bicubic")
    assert choose(known, SMALL, 3, exif="ignore") == dataclasses.replace(known, exif="ignore")


def test_a_processor_config_is_a_choice_too(tmp_path) -> None:
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps({"image_processor": {"size": 32, "resample": 0}}))
    assert choose(None, SMALL, 3, preprocess=str(file)).resample == "nearest"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (
            "clip",
            "preprocessing 'clip' is unknown; expected hf, msn-eval, raw, or a JSON file such",
        ),
        ("none.json", "preprocessing none.json does not exist; expected a JSON file"),
    ],
)
def test_a_choice_that_is_none_is_refused(choice, message) -> None:
    with pytest.raises(SpecError, match=message):
        choose(None, SMALL, 3, preprocess=choice)
    with pytest.raises(SpecError, match=message):
        require_choice(choice)


def test_a_file_that_is_refused_is_named(tmp_path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"do_pad": True}))
    with pytest.raises(ImageError, match=r"^mine\.json: do_pad is not done here; correct it, or"):
        choose(None, SMALL, 3, preprocess=str(file))


def test_what_is_inside_a_graph_cannot_be_chosen_anew() -> None:
    inside = preset("hf", SMALL)
    cut = choose(inside, SMALL, 3, preprocess="msn-eval", inside=True)
    assert cut == preset("msn-eval", SMALL)
    with pytest.raises(SpecError) as refused:
        choose(inside, SMALL, 3, preprocess="raw", inside=True)
    assert str(refused.value) == (
        "--preprocess raw: scale 1, mean 0, 0, 0, std 1, 1, 1, but the graph takes bytes and "
        "normalises them itself with scale 1/255, mean 0.485, 0.456, 0.406, std 0.229, 0.224, "
        "0.225; export it again with --preprocess raw"
    )


# --- written again -------------------------------------------------------------------------------

WRITTEN = {
    "squashed": preset("hf", SQUARE),
    "cropped, short side": preset("msn-eval", SQUARE),
    "cropped, squashed": Preprocessing("x", SQUARE, squash=ImageSize(256, 260), resample="bicubic"),
    "as it is": Preprocessing("x", SQUARE, resample=None),
    "bytes": preset("raw", SQUARE),
    "one channel": preset("hf", SQUARE, channels=1),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_preprocessing_that_is_written_is_read_back(name) -> None:
    made = WRITTEN[name]
    read = from_processor_config(to_processor_config(made), SQUARE, made.channels)
    assert not read.notes
    assert read.makes_the_same_as(replace(made, exif="apply", crop_rounds_down=True))


@pytest.mark.parametrize("name", sorted(set(WRITTEN) - {"one channel", "as it is"}))
def test_transformers_makes_the_same_of_what_is_written(tmp_path, photographs, name) -> None:
    written = to_processor_config(WRITTEN[name])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(written))
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(theirs).__name__.startswith(written["image_processor_type"])
    paths = sorted(photographs.iterdir())[:3]
    opened = [Image.open(path).convert("RGB") for path in paths]
    right = theirs(opened, return_tensors="np")["pixel_values"]
    ours = replace(WRITTEN[name], crop_rounds_down=True)
    found = images.model_input(images.decode(paths, ours), ours, InputFormat.FLOAT)
    np.testing.assert_allclose(found, right, rtol=1e-5, atol=1e-5)
