"""From all values of a tensor, a few at a time, to the range that 8 bits are spread over.

A histogram of absolute values keeps what every observer needs in 32 KiB, however many images.
onnxruntime's calibrators keep each batch's tensors until all were run, gigabytes for a ViT; and
they choose bin edges by the first batch, so that their ranges depend on the order of images.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from msn_export.calibration.qdq import INT8, Format
from msn_export.errors import SpecError
from msn_export.spec import Observer

BINS = 4096
# The share of values inside the range: pytorch-quantization's and TensorRT's examples use 99.99.
PERCENTILE = 99.99
# Where the histogram's upper edge starts: BINS / limit must be a float32 too.
_FIRST_LIMIT = 2.0**-100


@dataclass(slots=True)
class Histogram:
    """Counts of |x| in ``BINS`` equal bins from 0 to ``limit``, a power of two.

    A larger value doubles the limit and joins bins in pairs. Bin widths are powers of two, so the
    joined counts are what one pass with the final limit would have given: the result depends
    neither on the order of the values nor on how they were dealt into batches.
    """

    peak: float = 0.0
    limit: float = _FIRST_LIMIT
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: NDArray[np.float32]) -> None:
        """Count finite values of any shape."""
        magnitudes = np.abs(values).ravel()
        if not magnitudes.size:
            return
        peak = float(magnitudes.max())
        self._grow(peak)
        self.peak = max(self.peak, peak)
        # a product with a power of two is exact: the last bin ends just below the limit
        bins = (magnitudes * np.float32(BINS / self.limit)).astype(np.int32)
        self.counts += np.bincount(bins, minlength=BINS)

    def _grow(self, peak: float) -> None:
        doublings = 0
        while peak >= self.limit:
            self.limit *= 2
            doublings += 1
        if doublings and self.counts.any():
            joined = np.zeros(BINS, np.int64)
            np.add.at(joined, np.arange(BINS) >> min(doublings, 31), self.counts)
            self.counts = joined

    @property
    def width(self) -> float:
        """The width of a bin."""
        return self.limit / BINS


def threshold(histogram: Histogram, observer: Observer, form: Format) -> float:
    """Choose the largest absolute value that is still represented."""
    if not histogram.peak > 0:
        return 0.0
    return min(_CHOOSERS[observer](histogram, form), histogram.peak)


def require_meaning(observer: Observer, form: Format) -> None:
    """Refuse an observer that a format has no use for."""
    if observer is Observer.ENTROPY and form is not INT8:
        raise SpecError(
            f"observer entropy compares with int8's even steps, which {form.dtype} does not have; "
            "use max, percentile or mse"
        )


def _maximum(histogram: Histogram, _form: Format) -> float:
    return histogram.peak


def _percentile(histogram: Histogram, _form: Format) -> float:
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    return float(histogram.width * (1 + np.searchsorted(share, PERCENTILE / 100)))


def _mse(histogram: Histogram, form: Format) -> float:
    """Minimise the mean squared error of quantising, each bin's values taken at its centre.

    A centre errs in place of its bin by width² / 12 at most, which is nothing against a step of
    several bins; where the steps are narrower than a bin their own step² / 12 is the error.
    """
    centres = ((np.arange(BINS) + 0.5) * histogram.width).astype(np.float32)
    held = histogram.counts > 0
    centres, weights = centres[held], histogram.counts[held].astype(np.float64)
    # 256 candidates a factor of 2**(1/32) apart: from the peak down to a 256th of it
    candidates = histogram.peak * 2.0 ** (-np.arange(257) / 32)
    errors = []
    for candidate in candidates:
        step = candidate / form.largest
        moved = np.square(centres - form.carry(centres, step), dtype=np.float64)
        inside = centres <= candidate
        moved[inside] = np.maximum(moved[inside], _floor(centres[inside], step, histogram, form))
        errors.append(float(weights @ moved))
    return float(candidates[int(np.argmin(errors))])


def _floor(
    centres: NDArray[np.float32], step: float, histogram: Histogram, form: Format
) -> NDArray[np.float64]:
    """The error inside a bin that its centre cannot show: none where bins resolve the steps."""
    if form is not INT8 or step > 2 * histogram.width:
        return np.zeros(len(centres))
    return np.full(len(centres), step * step / 12)


def _entropy(histogram: Histogram, form: Format) -> float:
    """Minimise the divergence (Kullback and Leibler) of the quantised from the whole distribution.

    S. Migacz, "8-bit inference with TensorRT", GTC 2017, slides 33 to 40. The same search is in
    onnxruntime's HistogramCollector.get_entropy_threshold, which sums numpy scalars in Python
    (minutes for a ViT's 48 tensors) and cuts the expanded counts to whole numbers.
    """
    levels = int(form.largest) + 1
    counts = histogram.counts.astype(np.float64)
    above = counts[::-1].cumsum()[::-1]
    last = int(np.flatnonzero(histogram.counts)[-1]) + 1
    if last <= levels:
        return histogram.peak
    ends = np.unique([*range(levels, last, 8), last])
    divergences = []
    for end in ends:
        inside = counts[:end]
        reference = inside.copy()
        reference[-1] += above[end] if end < BINS else 0.0
        level = np.minimum(np.arange(end) // (end // levels), levels - 1)
        present = inside > 0
        each = np.bincount(level, inside, levels) / np.maximum(
            np.bincount(level, present, levels), 1
        )
        divergences.append(_divergence(reference, np.where(present, each[level], 0.0)))
    return float(ends[int(np.argmin(divergences))]) * histogram.width


def _divergence(reference: NDArray[np.float64], candidate: NDArray[np.float64]) -> float:
    """Compute KL(reference || candidate); counts only the reference has weigh as one count.

    A range with no value inside says nothing of the distribution: it is infinitely far.
    """
    if not candidate.any():
        return np.inf
    p = reference / reference.sum()
    q = np.where((reference > 0) & (candidate <= 0), 1.0, candidate)
    q = q / q.sum()
    held = p > 0
    return float((p[held] * np.log(p[held] / q[held])).sum())


_CHOOSERS: dict[Observer, Callable[[Histogram, Format], float]] = {
    Observer.MAX: _maximum,
    Observer.PERCENTILE: _percentile,
    Observer.ENTROPY: _entropy,
    Observer.MSE: _mse,
}
