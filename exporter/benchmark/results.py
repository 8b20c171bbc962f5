"""The figures of a benchmark, and the footnotes of its table."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.errors import ManifestError, SpecError
from msn_export.host import Machine
from msn_export.input_files import BENCH, read_bytes
from msn_export.schema import Result, from_plain

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence


SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that was timed, or the reason (``skipped``) why it was not.

    ``transfers`` says whether copies to and from the GPU are in its times; None on the CPU, where
    there are none. ``cuda_graphs`` says how an engine's kernels were replayed, ``precision``
    what a compiled graph computes in, where its runtime says it.
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
    precision: str | None = None
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
    """Agreement of the outputs with the fp32 reference's: the worst one's figures; None for NaN."""

    images: int
    max_abs: float | None
    mean_abs: float | None
    cosine_min: float | None
    cosine_p1: float | None
    cosine_median: float | None


@dataclass(frozen=True, slots=True)
class Timing:
    """One contender at one batch size; times are of one call, in milliseconds.

    ``rounds_ms`` has the median of each round, ``samples_ms`` every call of each. ``noisy`` says
    why the figures cannot be used, where they cannot. ``split`` says how a batch is run that the
    artifact does not take at once. ``peak_rss_bytes`` is the highest resident memory of the
    contender's own process at this batch, ``device_bytes`` what it held of the GPU's.
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
    samples_ms: tuple[tuple[float, ...], ...] = ()
    noisy: str | None = None
    split: str | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Bench(Result):
    """A whole run.

    ``baseline`` is the contender whose time is 1, ``reference`` what outputs were compared with.
    ``load`` is the load average over one minute when the run began: that of other processes.
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
        return next(t for t in self.timings if (t.contender, t.batch) == (contender, batch))

    @property
    def busy(self) -> str | None:
        """The reason why no figure can be used, where other processes used the machine."""
        return busy(self.load, self.machine.cores)

    def fastest(self, batch: int) -> str | None:
        """Name the contender of the smallest ratio; None where any at this batch is too noisy."""
        found = [timing for timing in self.timings if timing.batch == batch]
        if len(found) < 2 or self.rounds < _QUARTILES or any(one.noisy for one in found):
            return None
        return min(found, key=lambda timing: timing.ratio.median).contender

    @property
    def timed(self) -> tuple[Contender, ...]:
        return tuple(one for one in self.contenders if one.skipped is None)


def read_bench(path: Path, hashes: Mapping[str, Collection[str]]) -> Bench:
    """Read what ``msn-export bench --json`` wrote.

    Args:
        path: the file.
        hashes: the sha256 of each artifact here, by file name.
    """
    try:
        plain = json.loads(read_bytes(path, BENCH))
    except (ValueError, RecursionError) as error:
        raise SpecError(
            f"--bench {path} cannot be read as JSON ({error}); write it with "
            "'msn-export bench … --json > FILE.json'"
        ) from error
    try:
        bench = from_plain(Bench, plain, path.name)
    except ManifestError as error:
        raise SpecError(f"--bench {path} is not what 'bench --json' prints: {error}") from error
    if not bench.timings:
        raise SpecError(f"--bench {path} has no timings in it; expected what 'bench --json' prints")
    for one in bench.contenders:
        here = hashes.get(Path(one.file).name) if one.file is not None else None
        if here is not None and one.sha256 is not None and one.sha256 not in here:
            raise SpecError(
                f"--bench {path} timed another {Path(one.file or '').name} (sha256 "
                f"{one.sha256[:12]}…, this one has {min(here)[:12]}…); run msn-export bench again"
            )
    return bench


Rounds = list[list[int]]  # of each round the nanoseconds of each call


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """Give the order of a round: each contender is first, second, … equally often.

    What follows a slow or a fast neighbour, or comes first after a pause, does so in turn.
    """
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def ratio_of(rounds: Rounds, baseline: Rounds) -> Ratio:
    """Compare two contenders round by round: what disturbs a whole round cancels out."""
    ratios = np.asarray(medians(rounds)) / np.asarray(medians(baseline))
    q1, median, q3 = np.percentile(ratios, [25, 50, 75])
    return Ratio(float(median), float(q1), float(q3), len(ratios))


# A ratio that half of the rounds put 20 % apart tells nothing of the 10 to 40 % that graphs differ
# by. An idle machine stays below 1.05; two cores with six times their load came to 1.4 and 2.2.
NOISY = 1.2
TOO_NOISY = "Too noisy"  # begins the line that says so


# Load average per core from which figures are not to be trusted. An idle machine has about 0.1 in
# all. From half a core each on, contenders share cores: ratios between two runtimes moved from 0.98
# to 1.21 between runs, each with narrow quartiles.
BUSY = 0.5


def busy(load: float, cores: int) -> str | None:
    """Find the reason why nothing can be timed under a load; None on an idle machine.

    Args:
        load: the load average over one minute before the first contender ran.
        cores: those of the machine.
    """
    if load <= BUSY * cores:
        return None
    return (
        f"load average {load:.1f} on {_count(cores, 'core')} when the run began, more than "
        f"{BUSY * cores:g}"
    )


def noise_of(ratio: Ratio, rounds: Rounds, *, alone: bool) -> str | None:
    """Find the reason why figures cannot be used; None where they can.

    Args:
        ratio: over the baseline's times.
        rounds: the contender's own times.
        alone: whether nothing else was timed, so that only the times themselves show a disturbance.
    """
    if len(rounds) < _QUARTILES:
        return None  # no quartiles: ``footnotes`` says so
    q1, q3, what, unit = ratio.q1, ratio.q3, "ratio", ""
    if alone:
        q1, q3 = map(float, np.percentile(medians(rounds), [25, 75]))
        what, unit = "median of a round", " ms"
    if q3 <= NOISY * q1:
        return None
    return f"quartiles of the {what} are {q1:.3g} and {q3:.3g}{unit}, more than {NOISY} times apart"


def medians(rounds: Rounds) -> list[float]:
    """Give each round's median in milliseconds."""
    return [float(np.median(calls)) / 1e6 for calls in rounds]


