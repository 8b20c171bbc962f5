"""Turn what a report shows into one HTML page, or into Markdown for a model card."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    ScalarFormatter,
)

from msn_export.benchmark.results import Bench, footnotes
from msn_export.compare.drift import Drift
from msn_export.errors import IN_A_TEXT
from msn_export.graph.summary import PARTS
from msn_export.metrics.diagnose import StageDrift
from msn_export.metrics.tolerances import HEADROOM
from msn_export.reporting import confusion
from msn_export.reporting.describe import accuracy_rows, file_rows, fused, short
from msn_export.reporting.describe_fit import fit_rows
from msn_export.reporting.gather import (
    Page,
    ReportedAgreement,
    ReportedArtifact,
    multiplied,
    roles,
    spelled,
    strips,
    timed_on,
    timing_columns,
    timing_rows,
)
from msn_export.schema import to_plain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.axes import Axes

    from msn_export.benchmark.results import Bench


def inline(svg: str, prefix: str, title: str) -> str:
    """Make a stand-alone SVG part of a page: named for those who do not see it, ids its own.

    Two figures on one page must not share ids, and an XML prologue has no place in HTML.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r"url\(#", f"url(#{prefix}-", body)
    body = re.sub(r'href="#', f'href="#{prefix}-', body)
    # a font of the page, not of the machine that drew it
    body = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 var(--sans)", body)
    return body.replace("<svg ", f'<svg role="img" aria-label="{_quoted(title)}" ', 1)


def _quoted(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


# Colours that stand for the page's: matplotlib writes them, and they become its variables
_INK, SOFT, _LINE = "#010101", "#020202", "#030303"
SERIES = ("#040404", "#050505", "#060606", "#070707")
_WARN, _PAPER = "#080808", "#090909"
_NAMES = {
    _INK: "--ink", SOFT: "--soft", _LINE: "--line", _WARN: "--bad", _PAPER: "--paper",
    **{colour: f"--series-{index}" for index, colour in enumerate(SERIES)},
}  # fmt: skip
_STYLE: Any = {  # matplotlib types its settings one by one
    "text.parse_math": False,  # a "$" in a file's name is a "$"
    "svg.fonttype": "none",  # text stays text: selectable, searchable, small
    "svg.hashsalt": "msn-export",  # the same figures give the same bytes
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_MARKS = "osD^"
_LEAST_HEADROOM = 0.6  # a stump of a bar
_LEAST = 1e-16  # below fp64's rounding of a cosine nothing is told apart


def draw(
    prefix: str, title: str, paint: Callable[[Axes], None], size: tuple[float, float] = (10.4, 3.0)
) -> str:
    """Draw one figure as SVG for a page; ``size`` in inches."""
    with mpl.rc_context():
        mpl.rcdefaults()  # nobody's matplotlibrc, which may lie in the current folder, has a say
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        paint(figure.add_subplot())
        packed = io.StringIO()
        figure.savefig(packed, format="svg", metadata=dict.fromkeys(("Creator", "Date")))
    svg = packed.getvalue()
    for colour, name in _NAMES.items():
        svg = svg.replace(colour, f"var({name})")
    return inline(svg, prefix, title)


def histogram(agreements: Sequence[ReportedAgreement]) -> str:
    """Draw how far each image's cosine is from 1, on a logarithmic axis."""
    gaps = []
    for agreement in agreements:
        cosines = [image.cosine for image in agreement.check.per_image]
        finite = [cosine for cosine in cosines if cosine is not None and math.isfinite(cosine)]
        gaps.append(np.maximum(1 - np.asarray(finite, float), _LEAST))
    every = np.concatenate(gaps)
    low, high = math.floor(np.log10(every.min())), math.ceil(np.log10(every.max()) + 1e-9)
    bins = np.logspace(low, max(high, low + 1), 4 * (max(high, low + 1) - low) + 1)

    def paint(axes: Axes) -> None:
        colours = [SERIES[index % 4] for index in range(len(gaps))]
        names = [agreement.candidate for agreement in agreements]
        axes.hist(gaps, bins.tolist(), color=colours, label=names)
        axes.set_xscale("log")
        axes.set_xlabel("1 - cosine with the reference (further left is closer)")
        axes.set_ylabel("images")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.legend(loc="best")

    return draw("cosines", "Histogram of one minus the cosine of each image", paint)


def drift(drifts: Sequence[Drift]) -> str:
    """Draw the relative error that each stage makes by itself."""

    def paint(axes: Axes) -> None:
        for index, found in enumerate(drifts):
            errors = [_error(stage) for stage in found.stages]
            places = range(len(errors))
            colour, mark = SERIES[index % 4], _MARKS[index % 4]
            axes.plot(
                places, errors, f"{mark}-", color=colour, markersize=4, label=short(found.candidate)
            )
            # infinite where nothing was measured that could limit it
            limits = [
                math.inf if stage.own is None else stage.own.allowed for stage in found.stages
            ]
            allowed = [limit if math.isfinite(limit) else math.nan for limit in limits]
            axes.plot(places, allowed, "--", color=colour, linewidth=0.9)
            for place, stage in enumerate(found.stages):
                if stage.name == found.parted:
                    axes.plot(
                        place, errors[place], "o", color=_WARN, markersize=10, fillstyle="none"
                    )
        axes.set_yscale("log")
        _whole_decades(axes)
        axes.set_ylabel("relative error")
        axes.grid(axis="y")
        _stage_names(axes, drifts[0])
        axes.legend(loc="best", title="dashed: allowed", alignment="left")

    return draw("drift", "Relative error of each block by itself", paint)


def _error(stage: StageDrift) -> float:
    """Give a stage's own error; one that could not be compared has no place on the axis."""
    return math.nan if stage.own is None else max(stage.own.relative, _LEAST)


def _whole_decades(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))
    axes.yaxis.set_minor_formatter(NullFormatter())


def headroom(found: Drift) -> str:
    """Draw how often each stage's largest value fits below fp16's largest number."""
    values = [stage.headroom for stage in found.stages]
    colours = [SERIES[0] if value >= HEADROOM else _WARN for value in values]

    def paint(axes: Axes) -> None:
        # zeros fit any number of times, a peak that is no number or infinite not even once
        heights = [min(value, 65504.0) if value > 0 else _LEAST_HEADROOM for value in values]
        axes.bar(range(len(heights)), heights, color=colours, width=0.7)
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(0.5, *heights))
        axes.axhline(HEADROOM, color=_WARN, linewidth=0.9, linestyle="--")
        axes.set_ylabel("65504 / largest value")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        _stage_names(axes, found)

    return draw("headroom", "fp16 headroom of each block", paint, (10.4, 2.2))


