"""Images as they are given, checked, and cut into batches that an artifact accepts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import InputError
from msn_export.runtime.dtypes import OF_NUMPY, OF_ONNX, TensorType
from msn_export.spec import BatchRange, TensorSpec


def require_fit(shape: Sequence[int], element: TensorType, spec: TensorSpec) -> None:
    """Require a batch's dtype and shape to be the artifact's.

    The number of images is free, and so is a size that a graph of another tool leaves open.

    Raises:
        InputError: they are not.
    """
    wanted = OF_ONNX[spec.dtype]
    if element is not wanted:
        raise InputError(
            f"images are {element}; input {spec.name!r} takes {wanted}{_remedy(element, wanted)}"
        )
    sizes = zip(shape[1:], spec.shape[1:], strict=False)
    fits = all(isinstance(wants, str) or size == wants for size, wants in sizes)
    if not fits or len(shape) != len(spec.shape):
        expected = ", ".join(str(size) for size in ("b", *spec.shape[1:]))
        hint = "; give one image as images[None]" if tuple(shape) == spec.shape[1:] else ""
        raise InputError(
            f"images have shape {list(shape)}; input {spec.name!r} takes [{expected}]{hint}"
        )


def element_of(array: NDArray[Any]) -> TensorType:
    """Find the dtype of a NumPy array.

    Raises:
        InputError: no artifact takes it.
    """
    element = OF_NUMPY.get(array.dtype)
    if element is None:
        raise InputError(f"images are {array.dtype}; expected a plain float, integer or bool")
    return element


def pad(images: NDArray[Any], size: int) -> NDArray[Any]:
    """Fill a batch up to ``size`` with zeros."""
    if len(images) == size:
        return images
    padded = np.zeros((size, *images.shape[1:]), images.dtype)
    padded[: len(images)] = images
    return padded


def _remedy(element: TensorType, wanted: TensorType) -> str:
    if wanted.numpy is None:
        return "; NumPy has no bfloat16, give a torch tensor"
    if element.numpy == "uint8":
        return "; runner.preprocess() gives what it takes, normalised"
    return ""


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
    accepts it, the one whose smallest batch is the least too large.

    Args:
        count: number of images.
        profiles: the batches accepted.
        profile: the only profile to use.

    Raises:
        InputError: there is no image, or no such profile.
    """
    if count < 1:
        raise InputError("there is no image in the batch; give at least one")
    if profile is not None and not 0 <= profile < len(profiles):
        raise InputError(f"profile {profile} does not exist; there are {len(profiles)}, from 0 on")
    usable = range(len(profiles)) if profile is None else (profile,)
    most = max(profiles[index].max for index in usable)
    pieces = []
    for start in range(0, count, most):
        left = min(most, count - start)
        index = min(usable, key=lambda index: _misfit(left, profiles[index]))
        pieces.append(Chunk(start, left, max(left, profiles[index].min), index))
    return tuple(pieces)


def _misfit(size: int, profile: BatchRange) -> tuple[bool, int, int]:
    """Order profiles for a run of ``size``, the best first."""
    if size > profile.max:
        return True, 1 << 30, 0
    padding = max(0, profile.min - size)
    return padding > 0, padding, abs(size - profile.opt)


def combine(profiles: Sequence[BatchRange]) -> BatchRange:
    """Give the smallest and the largest batch that any profile accepts."""
    return BatchRange(
        min(profile.min for profile in profiles),
        profiles[0].opt,
        max(profile.max for profile in profiles),
    )
