"""Measure how well an artifact's outputs agree with its reference's, image by image.

Nothing here decides: a verdict is ``msn_export.check.gate``'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.errors import ToleranceError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of one output over ``images`` images; each image is one vector, flattened.

    ``max_abs`` and ``mean_abs`` are absolute differences; ``reference_rms`` is the root mean
    square of the reference, the scale they are to be read against. ``relative`` is the root mean
    square of the differences over that of the reference. The norm ratio is the candidate's over
    the reference's. NaN in either side shows in every figure it touches.

    None where it was not measured: ``rounding``, ``relative`` as a multiple of the reference's own
    rounding error; ``neighbours`` and ``classes``, the shares of images whose nearest neighbour
    and whose class are the reference's.
    """

    images: int
    max_abs: float
    mean_abs: float
    cosine_min: float
    cosine_p1: float
    cosine_median: float
    norm_ratio_min: float
    norm_ratio_max: float
    reference_rms: float
    relative: float
    nan: int
    inf: int
    rounding: float | None = None
    neighbours: float | None = None
    classes: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the figures by name."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Comparison:
    """Gathers the figures of one output, batch after batch; memory grows by six floats an image."""

    cosines: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    worst: list[float] = field(default_factory=list)
    _abs_sum: float = 0.0
    _error_sum: float = 0.0
    _square_sum: float = 0.0
    _size: int = 0
    _nan: int = 0
    _inf: int = 0

    def add(self, reference: NDArray[Any], candidate: NDArray[Any]) -> None:
        """Compare a batch [b, ...] with its reference.

        Raises:
            ToleranceError: the shapes differ; nothing is broadcast.
        """
        if reference.shape != candidate.shape:
            raise ToleranceError(
                f"output has shape {list(candidate.shape)} and its reference "
                f"{list(reference.shape)}; they must be the same"
            )
        want = reference.reshape(len(reference), -1).astype(np.float64)
        have = candidate.reshape(len(candidate), -1).astype(np.float64)
        # of either side: a finite value where the reference is infinite is infinitely wrong, and
        # a gate on max_abs alone would allow it, for infinity scales what is allowed
        self._nan += int((np.isnan(have) | np.isnan(want)).sum())
        self._inf += int((np.isinf(have) | np.isinf(want)).sum())
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            difference = np.abs(want - have)
            want_norm, have_norm = np.linalg.norm(want, axis=1), np.linalg.norm(have, axis=1)
            self.cosines += ((want * have).sum(axis=1) / (want_norm * have_norm)).tolist()
            self.ratios += (have_norm / want_norm).tolist()
            self.worst += difference.max(axis=1).tolist()
            self._abs_sum += float(difference.sum())
            self._error_sum += float((difference * difference).sum())
            self._square_sum += float((want * want).sum())
        self._size += want.size

    def agreement(self) -> Agreement:
        """Sum up what was added.

        Raises:
            ToleranceError: nothing was added; an empty set agrees with nothing.
        """
        if not self.cosines:
            raise ToleranceError("no image was compared; an empty set is not a pass")
        cosines, ratios = np.asarray(self.cosines), np.asarray(self.ratios)
        # numpy's max keeps NaN; Python's max(0.0, nan) is 0.0
        return Agreement(
            images=len(self.cosines),
            max_abs=float(np.max(self.worst)),
            mean_abs=self._abs_sum / self._size,
            cosine_min=float(np.min(cosines)),
            cosine_p1=float(np.percentile(cosines, 1)),
            cosine_median=float(np.median(cosines)),
            norm_ratio_min=float(np.min(ratios)),
            norm_ratio_max=float(np.max(ratios)),
            reference_rms=float(np.sqrt(self._square_sum / self._size)),
            relative=_ratio(self._error_sum, self._square_sum),
            nan=self._nan,
            inf=self._inf,
        )


def _ratio(error: float, square: float) -> float:
    """Relate two sums of squares; nothing is small beside a reference of zeros."""
    return math.sqrt(error / square) if square > 0 else math.nan


def worst_of(agreements: list[Agreement]) -> Agreement:
    """Combine several outputs into the figures that none of them is worse than."""
    if not agreements:
        raise ToleranceError("no output was compared; an empty set is not a pass")

    def column(name: str) -> NDArray[np.float64]:
        return np.asarray([getattr(agreement, name) for agreement in agreements], np.float64)

    def measured(name: str) -> NDArray[np.float64] | None:
        found = [getattr(agreement, name) for agreement in agreements]
        found = [figure for figure in found if figure is not None]
        return np.asarray(found, np.float64) if found else None

    rounding, neighbours, classes = map(measured, ("rounding", "neighbours", "classes"))

    return Agreement(
        images=int(column("images").min()),
        max_abs=float(column("max_abs").max()),
        mean_abs=float(column("mean_abs").max()),
        cosine_min=float(column("cosine_min").min()),
        cosine_p1=float(column("cosine_p1").min()),
        cosine_median=float(column("cosine_median").min()),
        norm_ratio_min=float(column("norm_ratio_min").min()),
        norm_ratio_max=float(column("norm_ratio_max").max()),
        reference_rms=float(column("reference_rms").min()),
        relative=float(column("relative").max()),
        nan=int(column("nan").sum()),
        inf=int(column("inf").sum()),
        rounding=None if rounding is None else float(rounding.max()),
        neighbours=None if neighbours is None else float(neighbours.min()),
        classes=None if classes is None else float(classes.min()),
    )
