"""Read Hugging Face's ``preprocessor_config.json``, and a user's choice of preprocessing.

``FIELDS`` says of every field that transformers' image processors write what becomes of it here,
``TYPES`` of every image processor that is read what its absent fields stand for (transformers
``models/*/image_processing_pil_*.py``). A field that would change pixels in a way that is not done
here is refused by name; one that is unknown is noted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from msn_export.errors import ImageError, SpecError
from msn_export.models.config import PREPROCESSOR, image_processor_of, read_json
from msn_export.preprocessing import (
    PRESETS,
    RESAMPLING,
    Exif,
    Preprocessing,
    assumed,
    preset,
    resized,
)
from msn_export.spec import ImageSize


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a processor's configuration and what becomes of it.

    ``read``: it is done as transformers does. ``refused``: where it is set, the file is refused.
    ``no effect``: it does not change the pixels of one picture.
    """

    name: str
    treatment: Literal["read", "refused", "no effect"]
    what: str


FIELDS = (
    Field("image_processor_type", "read", "whose defaults the absent fields take; see TYPES"),
    Field("feature_extractor_type", "read", "the same, as transformers before 4.26 wrote it"),
    Field("do_resize", "read", "false takes only pictures that already have the size"),
    Field("size", "read", "a number, [height, width], height and width, or shortest_edge"),
    Field("default_to_square", "read", "whether a size of one number is a square or a short side"),
    Field("resample", "read", "Pillow's codes 0 to 5; text is bilinear to transformers, and noted"),
    Field("do_center_crop", "read", "after the resize; black where the picture is smaller"),
    Field("crop_size", "read", "a number, [height, width], or height and width"),
    Field("do_rescale", "read", ""),
    Field("rescale_factor", "read", ""),
    Field("do_normalize", "read", ""),
    Field("image_mean", "read", "a number for all channels, or one for each"),
    Field("image_std", "read", "a number for all channels, or one for each"),
    Field("do_convert_rgb", "no effect", "a file is converted to the model's channels in any case"),
    Field("do_pad", "refused", "padding; without it pad_size says nothing"),
    Field("pad_size", "no effect", "belongs to do_pad"),
    Field("auto_map", "refused", "code of its own, which is not run"),
    Field("crop_pct", "refused", "ConvNeXT's crop, a share of the picture"),
    Field("use_square_size", "refused", "Kosmos-2's size"),
    Field("do_flip_channel_order", "refused", "BGR"),
    Field("include_top", "refused", "EfficientNet's second normalisation"),
    Field("rescale_offset", "refused", "a scale from -1 to 1"),
    Field("do_thumbnail", "refused", "Donut's resize"),
    Field("do_align_long_axis", "refused", "Donut's turn"),
    Field("size_divisor", "refused", "a size that depends on the picture"),
    Field("do_reduce_labels", "no effect", "changes segmentation maps alone"),
    Field("reduce_labels", "no effect", "changes segmentation maps alone"),
    Field("data_format", "no effect", "layout of what a processor returns"),
    Field("input_data_format", "no effect", "layout of arrays; files have one"),
    Field("return_tensors", "no effect", "kind of what a processor returns"),
    Field("device", "no effect", ""),
    Field("disable_grouping", "no effect", ""),
    Field("image_seq_length", "no effect", "of language models"),
    Field("processor_class", "no effect", ""),
    Field("image_processor_class", "no effect", ""),
    Field("_valid_processor_keys", "no effect", ""),
    Field("_processor_class", "no effect", ""),
    Field("model_input_names", "no effect", ""),
)
_TREATMENT = {field.name: field.treatment for field in FIELDS}

_HALF = {"image_mean": 0.5, "image_std": 0.5}
# transformers image_utils.OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
_OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_VIT = {"size": {"height": 224, "width": 224}, "resample": 2, "default_to_square": True, **_HALF}
_CLIP = {
    "size": {"shortest_edge": 224}, "crop_size": 224, "do_center_crop": True, "resample": 3,
    "default_to_square": False, **_OPENAI,
}  # fmt: skip
TYPES: dict[str, dict[str, Any]] = {
    "ViTImageProcessor": _VIT,
    "DeiTImageProcessor": {
        **_VIT, "size": 256, "crop_size": 224, "do_center_crop": True, "resample": 3,
    },
    "BeitImageProcessor": {**_VIT, "crop_size": 224, "resample": 3},
    "SiglipImageProcessor": {**_VIT, "resample": 3, "default_to_square": False},
    "CLIPImageProcessor": _CLIP,
    "BitImageProcessor": _CLIP,
}  # fmt: skip
_FLAGS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "default_to_square")


