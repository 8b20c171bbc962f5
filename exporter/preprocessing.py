"""What a model's preprocessing is: presets, and Hugging Face's file. ``images`` carries it out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from msn_export.errors import ImageError, SpecError
from msn_export.spec import ImageSize

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
        if not all(math.isfinite(x) for x in (*self.mean, self.scale)) or not all(
            math.isfinite(x) and x > 0 for x in self.std
        ):
            raise SpecError("mean, std and scale must be finite and std above zero")

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
        SpecError: no preset of that name.
    """
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
        return {}
    return {"mean": (0.5,) * channels, "std": (0.5,) * channels}


def from_processor_config(
    config: Mapping[str, Any], size: ImageSize | None, channels: int = 3
) -> Preprocessing:
    """Read a Hugging Face ``preprocessor_config.json``.

    Args:
        config: the parsed file.
        size: the size the model receives, where it differs from the file's; the short side to
            scale to is then kept in proportion.
        channels: what the file's mean and std must have.

    Raises:
        ImageError: the file asks for something this module does not do, or contradicts itself.
    """
    try:
        own = _processor_size(config)
        made = Preprocessing(
            name="preprocessor_config.json",
            size=own.size,
            short_side=own.short_side,
            resample=RESAMPLING[int(config.get("resample", 2))]
            if config.get("do_resize", True)
            else None,
            crop_rounds_down=True,
            scale=float(config.get("rescale_factor", 1 / 255))
            if config.get("do_rescale", True)
            else 1.0,
            **_processor_statistics(config, channels),
        )
    except (TypeError, ValueError, KeyError, IndexError, SpecError) as error:
        raise ImageError(
            f"preprocessor_config.json cannot be read ({error!r}); "
            "mend it or choose --preprocess hf or msn-eval"
        ) from error
    if made.channels != channels:
        raise ImageError(
            f"preprocessor_config.json normalises {made.channels} channels, the model takes "
            f"{channels}; mend it"
        )
    return made if size is None or size == made.size else resized(made, size)


@dataclass(frozen=True, slots=True)
class _Size:
    size: ImageSize
    short_side: int | None


def _processor_size(config: Mapping[str, Any]) -> _Size:
    size, crop = config.get("size", 224), config.get("crop_size")
    if isinstance(size, int):
        # ViTFeatureExtractor of transformers < 4.26 wrote one number and meant a square
        size = {"height": size, "width": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    cut = None
    if config.get("do_center_crop", False) and crop is not None:
        cut = ImageSize(int(crop["height"]), int(crop["width"]))
    if "shortest_edge" in size:
        if cut is None:
            raise ValueError("size.shortest_edge without do_center_crop gives no fixed size")
        return _Size(cut, int(size["shortest_edge"]))
    squashed = ImageSize(int(size["height"]), int(size["width"]))
    if cut is not None and cut != squashed:
        raise ValueError("do_center_crop after a resize to another fixed size is not supported")
    return _Size(squashed, None)


def _processor_statistics(config: Mapping[str, Any], channels: int) -> dict[str, Any]:
    if not config.get("do_normalize", True):
        return {"mean": (0.0,) * channels, "std": (1.0,) * channels}
    return {
        "mean": tuple(float(x) for x in config.get("image_mean", IMAGENET_MEAN)),
        "std": tuple(float(x) for x in config.get("image_std", IMAGENET_STD)),
    }


def resized(preprocessing: Preprocessing, size: ImageSize) -> Preprocessing:
    """Carry a preprocessing over to another image size, the crop kept in proportion."""
    short_side = preprocessing.short_side
    if short_side is not None:
        before = min(preprocessing.size.height, preprocessing.size.width)
        short_side = round(min(size.height, size.width) * short_side / before)
        short_side = max(short_side, size.height, size.width)
    return replace(preprocessing, size=size, short_side=short_side)
