"""Ranges of a graph's tensors: histograms over images, and what 8 bits are spread over.

A histogram of absolute values keeps what every observer needs in 32 KiB, however many images.
onnxruntime's calibrators keep each batch's tensors until all were run, gigabytes for a ViT; and
they choose bin edges by the first batch, so that their ranges depend on the order of images.

A file of ranges holds histograms and not thresholds, so that another observer or format needs no
new pass over the images. It holds the smoothing too: the ranges are those of the smoothed graph.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export import __version__
from msn_export.calibration.qdq import INT8, Format
from msn_export.calibration.smoothquant import LARGEST_EXPONENT
from msn_export.errors import GraphError, ManifestError, SpecError
from msn_export.graph import io
from msn_export.graph.builder import sizes_of
from msn_export.graph.precision import add_maxima
from msn_export.input_files import RANGES, read_json
from msn_export.preprocessing import Preprocessing
from msn_export.schema import from_plain, to_plain
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
    neither on the order of the values nor on the batches they came in.
    """

    peak: float = 0.0
    limit: float = _FIRST_LIMIT
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, values: NDArray[np.float32]) -> None:
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
        return self.limit / BINS


def threshold(histogram: Histogram, observer: Observer, form: Format) -> float:
    if not histogram.peak > 0:
        return 0.0
    return min(_CHOOSERS[observer](histogram, form), histogram.peak)


def require_meaning(observer: Observer, form: Format) -> None:
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
    held = histogram.counts > 0
    centres = ((np.arange(BINS) + 0.5) * histogram.width)[held]
    weights = histogram.counts[held].astype(np.float64)
    # 256 candidates a factor of 2**(1/32) apart: from the peak down to a 256th of it
    candidates = histogram.peak * 2.0 ** (-np.arange(257) / 32)  # [k]
    steps = (candidates / form.largest).astype(np.float32).astype(np.float64)[:, None]
    values = steps * form.levels  # [k, levels]
    # the bins between two midpoints go to one level: sums of w, w c and w c² give their error
    ends = np.searchsorted(centres, (values[:, 1:] + values[:, :-1]) / 2)
    ends = np.pad(ends, ((0, 0), (1, 1)), constant_values=((0, 0), (0, len(centres))))
    count, first, second = (
        np.diff(np.concatenate([[0.0], np.cumsum(weights * centres**power)])[ends])
        for power in (0, 1, 2)
    )
    errors = (second - 2 * values * first + values**2 * count).sum(axis=1)
    if form is INT8:
        errors += _unseen(centres, weights, candidates[:, None], steps, histogram.width)
    return float(candidates[int(np.argmin(errors))])


