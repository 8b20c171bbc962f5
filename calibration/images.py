"""Images to calibrate on and images that are held out, decoded a few at a time."""

import hashlib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msn_export import image_folder, images
from msn_export.errors import ImageError
from msn_export.image_folder import Found, ImageSet
from msn_export.preprocessing import Preprocessing
from msn_export.spec import InputFormat

# One image in four is held out, 64 at most: each is run through three graphs.
HELD_OUT_SHARE, HELD_OUT_MOST = 4, 64
# Below this a range says little: the report warns.
FEW = 32

Decoded = tuple[NDArray[np.uint8], tuple[str, ...]]  # pixels [b, h, w, c], and their names


def hash_of(pixels: NDArray[np.uint8]) -> str:
    """Hash one decoded image, 16 hexadecimal digits."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


@dataclass(slots=True)
class Pictures:
    """Paths in the order they are used.

    ``seen``, ``broken`` and ``turned`` (by their EXIF orientation) fill while they are decoded.
    ``skipped`` counts by reason the folder's other entries. ``withheld`` are hashes of images that
    are passed over: copies of those that are held out.
    """

    paths: list[Path]
    preprocessing: Preprocessing
    input_format: InputFormat
    limit: int
    withheld: frozenset[str] = frozenset()
    seen: dict[Path, str] = field(default_factory=dict)
    broken: dict[Path, str] = field(default_factory=dict)
    turned: set[Path] = field(default_factory=set)
    skipped: Mapping[str, int] = field(default_factory=dict)

    def decode(self, batch: int) -> Iterator[Decoded]:
        """Decode up to ``limit`` readable images in batches: pixels [b, h, w, c], names."""
        pixels: list[NDArray[np.uint8]] = []
        names: list[str] = []
        count = 0
        for path in self.paths:
            if count == self.limit:
                break
            try:
                decoded, turned, _ = images.read_file(path, str(path), self.preprocessing)
            except ImageError as error:
                self.broken[path] = str(error)
                continue
            digest = hash_of(decoded)
            if digest in self.withheld:
                continue
            if turned:
                self.turned.add(path)
            count += 1
            self.seen[path] = digest
            pixels.append(decoded)
            names.append(path.name)
            if len(pixels) == batch:
                yield np.stack(pixels), tuple(names)
                pixels, names = [], []
        if pixels:
            yield np.stack(pixels), tuple(names)

    def batches(
        self, batch: int, decoded: Iterable[Decoded] | None = None
    ) -> Iterator[tuple[NDArray[Any], Sequence[str]]]:
        """Make the graph's input, up to ``batch`` pictures, of all or of those ``decoded``."""
        for pixels, names in self.decode(batch) if decoded is None else decoded:
            for at in range(0, len(names), batch):
                few, labels = pixels[at : at + batch], names[at : at + batch]
                yield images.model_input(few, self.preprocessing, self.input_format), labels

    def first(self, count: int) -> "Pictures":
        limit = min(count, self.limit)
        return Pictures(self.paths, self.preprocessing, self.input_format, limit, self.withheld)


@dataclass(frozen=True, slots=True)
class Split:
    calibration: Pictures
    held_out: ImageSet


def split(
    folder: Path,
    preprocessing: Preprocessing,
    input_format: InputFormat,
    *,
    limit: int,
    seed: int,
    taken: Container[str] = (),
) -> Split:
    """Split the pictures of a folder, shuffled by ``seed``, into held-out and calibration images.

    ``limit`` bounds the calibration images. ``taken`` are hashes of images that were calibrated on
    before: none of them is held out.
    """
    found = image_folder.find(folder)
    order = [found.paths[i] for i in np.random.default_rng(seed).permutation(len(found.paths))]
    pictures = Pictures([], preprocessing, input_format, limit, skipped=found.skipped)
    held_out = _hold_out(pictures, order, found, taken)
    if len(pictures.broken) == len(order):
        first = next(iter(pictures.broken.values()))
        raise ImageError(f"all {len(order)} pictures of {folder} are broken; the first: {first}")
    if not held_out:
        raise ImageError(
            f"every picture of {folder} was calibrated on before, by --ranges; give others to "
            "judge the result by"
        )
    pictures.withheld = frozenset(map(hash_of, held_out.values()))
    if not any(True for _ in pictures.first(1).decode(1)):
        raise ImageError(
            f"{folder} has too few readable pictures; expected two or more that differ, to "
            "calibrate on one and judge by another"
        )
    return Split(pictures, ImageSet(np.stack(list(held_out.values())), tuple(held_out), ()))


def _hold_out(
    pictures: Pictures, order: Sequence[Path], found: Found, taken: Container[str]
) -> dict[str, NDArray[np.uint8]]:
    """Decode pictures, by name, until enough are held out; the others are left to ``pictures``."""
    wanted = min(HELD_OUT_MOST, max(1, len(order) // HELD_OUT_SHARE))
    held_out: dict[str, NDArray[np.uint8]] = {}
    hashes, rest = set(), list(order)
    while rest and len(held_out) < wanted:
        path = rest.pop(0)
        try:
            decoded, turned, _ = images.read_file(path, str(path), pictures.preprocessing)
        except ImageError as error:
            pictures.broken[path] = str(error)
            continue
        digest = hash_of(decoded)
        if digest in taken:
            pictures.paths.append(path)
        elif digest not in hashes:
            hashes.add(digest)
            if turned:
                pictures.turned.add(path)
            held_out[found.name_of(path)] = decoded
    pictures.paths += rest
    return held_out
