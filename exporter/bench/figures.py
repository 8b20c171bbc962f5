"""From times to figures: what a contender took, and how that compares round by round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.bench.records import Ratio

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    }
