"""A folder of pictures: which files it holds, and as many of them decoded as are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from msn_export.errors import ImageError
from msn_export.images import PICTURES, read

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from msn_export.preprocessing import Preprocessing


def find(folder: Path) -> list[Path]:
    """List the picture files below a folder, sorted; a single file is itself.

    Raises:
        ImageError: the folder is missing, or holds no file with a picture's ending.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ImageError(f"image folder {folder} does not exist; give a folder of pictures")
    paths = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file()
    )
    if not paths:
        raise ImageError(
            f"image folder {folder} holds no picture; expected files ending in "
            f"{', '.join(sorted(PICTURES))}"
        )
    return paths


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Decoded pictures: ``pixels`` uint8 [b, h, w, c], and what could not be decoded."""

    pixels: NDArray[np.uint8]
    names: tuple[str, ...]
    broken: tuple[str, ...] = field(default=())


def load(folder: Path, preprocessing: Preprocessing, limit: int) -> ImageSet:
    """Decode up to ``limit`` pictures below a folder, evenly spread over its sorted list.

    Raises:
        ImageError: there is no picture, or none can be decoded.
    """
    pixels: list[NDArray[np.uint8]] = []
    names: list[str] = []
    broken: list[str] = []
    paths = spread(find(folder), limit)
    for path in paths:
        try:
            pixels.append(read(path, preprocessing))
            names.append(str(path.relative_to(folder)) if path != folder else path.name)
        except ImageError as error:
            broken.append(str(error))
    if not pixels:
        raise ImageError(
            f"all {len(paths)} pictures of {folder} are broken; the first: {broken[0]}"
        )
    return ImageSet(np.stack(pixels), tuple(names), tuple(broken))


def spread(paths: Sequence[Path], limit: int) -> list[Path]:
    """Choose at most ``limit`` paths, evenly spread, the first one always among them."""
    if len(paths) <= limit:
        return list(paths)
    return [paths[i * len(paths) // limit] for i in range(limit)]