def _unseen(
    centres: NDArray[Any],
    weights: NDArray[Any],
    candidates: NDArray[Any],
    steps: NDArray[Any],
    width: float,
) -> NDArray[np.float64]:
    """Sum the errors inside bins that their centres cannot show: 0 where bins resolve the steps."""
    errors = np.zeros(len(steps))
    fine = steps[:, 0] <= 2 * width
    few = centres <= np.max(candidates[fine], initial=0.0)
    at, steps = centres[few], steps[fine]
    shown = np.square(at - np.rint(at / steps) * steps)
    missing = np.maximum(np.square(steps) / 12 - shown, 0.0) * (at <= candidates[fine])
    errors[fine] = missing @ weights[few]
    return errors


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
    """Compute KL(reference || candidate); counts only the reference has count as 1.

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


Seen = Mapping[str, NDArray[np.float32]]

# What the watched tensors of one batch may take, in bytes. Not a share of the free memory: the
# same images must come in the same batches each time, for byte-identical ranges.
_BATCH_BYTES = 256 * 2**20
_FLOAT = ir.DataType.FLOAT


class Watch:
    """A session over a copy of ``model``, an fp32 graph, whose outputs are the values ``names``.

    With ``maxima`` it keeps in that the largest absolute value of each float of the graph, by
    name, over all that was run.
    """

    def __init__(
        self, model: ir.Model, names: Sequence[str], stage: Path, *, maxima: bool = False
    ) -> None:
        copy = model.clone()
        self.names = tuple(dict.fromkeys(names))
        values = {value.name: value for node in copy.graph for value in node.outputs}
        values |= {value.name: value for value in copy.graph.inputs}
        seen = [values[name] for name in self.names]
        self.maxima = dict.fromkeys(add_maxima(copy) if maxima else (), 0.0)
        if maxima:
            seen.append(copy.graph[-1].outputs[0])
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(seen)
        RemoveUnusedNodesPass()(copy)
        self._fixed = next(iter(sizes_of(copy.graph.inputs[0])), None)
        self.batch = self._fixed or _affordable(copy)
        with TemporaryDirectory(dir=stage) as own:
            path = Path(own) / "watched.onnx"
            io.save(copy, path)
            self._session = _session(path)
        self._input = self._session.get_inputs()[0].name

    def __call__(self, images: NDArray[Any]) -> Seen:
        count = len(images)
        if self._fixed:
            images = images[np.arange(self._fixed) % count]
        outputs = self._session.run(None, {self._input: images})
        if self.maxima:
            peaks = np.maximum(list(self.maxima.values()), outputs.pop())
            self.maxima = dict(zip(self.maxima, peaks.tolist(), strict=True))
        return {name: values[:count] for name, values in zip(self.names, outputs, strict=True)}


def finite(seen: Seen, labels: Sequence[str]) -> Seen:
    for name, values in seen.items():
        good = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not good.all():
            what = "NaN" if np.isnan(values).any() else "infinite"
            raise GraphError(
                f"tensor {name!r} is {what} on image {labels[int(np.argmin(good))]}; nothing can "
                "be calibrated on that: check the weights and the preprocessing"
            )
    return seen


def require_finite(
    model: ir.Model,
    outputs: Seen,
    labels: Sequence[str],
    image: Callable[[int], NDArray[Any]],
    stage: Path,
) -> None:
    """Require that the outputs of a graph are finite for each image.

    ``image`` gives the image of an index as a batch of one: where a value is not finite, the graph
    is run on it again to name the first tensor.
    """
    try:
        finite(outputs, labels)
    except GraphError:
        bad = np.zeros(len(labels), bool)
        for values in outputs.values():
            bad |= ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        at = int(np.argmax(bad))
        computed = [v for node in model.graph for v in node.outputs if v.dtype is _FLOAT]
        watch = Watch(model, [value.name or "" for value in computed], stage)
        finite(watch(image(at)), [labels[at]])
        raise


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    # a memory pattern is kept for each batch shape, and onnxruntime's memory never shrinks: off, so
    # that memory does not depend on how many images come
    options.enable_mem_pattern = False
    # maxima are taken where their values are computed (msn_export.mixed_precision.measure)
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    # a quantised graph computes what is written in it, on every processor the same
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _affordable(model: ir.Model) -> int:
    """Images to run at once, by the size of what is watched and of attention."""
    each = sum(4 * math.prod(filter(None, sizes_of(value))) for value in model.graph.outputs)
    for node in model.graph:
        if node.op_type == "Attention":
            shape = [size for size in sizes_of(node.inputs[0]) if size is not None]
            if len(shape) == 3:  # [h, n, d]; scores and probabilities are [h, n, n] each
                each = max(each, 8 * shape[0] * shape[1] * shape[1])
    return max(1, min(8, _BATCH_BYTES // max(each, 1)))


def histograms(
    watch: Watch,
    batches: Iterable[tuple[NDArray[Any], Sequence[str]]],
    progress: Callable[[int], None] | None = None,
    found: dict[str, Histogram] | None = None,
) -> dict[str, Histogram]:
    """Count the absolute values of every watched value, or on in ``found`` of those it has.

    ``progress`` receives the images so far.
    """
    found = {name: Histogram() for name in watch.names} if found is None else found
    count = 0
    for images, labels in batches:
        seen = finite(watch(images), labels)
        for name, histogram in found.items():
            histogram.add(seen[name])
        count += len(labels)
        if progress is not None:
            progress(count)
    return found


SCHEMA = 1
_MOST_VALUES = 2**50  # in one bin: sums of all bins stay below int64's end


@dataclass(frozen=True, slots=True)
class TensorRange:
    """A histogram as JSON has it, checked."""

    peak: float
    limit: float
    counts: tuple[int, ...]

    def __post_init__(self) -> None:
        whole = len(self.counts) == BINS and all(0 <= n <= _MOST_VALUES for n in self.counts)
        edged = 0 <= self.peak < self.limit and np.frexp(self.limit)[0] == 0.5
        last = max((i for i, count in enumerate(self.counts) if count), default=None)
        # as a fraction first: BINS over the least of floats is infinite
        if not whole or not edged or last != int(self.peak / self.limit * BINS):
            raise SpecError(f"not a histogram of {BINS} bins up to a power of two")

    @classmethod
    def of(cls, histogram: Histogram) -> "TensorRange":
        return cls(histogram.peak, histogram.limit, tuple(histogram.counts.tolist()))

    @property
    def histogram(self) -> Histogram:
        return Histogram(self.peak, self.limit, np.asarray(self.counts, np.int64))


@dataclass(frozen=True, slots=True)
class ImagesRecord:
    """The images that were seen: how they were chosen, and a hash of each one's pixels."""

    source: str
    limit: int
    seed: int
    sha256: tuple[str, ...]
    broken: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SmoothingRecord:
    """Smoothing of a graph: a strength from 0 to 1, or None where it was not.

    ``exponents`` are the powers of two by which each channel of a value was divided. ``errors`` are
    the relative errors of the products, each quantised by itself, that each strength leaves.
    """

    strength: float | None = None
    exponents: dict[str, tuple[int, ...]] | None = None
    errors: dict[str, float] | None = None

    def __post_init__(self) -> None:
        powers = [power for channels in (self.exponents or {}).values() for power in channels]
        consistent = (self.strength is None) == (self.exponents is None)
        bounded = all(abs(power) <= LARGEST_EXPONENT for power in powers)
        if not consistent or not bounded or not 0 <= (self.strength or 0) <= 1:
            raise SpecError(
                f"not a smoothing: a strength from 0 to 1 and exponents up to {LARGEST_EXPONENT}"
            )


