"""The only preprocessing: a picture file to the pixels and the floats a ViT-MSN receives.

Calibration, every check, the runtime and the README call this module. Pillow is the reference
for resizing; it is imported when a picture is opened, not before.

Shapes: ``b`` images, ``h`` and ``w`` pixels, ``c`` channels.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np

from msn_export.errors import ImageError
from msn_export.preprocessing import MODES, RESAMPLING, Preprocessing
from msn_export.spec import InputFormat

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

# Pillow's names of them. It knows many more, and some start programs: EPS runs Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
HEADER = 64  # bytes by which a file's format is known
# First bytes, as each format's specification has them; BMP, PPM and those in ISO boxes take more
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
)
_DIB_HEADERS = frozenset({12, 16, 40, 52, 56, 64, 108, 124})  # bytes, by version
_HEIC = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_AVIF = frozenset({b"avif", b"avis"})
_HEIF = frozenset({b"mif1", b"msf1"})  # of either codec: a compatible brand says which


def kind_of(header: bytes) -> str | None:
    """Find a picture's format by its first ``HEADER`` bytes; None where it is no picture.

    Returns:
        One of ``FORMATS``, ``AVIF`` or ``HEIC``.
    """
    for magic, kind in _MAGIC:
        if header.startswith(magic):
            return kind
    if header[:4] == b"RIFF" and header[8:12] == b"WEBP":
        return "WEBP"
    if header[:2] == b"BM" and int.from_bytes(header[14:18], "little") in _DIB_HEADERS:
        return "BMP"
    if re.match(rb"P[1-6]\s+[\d#]", header):
        return "PPM"
    if header[4:8] == b"ftyp":
        size = int.from_bytes(header[:4], "big")
        brands = {header[at : at + 4] for at in (8, *range(16, min(size, len(header)), 4))}
        if brands & _AVIF:
            return "AVIF"
        if brands & (_HEIC | _HEIF):
            return "HEIC"
    return None


def unreadable(kind: str) -> str | None:
    """Give the reason why a format cannot be read here; None where it can."""
    if kind == "HEIC" and "HEIF" not in _formats():
        return "HEIC picture, which needs pillow-heif (pip install 'msn-export[heic]')"
    if kind == "AVIF" and "AVIF" not in _formats():
        return "AVIF picture, which needs Pillow 11.3 or later with its AVIF decoder"
    return None


@cache
def _formats() -> tuple[str, ...]:
    """List what can be opened here, with the decoders that are installed."""
    from PIL import features

    more = []
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        more.append("HEIF")
    if "avif" in features.modules and features.check("avif"):
        more.append("AVIF")
    return (*FORMATS, *more)


def fit(picture: Image.Image, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Resize and crop one picture, upright already, to uint8 [h, w, c]."""
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
        wanted = _resized_to(picture, preprocessing)
        _require_size(wanted, "before its crop it would have")
        picture = picture.resize(wanted, method)
    if preprocessing.crops:
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


def turn(picture: Image.Image, preprocessing: Preprocessing) -> tuple[Image.Image, bool]:
    """Turn a picture as its EXIF orientation has it, where the preprocessing applies that.

    transformers' ``load_image``, and so its pipelines, turns files and opened images alike; its
    processors turn nothing, and neither does torchvision's ``ImageFolder``, with which
    facebookresearch/msn evaluates.

    Returns:
        The picture, and whether it was turned. The one that was given is not changed.
    """
    from PIL import ImageOps

    if preprocessing.exif == "ignore" or _orientation(picture) not in _TURNED:
        return picture, False
    _require_size(picture.size, "it has")
    return ImageOps.exif_transpose(picture), True


_TURNED = frozenset(range(2, 9))  # orientations of the EXIF standard; 1 is upright
_ORIENTATION = 0x0112


def _orientation(picture: Image.Image) -> object:
    """Read the tag; a picture whose EXIF is damaged is shown as it lies, as browsers do."""
    try:
        orientation: object = picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  Pillow's parser raises what it likes for damaged data
        return 1
    return orientation if isinstance(orientation, int) else 1


def _resized_to(picture: Image.Image, preprocessing: Preprocessing) -> tuple[int, int]:
    width, height = picture.size
    short_side = preprocessing.short_side
    if short_side is None:
        fixed = preprocessing.squash or preprocessing.size
        return fixed.width, fixed.height
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