def _stage_names(axes: Axes, found: Drift) -> None:
    names = [stage.name.removeprefix("block ") for stage in found.stages]
    axes.set_xticks(
        range(len(names)), [name.replace("patch embedding", "patches") for name in names]
    )
    axes.tick_params(axis="x", length=0)
    if len(names) > 20:  # of many blocks each second number is enough
        for label in axes.get_xticklabels()[2::2]:
            label.set_visible(label.get_text() == names[-1])
    axes.set_xlabel("block")


def kinds(artifact: ReportedArtifact) -> str:
    assert artifact.census is not None
    counts = dict(reversed(roles(artifact.census).items()))
    title = f"Kernels of {artifact.name} by kind"
    return draw(
        f"kinds-{_slug(artifact.name)}",
        title,
        lambda axes: _bars(axes, counts, "{:.0f}"),
        (5.1, 2.3),
    )


def per_block(artifact: ReportedArtifact) -> str:
    assert artifact.census is not None
    counts = artifact.census.kernels_per_block

    def paint(axes: Axes) -> None:
        bars = axes.bar(range(len(counts)), list(counts.values()), color=SERIES[0], width=0.7)
        axes.bar_label(bars, color=SOFT, fontsize=8)
        axes.set_xticks(range(len(counts)), list(map(str, counts)))
        axes.tick_params(length=0)
        axes.set_xlabel("block")
        axes.set_ylabel("kernels")

    return draw(
        f"blocks-{_slug(artifact.name)}", f"Kernels of {artifact.name} by block", paint, (5.1, 2.3)
    )


def sizes(artifacts: Sequence[ReportedArtifact]) -> str:
    megabytes = {a.name: a.inspection.bytes / 1e6 for a in reversed(artifacts)}
    height = 0.25 + 0.27 * len(megabytes)
    return draw(
        "sizes", "Size of each artifact in MB", lambda axes: _bars(axes, megabytes, "{:.1f} MB"),
        (10.4, height),
    )  # fmt: skip