def from_processor_config(
    config: Mapping[str, Any],
    size: ImageSize | None,
    channels: int = 3,
    *,
    file: str = PREPROCESSOR,
) -> Preprocessing:
    """Read a processor's configuration.

    Args:
        config: the parsed file.
        size: the size the model receives, where it differs from the file's; what a picture is
            scaled to before a crop is then kept in proportion.
        channels: what the file's mean and std must have.
        file: its name, which the preprocessing is called by.
    """
    try:
        read = _read(_Fields.of(config), size, channels, file)
        read = replace(read, unread=_unread(config, file))
        return read if size is None or size == read.size else resized(read, size)
    except SpecError as error:
        raise ImageError(
            f"{file}: {error}; correct it, or choose --preprocess hf, msn-eval or another file"
        ) from error


def _unread(config: Mapping[str, Any], file: str) -> tuple[str, ...]:
    """Note what of a configuration was not taken as it is written."""
    unknown = [name for name in config if name not in _TREATMENT and config[name] is not None]
    notes = []
    if unknown:
        notes.append(f"{file}: not used, as unknown here: {', '.join(map(ascii, sorted(unknown)))}")
    if isinstance(config.get("resample"), str):
        notes.append(
            f"{file}: resample {config['resample']!r} is text, which transformers reads as "
            "bilinear; Pillow's codes are 2 for bilinear, 3 for bicubic"
        )
    return tuple(notes)


def size_in(config: Mapping[str, Any]) -> ImageSize | None:
    """Give the size a configuration makes of pictures; None where it leaves them as they are."""
    if config.get("do_resize", True) is None or config.get("do_resize", True) is False:
        return None
    mean = config.get("image_mean")
    channels = len(mean) if isinstance(mean, list | tuple) else 3
    return from_processor_config(config, None, channels).size


@dataclass(frozen=True, slots=True)
class _Fields:
    """A configuration's fields, defaults filled in; ``null`` are those that it sets to null."""

    fields: Mapping[str, Any]
    null: frozenset[str]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> _Fields:
        for name, value in sorted(config.items(), key=lambda item: str(item[0])):
            unknown_step = name not in _TREATMENT and name.startswith("do_")
            # what is off by default and written all the same changes nothing
            is_set = value is not None and value is not False
            if (_TREATMENT.get(name) == "refused" or unknown_step) and is_set:
                raise SpecError(f"{name} is not done here")
        given = {name: value for name, value in config.items() if value is not None}
        fields: dict[str, Any] = {
            "do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False,
            "rescale_factor": 1 / 255, **_defaults(given), **given,
        }  # fmt: skip
        for name in _FLAGS:
            # null turns a step off in transformers, where an absent field has its default
            fields[name] = False if name in config and config[name] is None else fields[name]
            if not isinstance(fields[name], bool):
                raise SpecError(f"{name} is {fields[name]!r}; expected true or false")
        return cls(fields, frozenset(config.keys() - given.keys() - {*_FLAGS}))

    def __getitem__(self, name: str) -> Any:
        if name in self.null:
            raise SpecError(
                f"{name} is null, which transformers refuses; leave it out for a default"
            )
        return self.fields[name]


