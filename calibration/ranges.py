"""The ranges file: what was seen of each tensor, on which images, of which graph.

It holds histograms and not thresholds, so that another observer or format needs no new pass over
the images, and the smoothing it was taken after, for the ranges are those of the smoothed graph.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from msn_export import __version__
from msn_export.calibration.observers import BINS, Histogram
from msn_export.calibration.smoothquant import LARGEST_EXPONENT
from msn_export.errors import GraphError, ManifestError, SpecError
from msn_export.preprocessing import Preprocessing
from msn_export.schema import from_plain, to_plain

SCHEMA = 1
_LARGEST_FILE = 64 * 2**20  # bytes; ten times the file of the largest published shape
_MOST_VALUES = 2**50  # in one bin: sums of all bins stay below int64's end


@dataclass(frozen=True, slots=True)
class TensorRange:
    """The largest absolute value of a tensor, and counts of |x| in equal bins up to ``limit``."""

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
        """Freeze a histogram."""
        return cls(histogram.peak, histogram.limit, tuple(histogram.counts.tolist()))

    @property
    def histogram(self) -> Histogram:
        """The histogram again."""
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
    """How the graph was smoothed: a strength from 0 to 1, or None where it was not.

    ``exponents`` are the powers of two by which each channel of a value was divided. ``errors`` are
    the relative errors of the embedding that each strength was measured to have.
    """

    strength: float | None = None
    exponents: dict[str, tuple[int, ...]] | None = None
    errors: dict[str, float] | None = None

    def __post_init__(self) -> None:
        powers = [power for channels in (self.exponents or {}).values() for power in channels]
        known = (self.strength is None) == (self.exponents is None)
        bounded = all(abs(power) <= LARGEST_EXPONENT for power in powers)
        if not known or not bounded or not 0 <= (self.strength or 0) <= 1:
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
        """Require that these are the ranges of a graph.

        Raises:
            GraphError: they are another's, or its images were preprocessed differently.
        """
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
        """Give the histograms of the tensors called ``names`` (name to the option that asks).

        Raises:
            GraphError: one is not there.
        """
        for name, option in names.items():
            if name not in self.tensors:
                raise GraphError(
                    f"--ranges {path} have no tensor {name!r}, which {option or 'this graph'} "
                    "needs; leave --ranges out to take them anew"
                )
        return {name: self.tensors[name].histogram for name in names}


def write(ranges: Ranges, path: Path) -> None:
    """Write the same bytes for the same ranges."""
    path.write_text(json.dumps(to_plain(ranges), separators=(",", ":")) + "\n", encoding="utf-8")


def read(path: Path) -> Ranges:
    """Read a ranges file.

    Raises:
        ManifestError: it is none, or of a later schema.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ManifestError(f"{path} is larger than a ranges file can be")
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"ranges file {path} cannot be read: {error}") from error
    if not isinstance(plain, dict) or plain.get("kind") != "ranges":
        raise ManifestError(f"{path} is no ranges file; expected one that calibrate wrote")
    schema = plain.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ManifestError(
            f"{path} has schema {schema}, this version reads up to {SCHEMA}; upgrade msn-export"
        )
    return from_plain(Ranges, plain, path.name)