def latency(found: Bench) -> str:
    bars = {f"{t.contender}, batch {t.batch}": t.median_ms for t in reversed(found.timings)}
    height = 0.25 + 0.27 * len(bars)
    return draw(
        "latency", "Median time of one call", lambda axes: _bars(axes, bars, "{:.2f} ms"),
        (10.4, height),
    )  # fmt: skip


def confused(artifact: ReportedArtifact) -> str:
    """Draw which classes a fitted classifier takes for which; empty where that is not there."""
    manifest = artifact.manifest
    found = manifest.fit.accuracy if manifest is not None and manifest.fit is not None else None
    if manifest is None or found is None or found.confusion is None:
        return ""
    pairs, names = found.confusion, manifest.labels
    if len(names) > confusion.MATRIX:
        return ""

    def paint(axes: Axes) -> None:
        confusion.paint(axes, pairs, names, "the highest logit", SERIES)

    title = f"Confusion matrix of {len(names)} classes"
    return draw("confusion", title, paint, confusion.size_of(len(names)))


def _bars(axes: Axes, values: Mapping[str, float], form: str) -> None:
    bars = axes.barh(range(len(values)), list(values.values()), color=SERIES[0], height=0.62)
    axes.bar_label(bars, fmt=form, color=_INK, padding=4)
    axes.set_yticks(range(len(values)), list(values))
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.16)


def _slug(name: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in name)


def html(page: Page) -> str:
    """Render the page with its plots: one file that loads nothing."""
    drawn = {name: Markup(svg) for name, svg in _plots(page).items()}  # noqa: S704  ours
    template = environment(autoescape=True).get_template("report.html.j2")
    return template.render(page=page, plots=drawn).lstrip().translate(IN_A_TEXT)


def markdown(page: Page) -> str:
    """Render the same figures as Markdown, without plots and pictures."""
    text = environment(autoescape=False).get_template("model_card.md.j2").render(page=page)
    return re.sub(r"\n{3,}", "\n\n", text.translate(IN_A_TEXT)).strip() + "\n"


def environment(*, autoescape: bool) -> Environment:
    """Open the templates; a figure that is not there is an error."""
    opened = Environment(
        loader=PackageLoader("msn_export.reporting", "."),
        autoescape=autoescape,  # noqa: S701  Markdown has its own escapes: _cell
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    opened.filters |= {"cell": _cell, "line": _line, "short": short, "spelled": spelled}
    opened.globals |= {
        "accuracy_rows": accuracy_rows, "file_rows": file_rows, "fit_rows": fit_rows,
        "fused": fused, "multiplied": multiplied, "strips": strips,
        "timed_on": timed_on, "timing_columns": timing_columns, "timing_rows": timing_rows,
        "PARTS": PARTS, "HEADROOM": HEADROOM,
    }  # fmt: skip
    return opened


def _plots(page: Page) -> dict[str, str]:
    drawn = {}
    sized = [artifact for artifact in page.artifacts if artifact.is_file]
    if sized:
        drawn["sizes"] = sizes(sized)
    shown = [
        found
        for found in page.agreements
        if any(image.cosine is not None for image in found.check.per_image)
    ]
    if shown:
        drawn["cosines"] = histogram(shown)
    if page.drifts:
        drawn["drift"] = drift(page.drifts)
        drawn["headroom"] = headroom(page.drifts[0])
    for artifact in page.artifacts:
        if artifact.census is not None:
            drawn[f"kinds {artifact.name}"] = kinds(artifact)
            drawn[f"blocks {artifact.name}"] = per_block(artifact)
    fitted = next((artifact for artifact in page.artifacts if artifact.is_fitted), None)
    if fitted is not None:
        drawn["confusion"] = confused(fitted)
    if page.latency is not None:
        drawn["latency"] = latency(page.latency)
    return drawn


def _cell(text: str) -> str:
    """Keep a file's name or a note from being Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", _line(text))


def _line(text: str) -> str:
    return " ".join(str(text).split())


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
    path.write_text(page.translate(IN_A_TEXT), encoding="utf-8")
