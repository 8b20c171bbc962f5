"""Rows of an output in memory: what a batch gave, and batches joined."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

BEST = np.dtype([("class", "<i4"), ("score", "<f4")])


@dataclass(frozen=True, slots=True)
class Rows:
    """What one batch gave.

    ``vectors`` is float32 [k, ...], NaN where ``errors`` (by position) says why; ``best`` is the
    best class of each and its score, [k] of ``BEST``, where the model has a classifier. ``turned``
    counts the pictures that their EXIF orientation turned.
    """

    vectors: NDArray[np.float32]
    best: NDArray[Any] | None = None
    errors: Mapping[int, str] = field(default_factory=dict)
    turned: int = 0


def joined(batches: Iterable[tuple[int, Rows]]) -> Iterator[tuple[int, Rows]]:
    """Join batches that follow each other: each one written is a wait for the disk."""
    ordered = sorted(batches, key=lambda batch: batch[0])
    run: list[Rows] = []
    begin = end = 0
    for start, rows in ordered:
        if run and start != end:
            yield begin, _concatenated(run)
            run = []
        if not run:
            begin = end = start
        run.append(rows)
        end += len(rows.vectors)
    yield begin, _concatenated(run)


def _concatenated(batches: list[Rows]) -> Rows:
    errors: dict[int, str] = {}
    row = 0
    for rows in batches:
        errors |= {row + index: text for index, text in rows.errors.items()}
        row += len(rows.vectors)
    bests = [rows.best for rows in batches if rows.best is not None]
    best = np.concatenate(bests) if bests else None
    vectors = np.concatenate([rows.vectors for rows in batches])
    return Rows(vectors, best, errors, sum(rows.turned for rows in batches))
