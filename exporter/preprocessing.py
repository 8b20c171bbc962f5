"""What a model's preprocessing is: presets, and Hugging Face's file. ``images`` carries it out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from msn_export.errors import ImageError, SpecError
from msn_export.spec import LARGEST_SIDE, ImageSize

# ImageNet statistics: facebookresearch/msn linear_eval.py, transforms.Normalize;
# Hugging Face image_utils.IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # PIL's codes 0 to 5
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels to Pillow's modes


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How a picture becomes a model's input.

    ``short_side`` None squashes the picture to ``size``; a number scales its short side to that
    and cuts ``size`` out of the centre. ``resample`` None takes only pictures that already fit.
    """

    name: str
    size: ImageSize
    short_side: int | None = None
    resample: str | None = "bilinear"
    crop_rounds_down: bool = False
    scale: float = 1 / 255
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.resample is not None and self.resample not in RESAMPLING:
            raise SpecError(
                f"resampling {self.resample!r} is unknown; expected one of {', '.join(RESAMPLING)}"
            )
        if len(self.mean) != len(self.std) or len(self.mean) not in MODES:
            raise SpecError(
                f"mean has {len(self.mean)} channels and std {len(self.std)}; "
                "expected the same number, one of 1, 3, 4"
            )
        if not all(map(math.isfinite, self.mean)) or not all(
            math.isfinite(x) and x > 0 for x in (*self.std, self.scale)
        ):
            raise SpecError("mean, std and scale must be finite, std and scale above zero")
        if self.short_side is not None and not 1 <= self.short_side <= LARGEST_SIDE:
            raise SpecError(
                f"short side {self.short_side} is out of range; expected 1 to {LARGEST_SIDE}"
            )

    @property
    def channels(self) -> int:
        """Number of channels a picture is converted to."""
        return len(self.mean)

    def makes_the_same_as(self, other: "Preprocessing") -> bool:
        """Whether both make the same of every picture, whatever they are called."""
        crops = self.short_side is not None
        renamed = replace(other, name=self.name)
        return self == (
            renamed if crops else replace(renamed, crop_rounds_down=self.crop_rounds_down)
        )


def preset(name: str, size: ImageSize, channels: int = 3) -> Preprocessing:
    """Make the preprocessing called ``hf`` or ``msn-eval`` for an image size.

    Raises:
        SpecError: no preset of that name, or pictures do not come with so many channels.
    """
    if channels not in MODES:
        raise SpecError(f"pictures have no {channels} channels; expected 1, 3 or 4")
    statistics = _statistics(channels)
    if name == "hf":
        # transformers ViTImageProcessor: resize to exactly size, bilinear, rescale, normalise.
        return Preprocessing("hf", size, None, "bilinear", **statistics)
    if name == "msn-eval":
        # facebookresearch/msn linear_eval.py and logistic_eval.py: Resize(256), CenterCrop(224);
        # kept in proportion for other sizes.
        short_side = round(min(size.height, size.width) * 256 / 224)
        short_side = max(short_side, size.height, size.width)
        return Preprocessing("msn-eval", size, short_side, "bilinear", **statistics)
    raise SpecError(f"preprocessing {name!r} is unknown; expected hf or msn-eval")


def _statistics(channels: int) -> dict[str, Any]:
    if channels == 3:
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return {"mean": (0.5,) * channels, "std": (0.5,) * channels}


# What a processor may do without changing the pixels that are computed here
_DONE = frozenset({"do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb"})


def from_processor_config(
    config: Mapping[str, Any], size: ImageSize | None, channels: int = 3
) -> Preprocessing:
    """Read a Hugging Face ``preprocessor_config.json``; defaults are ViTImageProcessor's.

    Args:
        config: the parsed file.
        size: the size the model receives, where it differs from the file's; the short side to
            scale to is then kept in proportion.
        channels: what the file's mean and std must have.

    Raises:
        ImageError: the file asks for something this module does not do, or contradicts itself.
    """
    try:
        made = _from_processor_config(config, channels)
    except SpecError as error:
        raise ImageError(
            f"preprocessor_config.json: {error}; mend it or choose --preprocess hf or msn-eval"
        ) from error
    return made if size is None or size == made.size else resized(made, size)


def _from_processor_config(config: Mapping[str, Any], channels: int) -> Preprocessing:
    known = {name: value for name, value in config.items() if value is not None}
    for name in sorted(name for name, value in known.items() if name.startswith("do_") and value):
        if name not in _DONE:
            raise SpecError(f"{name} is not done here")
    size, short_side = _processor_size(known)
    resample = known.get("resample", 2)
    if resample not in range(len(RESAMPLING)) or isinstance(resample, bool):
        raise SpecError(f"resample is {resample!r}; expected one of Pillow's codes 0 to 5")
    resizes, rescales = known.get("do_resize", True), known.get("do_rescale", True)
    if known.get("do_normalize", True):
        # transformers image_utils.IMAGENET_STANDARD_MEAN, _STD: 0.5
        mean = _per_channel(known.get("image_mean", 0.5), "image_mean", channels)
        std = _per_channel(known.get("image_std", 0.5), "image_std", channels)
    else:
        mean, std = (0.0,) * channels, (1.0,) * channels
    return Preprocessing(
        name="preprocessor_config.json",
        size=size,
        short_side=short_side if resizes else None,
        resample=RESAMPLING[int(resample)] if resizes else None,
        crop_rounds_down=True,
        scale=_number(known.get("rescale_factor", 1 / 255), "rescale_factor") if rescales else 1.0,
        mean=mean,
        std=std,
    )


def _processor_size(known: Mapping[str, Any]) -> tuple[ImageSize, int | None]:
    """Give what the model receives, and the short side that a picture is scaled to before a cut."""
    size = known.get("size", {"height": 224, "width": 224})
    crops = known.get("do_center_crop", False) and "crop_size" in known
    cut = _square(known["crop_size"], "crop_size") if crops else None
    if isinstance(size, Mapping) and "shortest_edge" in size:
        if cut is None:
            raise SpecError("size.shortest_edge without do_center_crop gives no fixed size")
        if "longest_edge" in size:
            raise SpecError("size.shortest_edge with longest_edge is not done here")
        return cut, _pixels(size["shortest_edge"], "size.shortest_edge")
    if cut is not None and not isinstance(size, Mapping):
        raise SpecError(
            f"size {size!r} with do_center_crop has two meanings; write it as shortest_edge, or as "
            "height and width"
        )
    squashed = _square(size, "size")
    if cut is not None and cut != squashed:
        raise SpecError("do_center_crop after a resize to another fixed size is not done here")
    return squashed, None


def _square(value: Any, name: str) -> ImageSize:
    """Read a size; ViTFeatureExtractor of transformers < 4.26 wrote one number for a square."""
    if not isinstance(value, Mapping):
        value = {"height": value, "width": value}
    for side in ("height", "width"):
        if side not in value:
            raise SpecError(f"{name} is {dict(value)!r}; expected height and width")
    height, width = (_pixels(value[side], f"{name}.{side}") for side in ("height", "width"))
    return ImageSize(height, width)


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


def resized(preprocessing: Preprocessing, size: ImageSize) -> Preprocessing:
    """Carry a preprocessing over to another image size, the crop kept in proportion."""
    short_side = preprocessing.short_side
    if short_side is not None:
        before = min(preprocessing.size.height, preprocessing.size.width)
        short_side = round(min(size.height, size.width) * short_side / before)
        short_side = max(short_side, size.height, size.width)
    return replace(preprocessing, size=size, short_side=short_side)