def model_input(
    pixels: NDArray[np.uint8], preprocessing: Preprocessing, kind: InputFormat
) -> NDArray[Any]:
    """Turn bytes [b, h, w, c] into what a model takes: bytes, or planes [b, c, h, w]."""
    if kind is InputFormat.UINT8:
        return pixels
    planes = normalize(pixels, preprocessing)
    return planes.astype(np.float16) if kind is InputFormat.HALF else planes


# a file by its path, its bytes or an open file; a Pillow image; pixels: uint8 [h, w, 3] in RGB
Picture: TypeAlias = "PathLike[str] | str | bytes | BinaryIO | Image.Image | NDArray[np.uint8]"


def decode(pictures: Iterable[Picture], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Turn pictures into pixels: decoded, turned by EXIF, resized and cropped.

    Args:
        pictures: files, Pillow images, or uint8 [h, w, 3] in RGB.
        preprocessing: sizes in pixels, filter and order, as a manifest has them.

    Returns:
        uint8 [b, h, w, c], 0 to 255.

    Raises:
        ImageError: a picture cannot be read (it is named), or there is none.
    """
    pixels = [
        _decode_one(picture, number, preprocessing) for number, picture in enumerate(pictures, 1)
    ]
    if not pixels:
        raise ImageError("no picture to preprocess; give at least one")
    return np.stack(pixels)


def _decode_one(picture: Any, number: int, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode one picture, which is called by its number where it has no name."""
    if isinstance(picture, str | PathLike):
        return read(Path(picture), preprocessing)
    if isinstance(picture, bytes | bytearray | memoryview):
        return read_file(io.BytesIO(picture), f"picture {number}", preprocessing).pixels
    if hasattr(picture, "read"):
        name = getattr(picture, "name", None)
        named = name if isinstance(name, str) else f"picture {number}"
        return read_file(picture, named, preprocessing).pixels
    return fit(turn(_opened(picture), preprocessing)[0], preprocessing)


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
        f"{found} is no picture; give a path, bytes, an open file, a Pillow image, or uint8 "
        "[h, w, 3] in RGB"
    )


def preprocess(pictures: Iterable[Picture], preprocessing: Preprocessing) -> NDArray[np.float32]:
    """Turn pictures into a batch of normalised planes.

    Args:
        pictures: as of ``decode``.
        preprocessing: also scale, and mean and standard deviation of each channel.

    Returns:
        float32 [b, c, h, w]: (pixel * scale - mean) / std, where scale is 1/255 by default.

    Raises:
        ImageError: a picture cannot be read (it is named), or there is none.
    """
    return normalize(decode(pictures, preprocessing), preprocessing)


def read(path: Path, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Decode one file to uint8 [h, w, c]."""
    return read_file(path, str(path), preprocessing).pixels


class Fitted(NamedTuple):
    """A decoded file: uint8 [h, w, c], and whether its EXIF orientation turned it.

    ``sha256`` is of the file's bytes, where those were read as a whole; else empty.
    """

    pixels: NDArray[np.uint8]
    turned: bool
    sha256: bytes = b""


def read_file(file: Path | BinaryIO, name: str, preprocessing: Preprocessing) -> Fitted:
    """Decode one file that is open, or whose path is not what it is called."""
    from PIL import Image

    try:
        with Image.open(file, formats=_formats()) as picture:
            upright, turned = turn(picture, preprocessing)
            return Fitted(fit(upright, preprocessing), turned)
    except Exception as error:  # Pillow's decoders raise what they like for damaged data
        reason = _reason(error, file)
        raise ImageError(f"{name} is not a readable picture ({reason})") from error


def _reason(error: Exception, file: Path | BinaryIO) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        # Pillow names the file, or an object's address
        return _unreadable_content(file) or "cannot identify image file"
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _unreadable_content(file: Path | BinaryIO) -> str | None:
    header: Any
    try:
        if isinstance(file, Path):
            with file.open("rb") as opened:
                header = opened.read(HEADER)
        else:
            file.seek(0)
            header = file.read(HEADER)
    except (OSError, ValueError):  # gone since, or closed by Pillow
        return None
    if not isinstance(header, bytes):
        return "it is open as text; open it in mode 'rb'"
    kind = kind_of(header)
    return unreadable(kind) if kind is not None else None


def noise(preprocessing: Preprocessing, count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Draw seeded random bytes [count, h, w, c] for checks without pictures; not images."""
    size = preprocessing.size
    shape = (count, size.height, size.width, preprocessing.channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
