"""A benchmark as one page: no network, light and dark, printable, its own data inside."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING

from markupsafe import Markup
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, ScalarFormatter

from msn_export.benchmark.results import footnotes
from msn_export.reporting.render import draw, environment
from msn_export.schema import to_plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.axes import Axes

    from msn_export.benchmark.results import Bench


# Okabe and Ito, "Color Universal Design" (2008): told apart by the colour-blind, on light and dark
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def plots(bench: Bench) -> dict[str, str]:
    """Draw every plot; SVG by caption."""
    captions: dict[str, tuple[str, Callable[[Axes, Bench], None]]] = {
        "Time per image, median of all calls; whiskers reach to p90": ("time", _times),
        f"Time over that of {bench.baseline} in the same round; one point a round": (
            "ratio",
            _ratios,
        ),
        "Highest memory of the contender's own process": ("memory", _memory),
    }

    def paint(axes: Axes, contenders: Callable[[Axes, Bench], None]) -> None:
        axes.grid()
        contenders(axes, bench)
        axes.figure.legend(loc="outside upper left", ncols=4)

    return {
        caption: draw(name, caption, partial(paint, contenders=contenders), (7.2, 3.6))
        for caption, (name, contenders) in captions.items()
    }


def _times(axes: Axes, bench: Bench) -> None:
    for index, one in enumerate(bench.timed):
        found = [bench.timing(one.name, batch) for batch in bench.batches]
        each = [timing.median_ms / timing.batch for timing in found]
        above = [max(0.0, timing.p90_ms - timing.median_ms) / timing.batch for timing in found]
        axes.errorbar(
            bench.batches,
            each,
            yerr=[[0.0] * len(each), above],
            label=one.name,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(bench.batches)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    _logarithmic(axes)
    axes.set_xlabel("batch")
    axes.set_ylabel("ms an image")


def _ratios(axes: Axes, bench: Bench) -> None:
    names = [one.name for one in bench.timed]
    for place, batch in enumerate(bench.batches):
        base = bench.timing(bench.baseline, batch).rounds_ms
        for index, name in enumerate(names):
            own = bench.timing(name, batch).rounds_ms
            ratios = [mine / theirs for mine, theirs in zip(own, base, strict=True)]
            at = place + 0.8 * ((index + 0.5) / len(names) - 0.5)
            colour = _COLOURS[index % len(_COLOURS)]
            spread = [at + 0.1 * (turn / len(ratios) - 0.5) for turn in range(len(ratios))]
            axes.plot(
                spread, ratios, linestyle="", marker=".", color=colour, alpha=0.6,
                label=name if place == 0 else None,
            )  # fmt: skip
            axes.hlines(bench.timing(name, batch).ratio.median, at - 0.1, at + 0.1, colors=colour)
    axes.set_xticks(range(len(bench.batches)), [str(batch) for batch in bench.batches])
    _logarithmic(axes)
    axes.set_xlabel("batch")
    axes.set_ylabel(f"time / {bench.baseline}")


def _memory(axes: Axes, bench: Bench) -> None:
    names = [one.name for one in bench.timed]
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [bench.timing(name, batch) for batch in bench.batches]
        heights = [(timing.device_bytes or timing.peak_rss_bytes) / 1e6 for timing in found]
        places = [place + width * (index - (len(names) - 1) / 2) for place in range(len(found))]
        axes.bar(places, heights, width, label=name, color=_COLOURS[index % len(_COLOURS)])
    axes.set_xticks(range(len(bench.batches)), [str(batch) for batch in bench.batches])
    axes.grid(visible=False, axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("batch")
    axes.set_ylabel("MB")


def _logarithmic(axes: Axes) -> None:
    """Make equal ratios equally far apart; numbers are written out."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def write_page(bench: Bench, path: Path) -> None:
    artifacts = [one.name for one in bench.timed if one.file is not None]
    fastest = {
        batch: min(one.median_ms for one in bench.timings if one.batch == batch)
        for batch in bench.batches
    }
    # "</script>" inside a name would end the element
    data = json.dumps(to_plain(bench), allow_nan=False).replace("<", "\\u003c")
    page = (
        environment(autoescape=True)
        .get_template("bench.html.j2")
        .render(
            bench=bench,
            title=f"Benchmark of {', '.join(artifacts)}",
            footnotes=footnotes(bench),
            fastest=fastest,
            plots=plots(bench),
            data=Markup(data),  # noqa: S704  JSON with every "<" escaped
        )
    )
    path.write_text(page, encoding="utf-8")
