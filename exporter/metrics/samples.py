"""The pictures a check runs on, and the batch sizes it runs them at."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export import image_folder, images
from msn_export.errors import ImageError, SpecError
from msn_export.preprocessing import Preprocessing
from msn_export.spec import BatchRange, InputFormat

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray


PART = 256  # pictures of a large set that are in memory at once, with what models make of them
LIMIT = 16  # pictures a check decodes at most: its cost must stay near that of the export


@dataclass(frozen=True, slots=True)
class Sample:
    """Decoded pictures [count, h, w, c] uint8, with how a model wants them.

    ``max_batch`` is how many of them the memory of this machine affords a model at once.
    ``broken``, ``skipped`` and ``turned`` are those of ``image_folder.ImageSet``; ``given`` is how
    many pictures there were to choose from.
    """

    pixels: NDArray[np.uint8]
    names: tuple[str, ...]
    source: str
    preprocessing: Preprocessing
    broken: tuple[str, ...] = ()
    max_batch: int = 8
    skipped: Mapping[str, int] = field(default_factory=dict)
    turned: int = 0
    given: int = 0

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def notes(self) -> tuple[str, ...]:
        """What users must know of the pictures and of how they were made."""
        counted = image_folder.notes_on(self.broken, self.skipped, self.turned)
        return (*self.preprocessing.notes, *counted)

    def feed(self, indices: Sequence[int], input_format: InputFormat) -> NDArray[Any]:
        """Make a batch for a graph that takes ``input_format``; indices past the end start over."""
        chosen: NDArray[np.uint8] = self.pixels[np.asarray(indices) % len(self)]
        return images.model_input(chosen, self.preprocessing, input_format)


def draw(
    folder: Path | None, preprocessing: Preprocessing, *, max_batch: int = 8, limit: int = LIMIT
) -> Sample:
    """Decode up to ``limit`` pictures of a folder; without one, seeded noise, named as such."""
    (sample,) = draw_parts(folder, preprocessing, max_batch=max_batch, limit=limit, part=limit)
    return sample


def draw_parts(
    folder: Path | None,
    preprocessing: Preprocessing,
    *,
    max_batch: int = 8,
    limit: int | None = LIMIT,
    part: int = PART,
) -> Iterator[Sample]:
    """Decode up to ``limit`` pictures of a folder (None: all), ``part`` of them at a time."""
    if folder is None:
        pixels = images.noise(preprocessing, 4)
        names = tuple(f"noise {i}" for i in range(len(pixels)))
        source = "seeded noise (no --images given)"
        yield Sample(pixels, names, source, preprocessing, max_batch=max_batch)
        return
    for loaded in image_folder.load_parts(folder, preprocessing, limit, part):
        yield Sample(
            loaded.pixels, loaded.names, str(folder), preprocessing, loaded.broken, max_batch,
            loaded.skipped, loaded.turned, loaded.given,
        )  # fmt: skip


def require_different(sample: Sample) -> Sample:
    """Require pictures that differ: on others a model that ignores its image would pass."""
    if len(sample) < 2:
        raise ImageError(
            f"{sample.source} gives 1 picture; a check needs at least 2 different ones, or a model "
            "that ignores its image would pass"
        )
    if all(np.array_equal(sample.pixels[0], other) for other in sample.pixels[1:]):
        raise ImageError(
            f"all {len(sample)} pictures of {sample.source} are alike once they are resized; a "
            "check needs at least 2 different ones, or a model that ignores its image would pass"
        )
    return sample


def batch_sizes(batch: BatchRange, max_batch: int) -> tuple[int, ...]:
    """Choose the smallest size, the largest that memory affords, and one between."""
    if batch.min > 3 * max_batch:
        raise SpecError(
            f"batch {batch}: memory affords a check of about {3 * max_batch} images at once; "
            "choose a smaller batch, or a machine with more memory"
        )
    largest = max(batch.min, min(batch.max, max_batch))
    between = min(batch.opt, largest)
    if between in {batch.min, largest}:
        between = (batch.min + largest) // 2
    return tuple(sorted({batch.min, between, largest}))


def with_drawn(sizes: Sequence[int], seed: int, count: int = 2) -> tuple[tuple[int, ...], str]:
    """Add batch sizes drawn between the smallest and the largest: a graph may be right at others.

    Returns:
        The sizes in order, and a note that names the drawn ones; empty where there are none.
    """
    between = [size for size in range(min(sizes) + 1, max(sizes)) if size not in sizes]
    chosen = sorted(random.Random(seed).sample(between, min(count, len(between))))  # noqa: S311
    if not chosen:
        return tuple(sizes), ""
    named = " and ".join(map(str, chosen))
    return tuple(sorted({*sizes, *chosen})), f"batch {named} drawn by seed {seed}"


def with_ragged(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Add the size of the last batch of a data set, which is rarely a full one.

    A graph of one size takes full batches only: its sizes stay as they are.
    """
    least, largest = min(sizes), max(sizes)
    if least == largest:
        return tuple(sizes)
    ragged = count % largest
    if not least < ragged < largest:  # all full: any size between that is not tried yet
        ragged = (least + largest) // 2 + 1
    return tuple(sorted({*sizes, min(ragged, largest - 1)}))


def batches(sizes: Sequence[int], count: int) -> Iterator[list[int]]:
    """Deal ``count`` images into batches of ``sizes``, each image at least once.

    One batch of each size, then as many of the largest as it takes; a batch larger than what is
    left starts over with the first image.
    """
    start = 0
    for size in sizes:
        yield list(range(start, start + size))
        start += size
    while start < count:
        yield list(range(start, start + sizes[-1]))
        start += sizes[-1]


def max_batch_in_memory(tokens: int, dim: int, mlp_dim: int, heads: int) -> int:
    """Estimate how many images fit in a quarter of the memory that is free now.

    onnxruntime's CPU attention holds the scores and the probabilities, [h, n, n] fp32 each; the
    rest of a block peaks at two MLP activations and a few of the residual stream. A quarter,
    because fp16 graphs hold their casts too, and an allocator keeps what it once took.
    """
    each = 4 * (2 * heads * tokens * tokens + tokens * (2 * mlp_dim + 8 * dim))
    return max(1, available_memory() // 4 // each)


def available_memory() -> int:
    """Bytes that can be had without swapping: the system's, or what a container may still take."""
    return min((_of_system(), *_of_cgroup()))


def _of_system() -> int:
    """MemAvailable of proc(5), else free pages."""
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Limit, use, and in memory.stat what the kernel gives back under pressure: version 2, version 1
# (docs.kernel.org, admin-guide, cgroup-v2 and cgroup-v1/memory). A container sees its own here.
_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def _of_cgroup() -> Iterator[int]:
    """The system's figures are those of the whole machine, even in a container with a limit."""
    for folder, limit, used, cached in _CGROUPS:
        most, now = (_number(_lines(Path(folder, name))) for name in (limit, used))
        if most is None or now is None:
            continue
        counted = (line.partition(" ") for line in _lines(Path(folder, "memory.stat")))
        back = next((number for name, _, number in counted if name == cached), "0")
        yield max(0, most - now + int(back))


def _number(lines: list[str]) -> int | None:
    """Read a file of one number; ``max`` means that there is no limit."""
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:  # another system, another kernel, no right to see it
        return []
