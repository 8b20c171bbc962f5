"""Batches that an artifact accepts, and how any number of images is cut into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import InputError
from msn_export.manifest import Manifest
from msn_export.spec import BatchRange, TensorSpec

# A graph with a dynamic batch takes any; one larger than this is no single batch of images.
_ANY = BatchRange(1, 8, 65536)


def profiles_of(spec: TensorSpec, manifest: Manifest | None) -> tuple[BatchRange, ...]:
    """Batches a graph accepts: its own where fixed, else any up to the manifest's."""
    size = spec.shape[0]
    if isinstance(size, int):
        return (BatchRange(size, size, size),)
    if manifest is None or not manifest.profiles:
        return (_ANY,)
    batch = combine(manifest.profiles)
    return (BatchRange(1, batch.opt, batch.max),)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One run: ``count`` images from ``start`` on, padded to a batch of ``size``."""

    start: int
    count: int
    size: int
    profile: int


def split_batch(
    count: int, profiles: Sequence[BatchRange], profile: int | None = None
) -> tuple[Chunk, ...]:
    """Cut ``count`` images into runs: above the largest batch split, below the smallest padded.

    Each run takes the profile that accepts its size and was tuned nearest to it; where none
    accepts it, the one whose smallest batch is the least too large. ``profile`` is the index of the
    only one to use.
    """
    if count < 1:
        raise InputError("there is no image in the batch; give at least one")
    numbers = range(len(profiles))
    if profile is not None and profile not in numbers:
        raise InputError(
            f"profile {profile!r} does not exist; there are {len(profiles)}, from 0 on"
        )
    usable = numbers if profile is None else (int(profile),)
    most = max(profiles[index].max for index in usable)
    chunks = []
    for start in range(0, count, most):
        left = min(most, count - start)
        index = min(usable, key=lambda index: _misfit(left, profiles[index]))
        chunks.append(Chunk(start, left, max(left, profiles[index].min), index))
    return tuple(chunks)


def _misfit(size: int, profile: BatchRange) -> tuple[bool, int, int]:
    """Order profiles for a run of ``size``, the best first."""
    if size > profile.max:
        return True, 1 << 30, 0
    padding = max(0, profile.min - size)
    return padding > 0, padding, abs(size - profile.opt)


def combine(profiles: Sequence[BatchRange]) -> BatchRange:
    return BatchRange(
        min(profile.min for profile in profiles),
        profiles[0].opt,
        max(profile.max for profile in profiles),
    )


def run_in_chunks(
    images: NDArray[Any],
    profiles: Sequence[BatchRange],
    run: Callable[[NDArray[Any]], list[NDArray[Any]]],
) -> list[NDArray[Any]]:
    """Run any number of images in batches that are accepted, and give each output whole."""
    chunks = split_batch(len(images), profiles)
    if len(chunks) == 1 and chunks[0].size == len(images):
        return run(images)
    runs = [run(pad(images[p.start : p.start + p.count], p.size)) for p in chunks]
    return [
        np.concatenate([part[: chunk.count] for part, chunk in zip(parts, chunks, strict=True)])
        for parts in zip(*runs, strict=True)
    ]


def pad(images: NDArray[Any], size: int) -> NDArray[Any]:
    if len(images) == size:
        return images
    padded = np.zeros((size, *images.shape[1:]), images.dtype)
    padded[: len(images)] = images
    return padded
