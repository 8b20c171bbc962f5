"""A folder of pictures: the files it holds, and as many of them decoded as are asked for."""

from __future__ import annotations

import glob
import os
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from msn_export.errors import ImageError
from msn_export.images import HEADER, kind_of, read_file, unreadable
from msn_export.picture_table import LISTS, read_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from msn_export.preprocessing import Preprocessing

# Files of these endings are taken for pictures unopened: a million of them are listed without a
# million reads. What has none of them is known by its first bytes.
ENDINGS = frozenset(
    {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".jp2", ".pgm", ".png", ".ppm", ".tif", ".tiff",
     ".webp"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Found:
    """The pictures below a folder, sorted by path, and by reason how many entries were skipped.

    ``base`` is what their names are relative to.
    """

    paths: tuple[Path, ...]
    base: Path
    skipped: Mapping[str, int] = field(default_factory=dict)

    def name_of(self, path: Path) -> str:
        """Name a picture: its path below the folder, or the whole where it lies elsewhere."""
        return str(path.relative_to(self.base) if path.is_relative_to(self.base) else path)


def find(folder: Path) -> Found:
    """List the pictures below a folder, those of a table, or the files that a pattern matches.

    A single picture is itself.

    Hidden files and folders are skipped, and so is what is no picture or cannot be read here; links
    to folders are not followed.
    """
    if folder.is_file():
        is_list = folder.suffix.lower() in LISTS
        paths = tuple(path for path, _ in read_rows(folder)) if is_list else (folder,)
        return Found(paths, folder.parent)
    if folder.is_dir() and folder.resolve() == Path("/"):  # all of the machine, and its devices
        raise ImageError(f"image folder {folder} is the root of all files; give a folder in it")
    if not folder.exists() and is_pattern(folder):
        return _matched(folder)
    if not folder.is_dir():
        raise ImageError(f"image folder {folder} does not exist; give a folder of pictures")
    skipped: Counter[str] = Counter()
    paths = tuple(_walk(folder, skipped))
    if not paths:
        why = f" ({skips(skipped)})" if skipped else ""
        raise ImageError(f"image folder {folder} holds no picture that can be read{why}")
    return Found(paths, folder, dict(sorted(skipped.items())))


def is_pattern(folder: Path) -> bool:
    return any(sign in str(folder) for sign in "*?[")


def _matched(pattern: Path) -> Found:
    """List the files that a pattern matches; their names are below its folder without signs."""
    signs = [is_pattern(Path(part)) for part in pattern.parts]
    base, below = (Path(*part) for part in (pattern.parts[: signs.index(True)],
                                            pattern.parts[signs.index(True) :]))  # fmt: skip
    # Path.glob matches hidden files too
    names = glob.iglob(str(below), root_dir=base, recursive=True)  # noqa: PTH207
    found = (base / name for name in names)
    paths = tuple(sorted(path for path in found if path.is_file()))
    if not paths:
        raise ImageError(f"the pattern {pattern} matches no file")
    return Found(paths, base)


def skips(skipped: Mapping[str, int]) -> str:
    """List in one line what was skipped, the most first."""
    most = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
    return "skipped " + ", ".join(f"{count} {reason}" for reason, count in most)


def _walk(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Give pictures in the order of their paths' parts: each folder's entries by name."""
    open_folders = [_entries(str(folder), skipped)]  # no recursion: folders may be nested deeply
    while open_folders:
        entry = next(open_folders[-1], None)
        if entry is None:
            open_folders.pop()
        elif entry.name.startswith("."):
            skipped["hidden"] += 1
        elif entry.is_dir(follow_symlinks=False):
            open_folders.append(_entries(entry.path, skipped))
        elif (reason := _reason(entry)) is not None:
            skipped[reason] += 1
        else:
            yield Path(entry.path)


def _entries(folder: str, skipped: Counter[str]) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except OSError as error:
        skipped[f"folder that cannot be listed ({error.strerror})"] += 1
        return iter(())


def _reason(entry: os.DirEntry[str]) -> str | None:
    """Give the reason why an entry is no picture that can be read here; None where it is one."""
    try:
        if not entry.is_file():
            if entry.is_symlink():
                return "link to a folder" if entry.is_dir() else "dangling link"
            return "no file"  # a pipe, a socket, a device: opening one may wait for ever
        if os.path.splitext(entry.name)[1].lower() in ENDINGS:  # noqa: PTH122  a Path each is slow
            return None
        with open(entry.path, "rb", buffering=0) as file:  # noqa: PTH123
            kind = kind_of(file.read(HEADER))
    except OSError as error:
        return f"file that cannot be opened ({error.strerror})"
    return "no picture" if kind is None else unreadable(kind)


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Decoded pictures: ``pixels`` uint8 [b, h, w, c], and what was not decoded.

    ``broken`` says why of each picture that could not be; ``skipped`` is the folder's. ``turned``
    counts the pictures that their EXIF orientation turned; ``given`` those that the folder has.
    """

    pixels: NDArray[np.uint8]
    names: tuple[str, ...]
    broken: tuple[str, ...] = field(default=())
    skipped: Mapping[str, int] = field(default_factory=dict)
    turned: int = 0
    given: int = 0


def notes_on(broken: Sequence[str], skipped: Mapping[str, int], turned: int) -> tuple[str, ...]:
    """List pictures that could not be decoded, what was skipped, and what EXIF turned."""
    return (
        *(f"skipped: {reason}" for reason in broken),
        *([skips(skipped)] if skipped else []),
        *([f"pictures turned by their EXIF orientation: {turned}"] if turned else []),
    )


def load(folder: Path, preprocessing: Preprocessing, limit: int) -> ImageSet:
    return next(load_parts(folder, preprocessing, limit, limit))


def load_parts(
    folder: Path, preprocessing: Preprocessing, limit: int | None, part: int
) -> Iterator[ImageSet]:
    """Decode up to ``limit`` pictures (None: all) of a folder, ``part`` of them at a time.

    They are evenly spread over its sorted list. ``folder`` may be one picture, or a table of them.
    """
    found = find(folder)
    paths = found.paths if limit is None else spread(found.paths, limit)
    for start in range(0, len(paths), part):
        loaded = decode(folder, paths[start : start + part], preprocessing)
        skipped = found.skipped if start == 0 else {}  # the folder's, to be counted once
        yield replace(loaded, skipped=skipped, given=len(found.paths))


def load_named(folder: Path, names: Sequence[str], preprocessing: Preprocessing) -> ImageSet:
    """Decode the pictures of a folder that ``load_parts`` gave these names."""
    base = folder if folder.is_dir() else folder.parent
    return decode(folder, [base / name for name in names], preprocessing)


def decode(folder: Path, paths: Sequence[Path], preprocessing: Preprocessing) -> ImageSet:
    """Decode pictures of a folder, which may be one picture, or a table of pictures beside it.

    Raises:
        ImageError: none of them can be decoded.
    """
    found = Found((), folder if folder.is_dir() else folder.parent)
    pixels: list[NDArray[np.uint8]] = []
    names: list[str] = []
    broken: list[str] = []
    turned = 0
    for path in paths:
        try:
            fitted = read_file(path, str(path), preprocessing)
        except ImageError as error:
            broken.append(str(error))
            continue
        pixels.append(fitted.pixels)
        turned += fitted.turned
        names.append(found.name_of(path))
    if not pixels:
        raise ImageError(
            f"all {len(paths)} pictures of {folder} are broken; the first: {broken[0]}"
        )
    return ImageSet(np.stack(pixels), tuple(names), tuple(broken), turned=turned)


def spread(paths: Sequence[Path], limit: int) -> list[Path]:
    """Choose at most ``limit`` paths, evenly spread, the first one always among them."""
    if len(paths) <= limit:
        return list(paths)
    return [paths[i * len(paths) // limit] for i in range(limit)]