def _defaults(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Find the processor's defaults by its type, as AutoImageProcessor does."""
    for field in ("image_processor_type", "feature_extractor_type"):
        name = given.get(field)
        if name is None:
            continue
        plain = str(name).replace("FeatureExtractor", "ImageProcessor")
        # Fast is the same processor by torchvision, whose resizing differs by a rounding step
        plain = plain.removesuffix("Fast").removesuffix("Pil")
        if not isinstance(name, str) or plain not in TYPES:
            raise SpecError(f"{field} {name!r} is not read here; expected {', '.join(TYPES)}")
        return TYPES[plain]
    return _VIT  # what AutoImageProcessor takes for a ViT-MSN


def _read(fields: _Fields, wanted: ImageSize | None, channels: int, file: str) -> Preprocessing:
    resizes, crops = fields["do_resize"], fields["do_center_crop"]
    if crops and not resizes:
        raise SpecError("do_center_crop without do_resize is not done here")
    size, short_side, squash = wanted, None, None
    if resizes or size is None:
        size, short_side = _size(fields["size"], square=fields["default_to_square"])
    if crops:
        if "crop_size" not in fields.fields:
            raise SpecError("do_center_crop is set and crop_size is missing")
        cut, _ = _size(fields["crop_size"], name="crop_size")
        assert cut is not None  # one number is a square there
        size, squash = cut, size if size not in {None, cut} else None
    if size is None:
        raise SpecError("size.shortest_edge without do_center_crop gives no fixed size")
    if fields["do_normalize"]:
        mean = _per_channel(fields["image_mean"], "image_mean", channels)
        std = _per_channel(fields["image_std"], "image_std", channels)
    else:
        mean, std = (0.0,) * channels, (1.0,) * channels
    scale = _number(fields["rescale_factor"], "rescale_factor") if fields["do_rescale"] else 1.0
    return Preprocessing(
        name=file,
        size=size,
        short_side=short_side,
        resample=_resample(fields["resample"]) if resizes else None,
        crop_rounds_down=True,
        scale=scale,
        mean=mean,
        std=std,
        squash=squash,
        exif="apply",
    )


def _resample(code: Any) -> str:
    if isinstance(code, str):
        return "bilinear"  # as PilBackend.resize does; _unread says so
    if not isinstance(code, int) or isinstance(code, bool) or code not in range(len(RESAMPLING)):
        raise SpecError(f"resample is {code!r}; expected one of Pillow's codes 0 to 5")
    return RESAMPLING[code]


def _size(
    value: Any, *, square: bool = True, name: str = "size"
) -> tuple[ImageSize | None, int | None]:
    """Read a size (None where the picture decides) and a short side, as get_size_dict does."""
    if isinstance(value, list | tuple):
        if len(value) != 2:
            raise SpecError(f"{name} is {value!r}; expected [height, width]")
        value = {"height": value[0], "width": value[1]}
    elif not isinstance(value, Mapping):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    sides = {side: number for side, number in value.items() if number is not None}
    if name == "size" and set(sides) == {"shortest_edge"}:
        return None, _pixels(sides["shortest_edge"], f"{name}.shortest_edge")
    if set(sides) != {"height", "width"}:
        wanted = "height and width" + (", or shortest_edge" if name == "size" else "")
        raise SpecError(f"{name} is {dict(value)!r}; expected {wanted}")
    height, width = (_pixels(sides[side], f"{name}.{side}") for side in ("height", "width"))
    return ImageSize(height, width), None


def _pixels(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise SpecError(f"{name} is {value!r}; expected a number of pixels")
    return value


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e9:
        raise SpecError(f"{name} is {value!r}; expected a number")
    return float(value)


def _per_channel(value: Any, name: str, channels: int) -> tuple[float, ...]:
    values = value if isinstance(value, list | tuple) else [value] * channels
    if len(values) != channels:
        raise SpecError(f"{name} has {len(values)} channels, the model takes {channels}")
    return tuple(_number(x, name) for x in values)


def to_processor_config(preprocessing: Preprocessing) -> dict[str, Any]:
    """Write a preprocessing as transformers' image processors do; read back, it is the same.

    But for the side that a crop's odd pixel is taken from: transformers' is written.
    """
    size, short, squash = preprocessing.size, preprocessing.short_side, preprocessing.squash
    final = {"height": size.height, "width": size.width}
    written: dict[str, Any] = {
        "do_convert_rgb": preprocessing.channels == 3,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": preprocessing.resample is not None,
        "image_mean": list(preprocessing.mean),
        "image_processor_type": "ViTImageProcessor",
        "image_std": list(preprocessing.std),
        "rescale_factor": preprocessing.scale,
        "size": final,
    }
    if preprocessing.resample is not None:
        written["resample"] = RESAMPLING.index(preprocessing.resample)
    if squash is not None:
        resized_to = {"height": squash.height, "width": squash.width}
        written |= {"image_processor_type": "DeiTImageProcessor", "size": resized_to}
    elif short is not None:
        written |= {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": short}}
    if preprocessing.crops:
        written |= {"do_center_crop": True, "crop_size": final}
    return dict(sorted(written.items()))


def require_choice(preprocess: str | None) -> None:
    """Refuse, before any work is done, what is neither a preset nor a JSON file that is there."""
    if preprocess in {None, "auto", *PRESETS}:
        return
    path = Path(str(preprocess))
    if path.suffix != ".json":
        wanted = f"{', '.join(PRESETS)}, or a JSON file such as {PREPROCESSOR}"
        raise SpecError(f"preprocessing '{path}' is unknown; expected {wanted}")
    if not path.is_file():
        raise SpecError(f"preprocessing {path} does not exist; expected a JSON file")


def choose(
    stated: Preprocessing | None,
    size: ImageSize,
    channels: int,
    *,
    preprocess: str | None = None,
    exif: Exif | None = None,
    inside: bool = False,
) -> Preprocessing:
    """Choose the preprocessing of a model's pictures.

    Args:
        stated: what the model's manifest or processor says; without it ``hf`` is assumed.
        size: what the model receives.
        channels: of its images.
        preprocess: a preset or a JSON file, instead of ``stated``; None or ``auto`` for none.
        exif: instead of what ``stated`` says.
        inside: the graph takes bytes and normalises them itself, as ``stated`` says.
    """
    require_choice(preprocess)
    if preprocess is None or preprocess == "auto":
        preprocessing = stated or assumed(size, channels)
    elif preprocess in PRESETS:
        preprocessing = preset(preprocess, size, channels)
    else:
        preprocessing = _from_file(Path(preprocess), size, channels)
    if inside and stated is not None and not preprocessing.normalises_as(stated):
        raise SpecError(
            f"--preprocess {preprocess}: {preprocessing.values}, but the graph takes bytes and "
            f"normalises them itself with {stated.values}; export it again with --preprocess "
            f"{preprocess}"
        )
    return preprocessing if exif is None else replace(preprocessing, exif=exif)


def _from_file(path: Path, size: ImageSize, channels: int) -> Preprocessing:
    config = image_processor_of(read_json(path))
    return from_processor_config(config, size, channels, file=path.name)
