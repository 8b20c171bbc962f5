"""A benchmark as tables that a person reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from msn_export.bench.records import Bench, Timing
    from msn_export.cli.console import Console


def show_bench(console: Console, bench: Bench) -> None:
    """Print who ran, the times with agreement beside them, and what was left out and why."""
    if console.as_json:
        console.print_json(bench)
        return
    console.print(_contenders(bench))
    console.print(_times(bench))
    if bench.preset == "paper":
        console.print(_paper(bench))
    for line in said(bench):
        console.print(escape(line))


def said(bench: Bench) -> list[str]:
    """Say in sentences what the table leaves open."""
    lines = [
        f"time / {bench.baseline}: median over {bench.rounds} rounds of the ratio within a round "
        "(quartiles).",
        f"Outputs compared with {bench.reference}, over {bench.pictures} of {bench.pictures_from}.",
        f"{bench.machine}; {bench.threads} threads a contender; "
        + ", ".join(f"{name} {version}" for name, version in bench.versions.items()),
    ]
    transfers = {one.transfers for one in bench.timed}
    if transfers - {None}:
        lines.append(
            "Copies to and from the GPU are counted."
            if True in transfers
            else "Copies to and from the GPU are not counted."
        )
    lines += [f"{one.name} left out: {one.skipped}" for one in bench.contenders if one.skipped]
    few = min(timing.calls for timing in bench.timings)
    if few < 100:
        lines.append(f"Some medians are of {few} calls: p99 is near the slowest of them.")
    return [*lines, *bench.notes]


def _contenders(bench: Bench) -> Table:
    table = Table("contender", "runs in", "dtype", "takes", "CUDA graph", "opened in")
    for one in bench.timed:
        table.add_row(
            escape(one.name),
            escape(one.runs),
            one.dtype or "unknown",
            escape(one.takes),
            one.cuda_graph or "-",
            f"{one.open_seconds:.1f} s",
        )
    return table


def _times(bench: Bench) -> Table:
    table = Table(
        "batch", "contender", "median ms", "p90", "p99", "images/s", f"time / {bench.baseline}",
        "cosine", "max_abs", "peak MB", "calls",
    )  # fmt: skip
    for batch in bench.batches:
        for timing in (one for one in bench.timings if one.batch == batch):
            table.add_row(*_row(timing))
        table.add_section()
    return table


def _row(timing: Timing) -> list[str]:
    ratio, agreement = timing.ratio, timing.agreement
    if agreement is None:
        compared = ["-", "-"]
    else:
        compared = [f"{agreement.cosine_min:.7f}", f"{agreement.max_abs:.1e}"]
    memory = timing.peak_rss_bytes if timing.device_bytes is None else timing.device_bytes
    return [
        str(timing.batch),
        escape(timing.contender),
        f"{timing.median_ms:.2f}",
        f"{timing.p90_ms:.2f}",
        f"{timing.p99_ms:.2f}",
        f"{timing.images_per_second:.1f}",
        f"{ratio.median:.3f} ({ratio.q1:.3f}-{ratio.q3:.3f})",
        *compared,
        f"{memory / 1e6:.0f}",
        str(timing.calls),
    ]


def _paper(bench: Bench) -> Table:
    """Lay times out as Hugging Face's table of attention implementations does."""
    names = [one.name for one in bench.timed]
    base, others = names[0], names[1:]
    ratios = [f"{base} / {name}" for name in others]
    table = Table("batch", *(f"{name}, ms" for name in names), *(f"{text}, x" for text in ratios))
    for batch in bench.batches:
        found = [bench.timing(name, batch) for name in names]
        table.add_row(
            str(batch),
            *(f"{timing.mean_ms:.1f}" for timing in found),
            *(f"{1 / timing.ratio.median:.2f}" for timing in found[1:]),
        )
    table.title = "mean time of a call; speed-up: median of the rounds"
    return table
