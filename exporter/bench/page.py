"""A benchmark as one page: no network, light and dark, printable, its own data inside."""

from __future__ import annotations

import io
import json
import re
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator, ScalarFormatter

from msn_export.bench.results import footnotes
from msn_export.schema import to_plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.axes import Axes

    from msn_export.bench.results import Bench


# Okabe and Ito, "Color Universal Design" (2008): told apart by the colour-blind, on light and dark
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
# Stand-ins that become the page's own colours
_INK, _LINE = "#010203", "#040506"
_STYLE: Any = {
    "text.parse_math": False,  # a "$" in a file's name is a "$"
    "svg.fonttype": "none",  # text stays text, in the page's font
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _LINE,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plots(bench: Bench) -> dict[str, str]:
    """Draw every plot; SVG by caption."""
    return {
        "Time per image, median of all calls; whiskers reach to p90": _draw(
            "time", lambda axes: _times(axes, bench)
        ),
        f"Time over that of {bench.baseline} in the same round; one point a round": _draw(
            "ratio", lambda axes: _ratios(axes, bench)
        ),
        "Highest memory of the contender's own process": _draw(
            "memory", lambda axes: _memory(axes, bench)
        ),
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


def _draw(name: str, draw: Callable[[Axes], None]) -> str:
    with rc_context():
        rcdefaults()  # nobody's matplotlibrc, which may lie in the current folder, has a say
        rcParams.update({**_STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        figure.legend(loc="outside upper left", ncols=4, frameon=False)
        written = io.StringIO()
        # all None: the metadata block, full of addresses, is left out
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    return _at_home(name, written.getvalue())


def _at_home(name: str, svg: str) -> str:
    """Make an SVG file part of a page: its names unique, its colours and font the page's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg role="img" \1', svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*" ', r"\1", svg, count=1)
    return svg.replace(_INK, "var(--ink)").replace(_LINE, "var(--line)")


def write_page(bench: Bench, path: Path) -> None:
    """Write the page.

    Raises:
        OSError: the file system refused.
    """
    environment = Environment(
        loader=PackageLoader("msn_export.bench", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    artifacts = [one.name for one in bench.timed if one.file is not None]
    fastest = {
        batch: min(one.median_ms for one in bench.timings if one.batch == batch)
        for batch in bench.batches
    }
    # "</script>" inside a name would end the element
    data = json.dumps(to_plain(bench), allow_nan=False).replace("<", "\\u003c")
    page = environment.get_template("page.html.j2").render(
        bench=bench,
        title=f"Benchmark of {', '.join(artifacts)}",
        said=footnotes(bench),
        fastest=fastest,
        plots=plots(bench),
        data=Markup(data),  # noqa: S704  JSON with every "<" escaped
    )
    path.write_text(page, encoding="utf-8")
