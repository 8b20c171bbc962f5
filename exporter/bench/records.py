"""What a benchmark says: the records behind ``--json``. docs/bench.md describes each field."""

from __future__ import annotations

from dataclasses import dataclass, field

from msn_export.machine import Machine

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that was timed, or the reason (``skipped``) why it was not.

    ``transfers`` says whether copies to and from the GPU are in its times; None on the CPU, where
    there are none. ``cuda_graphs`` says how an engine's kernels were replayed.
    """

    name: str
    kind: str
    runs: str = ""
    file: str | None = None
    sha256: str | None = None
    dtype: str | None = None
    takes: str = ""
    threads: int | None = None
    transfers: bool | None = None
    cuda_graphs: str | None = None
    open_seconds: float | None = None
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Time over the baseline's time in the same round: median and quartiles of the rounds."""

    median: float
    q1: float
    q3: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Agreed:
    """How the outputs agree with the fp32 reference's, the worst output's figures; None: NaN."""

    images: int
    max_abs: float
    mean_abs: float
    cosine_min: float
    cosine_p1: float
    cosine_median: float


@dataclass(frozen=True, slots=True)
class Timing:
    """One contender at one batch size; times are of one call, in milliseconds.

    ``rounds_ms`` has the median of each round. ``peak_rss_bytes`` is the highest resident memory
    of the contender's own process at this batch, ``device_bytes`` what it held of the GPU's.
    """

    contender: str
    batch: int
    calls: int
    median_ms: float
    mean_ms: float
    min_ms: float
    p90_ms: float
    p99_ms: float
    images_per_second: float
    ratio: Ratio
    rounds_ms: tuple[float, ...]
    warm_up_seconds: float
    peak_rss_bytes: int
    device_bytes: int | None = None
    agreement: Agreed | None = None
    not_compared: str | None = None


@dataclass(frozen=True, slots=True)
class Bench:
    """A whole run.

    ``baseline`` is the contender whose time is 1, ``reference`` what outputs were compared with.
    ``load`` is the load average when the run began: of others, on a busy machine.
    """

    product: str
    command: str
    created: str
    machine: Machine
    versions: dict[str, str]
    batches: tuple[int, ...]
    rounds: int
    seconds: float
    threads: int
    pictures: int
    pictures_from: str
    preprocessing: str
    baseline: str
    reference: str
    load: float
    contenders: tuple[Contender, ...]
    timings: tuple[Timing, ...]
    notes: tuple[str, ...] = field(default=())
    preset: str | None = None
    kind: str = "bench"
    schema: int = SCHEMA

    def timing(self, contender: str, batch: int) -> Timing:
        """Look one contender's times at one batch size up."""
        return next(t for t in self.timings if (t.contender, t.batch) == (contender, batch))

    @property
    def timed(self) -> tuple[Contender, ...]:
        """Those that ran."""
        return tuple(one for one in self.contenders if one.skipped is None)