def figures(rounds: Rounds, batch: int) -> dict[str, Any]:
    """Sum up all calls of all rounds, in milliseconds and images a second."""
    times = np.concatenate([np.asarray(calls, np.float64) for calls in rounds]) / 1e6
    median = float(np.median(times))
    return {
        "calls": len(times),
        "median_ms": median,
        "mean_ms": float(times.mean()),
        "min_ms": float(times.min()),
        "p90_ms": float(np.percentile(times, 90)),
        "p99_ms": float(np.percentile(times, 99)),
        "images_per_second": 1000 * batch / median,
        "rounds_ms": tuple(medians(rounds)),
        "samples_ms": tuple(tuple(call / 1e6 for call in calls) for calls in rounds),
    }


_QUARTILES = 3  # rounds from which quartiles are not the ends
_FEW = 100  # calls, below which a p99 is little more than the slowest one


def footnotes(bench: Bench) -> list[str]:
    """List how ratios were made, what was compared, where it ran, and what is missing."""
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    lines = list(noise_lines(bench))
    marked = "; * too noisy to be used" if lines else ""
    lines += [
        f"ratio: time / {bench.baseline}, median over {_count(bench.rounds, 'round')} of the ratio "
        f"within a round (quartiles){marked}.",
        "Quartiles show the spread within this run, not between runs.",
        f"Outputs compared with {bench.reference}, over {bench.pictures} inputs: "
        f"{bench.pictures_from}.",
        f"{bench.machine}; {_count(bench.threads, 'thread')} a contender; {versions}.",
    ]
    lines += [f"{one.name}: {one.precision}." for one in bench.timed if one.precision]
    transfers = {one.transfers for one in bench.timed} - {None}
    if transfers:
        counted = "counted" if True in transfers else "not counted"
        lines.append(f"Copies to and from the GPU are {counted}.")
    lines += [f"{one.name} left out: {one.skipped}" for one in bench.contenders if one.skipped]
    if bench.rounds < _QUARTILES:
        lines.append(
            f"{_count(bench.rounds, 'round')} cannot show whether the machine was disturbed: take "
            f"--rounds {_QUARTILES} or more."
        )
    fewest = min(timing.calls for timing in bench.timings)
    if fewest < _FEW:
        lines.append(
            f"Some figures are of {_count(fewest, 'call')}: p99 is near the slowest of them."
        )
    apart = {(one.contender, one.not_compared) for one in bench.timings if one.not_compared}
    # that there is no reference is said above, once
    lines += [
        f"{name} not compared: {why}" for name, why in sorted(apart) if why != bench.reference
    ]
    return [*lines, *bench.notes]


def milliseconds(time: float) -> str:
    """Give three significant digits: the times of a few calls have no more."""
    rounded = float(f"{time:.3g}")
    return f"{rounded:.0f}" if rounded >= 100 else f"{rounded:#.3g}"


def spread_of(latency: Mapping[str, Any], name: str) -> str:
    """Describe how far a ratio can be relied on that a manifest holds; older ones do not say it."""
    if "quartiles" not in latency:
        return ""
    q1, q3 = latency["quartiles"][name]
    text = (
        f"time ratio {latency['ratio'][name]:.3g} (quartiles {q1:.3g} to {q3:.3g}) over "
        f"{_count(latency['rounds'], 'round')}"
    )
    noisy = latency.get("noisy")
    return f"{text}; {TOO_NOISY}, use bench on an idle machine: {noisy}" if noisy else text


def noise_lines(bench: Bench) -> Iterator[str]:
    """Name the figures that cannot be used, and why: all of them under load, or single ones."""
    if bench.busy is not None:
        yield f"{TOO_NOISY}, run again on an idle machine: every figure, {bench.busy}. {UNDER_LOAD}"
    for one in bench.timings:
        if one.noisy and one.noisy != bench.busy:
            yield (
                f"{TOO_NOISY}, run again on an idle machine: {one.contender} at batch "
                f"{one.batch}, {one.noisy}."
            )


UNDER_LOAD = (
    "Under load, ratios between different runtimes change from run to run too, even with narrow "
    "quartiles. The average is over one minute: wait that long after another run."
)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
