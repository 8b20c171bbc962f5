"""A model's preprocessing, and its presets. ``images`` carries it out."""

import math
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from msn_export.errors import SpecError
from msn_export.spec import LARGEST_SIDE, ImageSize

# ImageNet statistics: facebookresearch/msn linear_eval.py, transforms.Normalize;
# Hugging Face image_utils.IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # PIL's codes 0 to 5
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels to Pillow's modes
PRESETS = ("hf", "msn-eval", "raw")
Exif: TypeAlias = Literal["apply", "ignore"]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """The steps from a picture to a model's input.

    ``short_side`` scales the picture's short side to that many pixels, ``squash`` the picture to
    that size whatever its proportions; either way ``size`` is then cut out of the centre, black
    where the picture is smaller. With neither, the picture is squashed to ``size``. ``resample``
    None takes only pictures that already fit. ``exif`` says whether a picture is first turned as
    its EXIF orientation has it; a record without the field was made when none was. ``assumed``:
    nothing said how the model's pictures are made, so this was taken. ``unread`` says what of its
    file was not taken as it is written.
    """

    name: str
    size: ImageSize
    short_side: int | None = None
    resample: str | None = "bilinear"
    crop_rounds_down: bool = False
    scale: float = 1 / 255
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    squash: ImageSize | None = None
    exif: Exif = "ignore"
    assumed: bool = False
    unread: tuple[str, ...] = ()

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
        if self.short_side is not None and self.squash is not None:
            raise SpecError("short_side and squash contradict each other; give one")

    def __str__(self) -> str:
        return f"{self.title}: {self.geometry}; {self.values}"

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def crops(self) -> bool:
        """True where ``size`` is cut out of what a picture is resized to."""
        return self.short_side is not None or self.squash is not None

    @property
    def title(self) -> str:
        """Its name, and whether it was assumed."""
        return f"{self.name} (assumed)" if self.assumed else self.name

    @property
    def geometry(self) -> str:
        """The steps to a picture's size, in words."""
        if self.resample is None:
            resized = f"only pictures of {self.size}"
        elif self.short_side is not None:
            resized = f"short side to {self.short_side} ({self.resample}), centre {self.size}"
        elif self.squash is not None:
            resized = f"resized to {self.squash} ({self.resample}), centre {self.size}"
        else:
            resized = f"resized to {self.size} ({self.resample})"
        return f"{resized}, EXIF orientation {'applied' if self.exif == 'apply' else 'ignored'}"

    @property
    def values(self) -> str:
        """The steps from bytes to numbers, in words."""
        mean, std = (", ".join(f"{x:g}" for x in of) for of in (self.mean, self.std))
        scale = "1/255" if self.scale == 1 / 255 else f"{self.scale:g}"
        return f"scale {scale}, mean {mean}, std {std}"

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for users: that it was assumed, what of its file was not read."""
        assumption = (
            f"preprocessing {self.name} was assumed: nothing says how the model's pictures are "
            "made, --preprocess does"
        )
        return (*self.unread, *([assumption] if self.assumed else []))

    def normalises_as(self, other: "Preprocessing") -> bool:
        """True where both make the same numbers of a picture's bytes."""
        return (self.scale, self.mean, self.std) == (other.scale, other.mean, other.std)

    def makes_the_same_as(self, other: "Preprocessing") -> bool:
        """True where both make the same of every picture, whatever they are called."""
        crop = self.crop_rounds_down if not self.crops else other.crop_rounds_down
        alike = replace(other, name=self.name, assumed=self.assumed, unread=self.unread)
        return self == replace(alike, crop_rounds_down=crop)


def preset(name: str, size: ImageSize, channels: int = 3) -> Preprocessing:
    """Make the preprocessing called ``hf``, ``msn-eval`` or ``raw`` for an image size."""
    if channels not in MODES:
        raise SpecError(f"pictures have no {channels} channels; expected 1, 3 or 4")
    half = (0.5,) * channels
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else (half, half)
    if name == "hf":
        # transformers ViTImageProcessor: resize to exactly size, bilinear, rescale, normalise.
        return Preprocessing("hf", size, mean=mean, std=std, exif="apply")
    if name == "msn-eval":
        # facebookresearch/msn linear_eval.py and logistic_eval.py: Resize(256), CenterCrop(224);
        # kept in proportion for other sizes. torchvision's ImageFolder, which those read with,
        # turns no picture: here it is turned unless exif says otherwise, for what users see upright
        # is what they want embedded.
        short_side = round(min(size.height, size.width) * 256 / 224)
        short_side = max(short_side, size.height, size.width)
        return Preprocessing("msn-eval", size, short_side, mean=mean, std=std, exif="apply")
    if name == "raw":
        # for graphs that normalise themselves: the resized picture's bytes, as floats 0 to 255
        zeros, ones = (0.0,) * channels, (1.0,) * channels
        return Preprocessing("raw", size, scale=1.0, mean=zeros, std=ones, exif="apply")
    raise SpecError(f"preprocessing {name!r} is unknown; expected {', '.join(PRESETS)}")


def assumed(size: ImageSize, channels: int = 3) -> Preprocessing:
    """Take ``hf`` for a model of which nothing says how its pictures are made."""
    return replace(preset("hf", size, channels), assumed=True)


def resized(preprocessing: Preprocessing, size: ImageSize) -> Preprocessing:
    """Carry a preprocessing over to another image size, the crop kept in proportion."""
    before, short_side = preprocessing.size, preprocessing.short_side
    if short_side is not None:
        least = min(before.height, before.width)
        short_side = round(min(size.height, size.width) * short_side / least)
        short_side = max(short_side, size.height, size.width)
    squash = preprocessing.squash
    if squash is not None:
        squash = ImageSize(
            round(size.height * squash.height / before.height),
            round(size.width * squash.width / before.width),
        )
    return replace(preprocessing, size=size, short_side=short_side, squash=squash)
