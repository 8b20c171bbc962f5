"""Cut any number of images into batches that an artifact accepts."""

from collections.abc import Sequence
from dataclasses import dataclass

from msn_export.errors import InputError
from msn_export.spec import BatchRange


@dataclass(frozen=True, slots=True)
class Piece:
    """One run: ``count`` images from ``start`` on, padded to a batch of ``size``."""

    start: int
    count: int
    size: int
    profile: int


def deal(
    count: int, profiles: Sequence[BatchRange], profile: int | None = None
) -> tuple[Piece, ...]:
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
        pieces.append(Piece(start, left, max(left, profiles[index].min), index))
    return tuple(pieces)


def _misfit(size: int, profile: BatchRange) -> tuple[bool, int, int]:
    """Order profiles for a run of ``size``, the best first."""
    if size > profile.max:
        return True, 1 << 30, 0
    padding = max(0, profile.min - size)
    return padding > 0, padding, abs(size - profile.opt)


def together(profiles: Sequence[BatchRange]) -> BatchRange:
    """Give the smallest and the largest batch that any profile accepts."""
    return BatchRange(
        min(profile.min for profile in profiles),
        profiles[0].opt,
        max(profile.max for profile in profiles),
    )
