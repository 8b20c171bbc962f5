"""The page of a benchmark: its tables, three plots, and the record itself as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from markupsafe import Markup

from msn_export.benchmark.results import footnotes
from msn_export.errors import IN_A_TEXT
from msn_export.reporting.plots import WIDE, Plot, colour_of, draw, evenly, legend_above, times
from msn_export.reporting.render import environment
from msn_export.schema import to_plain

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from msn_export.benchmark.results import Bench


def ratios(bench: Bench) -> Plot:
    """Draw the time over the baseline's of each round, a point each, and their median."""
    names = [one.name for one in bench.timed]
    found = {
        (batch, name): [
            mine / theirs
            for mine, theirs in zip(
                bench.timing(name, batch).rounds_ms,
                bench.timing(bench.baseline, batch).rounds_ms,
                strict=True,
            )
        ]
        for batch in bench.batches
        for name in names
    }

    def paint(axes: Axes) -> None:
        for place, batch in enumerate(bench.batches):
            for index, name in enumerate(names):
                each = found[batch, name]
                at = place + 0.8 * ((index + 0.5) / len(names) - 0.5)
                spread = [at + 0.1 * (turn / len(each) - 0.5) for turn in range(len(each))]
                axes.plot(
                    spread, each, linestyle="", marker=".", color=colour_of(index), alpha=0.6,
                    label=name if place == 0 else None,
                )  # fmt: skip
                median = bench.timing(name, batch).ratio.median
                axes.hlines(median, at - 0.1, at + 0.1, colors=colour_of(index))
        axes.set_xticks(range(len(bench.batches)), [str(batch) for batch in bench.batches])
        evenly(axes)
        axes.set_xlabel("batch")
        axes.set_ylabel(f"time / {bench.baseline}")
        axes.grid()
        legend_above(axes)

    rows = (
        (name, batch, turn, ratio)
        for (batch, name), each in found.items()
        for turn, ratio in enumerate(each, 1)
    )
    title = f"Time over that of {bench.baseline} in the same round; one point a round"
    return draw("ratios", title, paint, ("contender", "batch", "round", "ratio"), rows, _SIZE)


def memory(bench: Bench) -> Plot:
    """Draw the highest memory of each contender's process by batch size."""
    names = [one.name for one in bench.timed]
    width = 0.8 / len(names)

    def paint(axes: Axes) -> None:
        for index, name in enumerate(names):
            found = [bench.timing(name, batch) for batch in bench.batches]
            heights = [(one.device_bytes or one.peak_rss_bytes) / 1e6 for one in found]
            places = [place + width * (index - (len(names) - 1) / 2) for place in range(len(found))]
            axes.bar(places, heights, width, label=name, color=colour_of(index))
        axes.set_xticks(range(len(bench.batches)), [str(batch) for batch in bench.batches])
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel("batch")
        axes.set_ylabel("MB")
        legend_above(axes)

    rows = ((t.contender, t.batch, t.peak_rss_bytes, t.device_bytes) for t in bench.timings)
    columns = ("contender", "batch", "peak_rss_bytes", "device_bytes")
    title = "Highest memory of the contender's own process"
    return draw("memory", title, paint, columns, rows, _SIZE)


_SIZE = (WIDE, 3.4)


def write_page(bench: Bench, path: Path) -> None:
    """Write the page: one file that loads nothing."""
    artifacts = [one.name for one in bench.timed if one.file is not None]
    # "</script>" inside a name would end the element
    data = json.dumps(to_plain(bench), allow_nan=False).replace("<", "\\u003c")
    page = (
        environment(autoescape=True)
        .get_template("bench.html.j2")
        .render(
            bench=bench,
            title=f"Benchmark of {', '.join(artifacts)}",
            footnotes=footnotes(bench),
            plots={plot.name: plot for plot in (times(bench), ratios(bench), memory(bench))},
            data=Markup(data),  # noqa: S704  JSON with every "<" escaped
        )
    )
    path.write_text(page.lstrip().translate(IN_A_TEXT), encoding="utf-8")