@dataclass(frozen=True, slots=True)
class Ranges:
    """Everything that quantising a graph takes; ``graph`` is its file's sha256."""

    graph: str
    images: ImagesRecord
    preprocessing: Preprocessing
    smoothing: SmoothingRecord
    tensors: dict[str, TensorRange]
    product: str = f"msn-export {__version__}"
    kind: str = "ranges"
    schema: int = SCHEMA

    def require(self, graph: str, preprocessing: Preprocessing, path: Path) -> None:
        if self.graph != graph:
            raise GraphError(
                f"--ranges {path} were taken of another graph (sha256 {self.graph[:12]}…, this one "
                f"has {graph[:12]}…); leave --ranges out to take them anew"
            )
        if not self.preprocessing.makes_the_same_as(preprocessing):
            raise GraphError(
                f"--ranges {path} were taken with preprocessing {self.preprocessing}, this graph "
                f"has {preprocessing}; leave --ranges out to take them anew"
            )

    def histograms(self, names: Mapping[str, str], path: Path) -> dict[str, Histogram]:
        """Histograms of the tensors ``names`` (name to the option that asks for it)."""
        for name, option in names.items():
            if name not in self.tensors:
                raise GraphError(
                    f"--ranges {path} have no tensor {name!r}, which {option or 'this graph'} "
                    "needs; leave --ranges out to take them anew"
                )
        return {name: self.tensors[name].histogram for name in names}


def write(ranges: Ranges, path: Path) -> None:
    path.write_text(json.dumps(to_plain(ranges), separators=(",", ":")) + "\n", encoding="utf-8")


def read(path: Path) -> Ranges:
    plain = read_json(path, RANGES)
    if not isinstance(plain, dict) or plain.get("kind") != "ranges":
        raise ManifestError(f"{path} is no ranges file; expected one that calibrate wrote")
    schema = plain.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ManifestError(
            f"{path} has schema {schema}, this version reads up to {SCHEMA}; upgrade msn-export"
        )
    return from_plain(Ranges, plain, path.name)
