"""What a benchmark's table leaves open, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msn_export.bench.records import Bench

_FEW = 100  # calls, below which a p99 is little more than the slowest one


def said(bench: Bench) -> list[str]:
    """Say how ratios were made, what was compared with what, where it ran, and what is missing."""
    versions = ", ".join(f"{name} {version}" for name, version in bench.versions.items())
    lines = [
        f"time / {bench.baseline}: median over {_count(bench.rounds, 'round')} of the ratio within "
        "a round (quartiles).",
        f"Outputs compared with {bench.reference}, over {bench.pictures} inputs: "
        f"{bench.pictures_from}.",
        f"{bench.machine}; {_count(bench.threads, 'thread')} a contender; {versions}.",
    ]
    transfers = {one.transfers for one in bench.timed} - {None}
    if transfers:
        counted = "counted" if True in transfers else "not counted"
        lines.append(f"Copies to and from the GPU are {counted}.")
    lines += [f"{one.name} left out: {one.skipped}" for one in bench.contenders if one.skipped]
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
