"""The only preprocessing: a picture file to the pixels and the floats a ViT-MSN receives.

Calibration, every check, the runtime and the README call this module. Pillow is the reference
for resizing; it is imported when a picture is opened, not before.

Shapes: ``b`` images, ``h`` and ``w`` pixels, ``c`` channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from msn_export.errors import ImageError
from msn_export.preprocessing import MODES, RESAMPLING, Preprocessing

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

PICTURES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
# Pillow's names of them. It knows many more, and some start programs: EPS runs Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def fit(picture: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize and crop one picture to uint8 [h, w, c].

    EXIF orientation is not applied: neither the training code nor Hugging Face's processor does.

    Raises:
        ImageError: the picture is too large or too narrow to resize, has more than 8 bits a
            channel, or has another size and the preprocessing does not resize.
    """
    from PIL import Image  # Pillow only where a picture is at hand

    size = preprocessing.size
    _require_size(picture.size, "it has")
    if picture.mode in {"I", "F"} or picture.mode.startswith("I;"):
        raise ImageError(
            f"it has more than 8 bits a channel (mode {picture.mode}), of which Pillow would cut "
            "the bright part; save it with 8"
        )
    picture = picture.convert(MODES[preprocessing.channels])
    if preprocessing.resample is None:
        if picture.size != (size.width, size.height):
            raise ImageError(
                f"it is {picture.height}x{picture.width} and preprocessing {preprocessing.name} "
                f"does not resize; expected {size}"
            )
    else:
        method = Image.Resampling(RESAMPLING.index(preprocessing.resample))
        wanted = _resize_to(picture, preprocessing)
        _require_size(wanted, "before its crop it would have")
        picture = picture.resize(wanted, method)
    if preprocessing.short_side is not None:
        picture = picture.crop(_centre(picture, preprocessing))
    pixels = np.asarray(picture)
    return pixels.reshape(size.height, size.width, preprocessing.channels)


def _require_size(size: tuple[int, int], what: str) -> None:
    """Refuse decompression bombs, and slivers that become one when their short side is scaled."""
    from PIL import Image

    width, height = size
    most = Image.MAX_IMAGE_PIXELS  # None where the user trusts all pictures
    if most is not None and width * height > most:
        raise ImageError(f"{what} {height}x{width} pixels; at most {most} in all are decoded")


def _resize_to(picture: Image.Image, preprocessing: Preprocessing) -> tuple[int, int]:
    width, height = picture.size
    short_side = preprocessing.short_side
    if short_side is None:
        return preprocessing.size.width, preprocessing.size.height
    # torchvision.transforms.Resize and transformers.get_resize_output_image_size both truncate
    if width <= height:
        return short_side, int(short_side * height / width)
    return int(short_side * width / height), short_side


def _centre(picture: Image.Image, preprocessing: Preprocessing) -> tuple[int, int, int, int]:
    size = preprocessing.size
    top, left = (picture.height - size.height) / 2, (picture.width - size.width) / 2
    if preprocessing.crop_rounds_down:  # transformers.image_transforms.center_crop
        top, left = math.floor(top), math.floor(left)
    else:  # torchvision.transforms.functional.center_crop
        top, left = round(top), round(left)
    return int(left), int(top), int(left) + size.width, int(top) + size.height


def normalize(pixels: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Scale, normalise and turn bytes [b, h, w, c] into planes [b, c, h, w].

    In transformers' order of rounding (``image_transforms``, rescale and normalize), so that the
    same bytes are the same floats to the last bit; by table, for a channel has 256 values.
    """
    scaled = (np.arange(256) * preprocessing.scale).astype(np.float32)
    b, h, w, c = pixels.shape
    planes = np.empty((b, c, h, w), np.float32)
    for channel, (mean, std) in enumerate(zip(preprocessing.mean, preprocessing.std, strict=True)):
        table = (scaled - np.float32(mean)) / np.float32(std)
        planes[:, channel] = table[pixels[..., channel]]
    return planes


# a file, a Pillow image, or decoded pixels: uint8 [h, w, 3] in RGB
Picture: TypeAlias = "Path | str | Image.Image | NDArray[np.uint8]"


def decode(pictures: Iterable[Picture], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Turn pictures into pixels [b, h, w, c].

    Raises:
        ImageError: a picture cannot be read (it is named), or there is none.
    """
    pixels = [
        read(Path(picture), preprocessing)
        if isinstance(picture, str | Path)
        else fit(_opened(picture), preprocessing)
        for picture in pictures
    ]
    if not pixels:
        raise ImageError("no picture to preprocess; give at least one")
    return np.stack(pixels)


def _opened(picture: Any) -> Image.Image:
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, np.ndarray):
        found = f"a {type(picture).__name__}"
    elif picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3 and picture.size:
        return Image.fromarray(picture)
    else:
        found = f"{picture.dtype} {list(picture.shape)}"
    raise ImageError(
        f"{found} is no picture; give a file, a Pillow image, or uint8 [h, w, 3] in RGB"
    )


def preprocess(pictures: Iterable[Picture], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Turn pictures into a batch [b, c, h, w].

    Raises:
        ImageError: a picture cannot be read (it is named), or there is none.
    """
    return normalize(decode(pictures, preprocessing), preprocessing)


def read(path: Path, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode one file to uint8 [h, w, c].

    Raises:
        ImageError: the file is not a picture Pillow can decode, or ``fit`` refuses it.
    """
    return read_file(path, str(path), preprocessing)


def read_file(file: Path | BinaryIO, name: str, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode one file that is open, or whose path is not what it is called.

    Raises:
        ImageError: it is not a picture Pillow can decode, or ``fit`` refuses it; it is ``name``.
    """
    from PIL import Image

    try:
        with Image.open(file, formats=FORMATS) as picture:
            return fit(picture, preprocessing)
    except Exception as error:  # Pillow's decoders raise what they like for damaged data
        raise ImageError(f"{name} is not a readable picture ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "cannot identify image file"  # Pillow names the file, or an object's address
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def noise(preprocessing: Preprocessing, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Draw seeded random bytes [count, h, w, c] for checks without pictures; not images."""
    size = preprocessing.size
    shape = (count, size.height, size.width, preprocessing.channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
