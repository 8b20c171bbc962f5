"""A benchmark as tables that a person reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from msn_export.bench.said import said

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


def _contenders(bench: Bench) -> Table:
    table = Table(
        "contender", "runs in", "dtype", "takes", "CUDA graphs", "opened", "peak MB",
        box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for one in bench.timed:
        found = [timing for timing in bench.timings if timing.contender == one.name]
        peak = max(timing.device_bytes or timing.peak_rss_bytes for timing in found)
        table.add_row(
            escape(one.name),
            escape(one.runs),
            one.dtype or "unknown",
            escape(one.takes),
            one.cuda_graphs or "-",
            f"{one.open_seconds:.1f} s",
            f"{peak / 1e6:.0f}",
        )
    return table


def _times(bench: Bench) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("batch", justify="right")
    table.add_column("contender", no_wrap=True)
    for title in ("median ms", "p90", "p99", "images/s"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column(escape(f"time / {bench.baseline}"), no_wrap=True)
    table.add_column("cosine", no_wrap=True)
    table.add_column("max_abs", no_wrap=True)
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
        compared = [f"{agreement.cosine_min:.6f}", f"{agreement.max_abs:.1e}"]
    return [
        str(timing.batch),
        escape(timing.contender),
        *(_ms(time) for time in (timing.median_ms, timing.p90_ms, timing.p99_ms)),
        f"{timing.images_per_second:.1f}",
        f"{ratio.median:.3f} ({ratio.q1:.3f}-{ratio.q3:.3f})",
        *compared,
    ]


def _ms(time: float) -> str:
    return f"{time:.0f}" if time >= 1000 else f"{time:.1f}" if time >= 100 else f"{time:.2f}"


def _paper(bench: Bench) -> Table:
    """Lay times out as Hugging Face's table of attention implementations does."""
    names = [one.name for one in bench.timed]
    titles = [f"{name}, ms" for name in names]
    titles += [f"{names[0]} / {name}, x" for name in names[1:]]
    table = Table("batch", *map(escape, titles))
    for batch in bench.batches:
        found = [bench.timing(name, batch) for name in names]
        table.add_row(
            str(batch),
            *(f"{timing.median_ms:.1f}" for timing in found),
            *(f"{1 / timing.ratio.median:.2f}" for timing in found[1:]),
        )
    table.title = "median time of a call, and the speed-up: median of the rounds"
    return table
