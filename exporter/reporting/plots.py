"""The plots of a report: each an SVG in the colours of its page, with its figures as CSV."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from msn_export.metrics.tolerances import HEADROOM
from msn_export.reporting import confusion
from msn_export.reporting.describe import short, significant
from msn_export.reporting.gather import roles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from msn_export.benchmark.results import Bench
    from msn_export.compare.drift import Drift
    from msn_export.metrics.diagnose import StageDrift
    from msn_export.reporting.gather import ReportedAgreement, ReportedArtifact


@dataclass(frozen=True, slots=True)
class Plot:
    """A plot for a page, and the figures that it shows: a row of ``columns`` each."""

    name: str
    svg: Markup
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]

    @property
    def csv(self) -> str:
        """The figures as CSV (RFC 4180); a figure that was not measured is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text)
        writer.writerow(self.columns)
        writer.writerows([_inert(cell) for cell in row] for row in self.rows)
        return text.getvalue()

    @property
    def uri(self) -> str:
        """The CSV as a data URI: a link to it needs neither a server nor a script."""
        return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(self.csv.encode()).decode()}"


def _inert(cell: object) -> object:
    """Keep a name from being a formula: spreadsheets compute a text that begins with these."""
    if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{cell}"
    return cell


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
    body = re.sub(r"font-family: [^;\"]+", "font-family: var(--sans)", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font: \1 var(--sans)", body)  # matplotlib < 3.11
    return body.replace("<svg ", f'<svg role="img" aria-label="{_quoted(title)}" ', 1)


def _quoted(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


# Colours that stand for the page's: matplotlib writes them, and they become its variables
_INK, SOFT, _LINE = "#010101", "#020202", "#030303"
SERIES = ("#040404", "#050505", "#060606", "#070707", "#010203", "#020304")
_WARN, _PAPER = "#080808", "#090909"
_NAMES = {
    _INK: "--ink", SOFT: "--soft", _LINE: "--line", _WARN: "--bad", _PAPER: "--paper",
    **{colour: f"--series-{index}" for index, colour in enumerate(SERIES)},
}  # fmt: skip
_STYLE: Any = {  # matplotlib types its settings one by one
    "text.parse_math": False,  # a "$" in a file's name is a "$"
    "svg.fonttype": "none",  # text stays text: selectable, searchable, small
    "svg.hashsalt": "msn-export",  # the same figures give the same bytes
    "font.size": 11,
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
_MARKS = "osD^vP"
# Inches of 72 units: on a page of 500 pixels text of 11 units is still as high as 10 of them
WIDE, HALF = 6.4, 4.2
_LEAST_HEADROOM = 0.6  # a stump of a bar
_LEAST = 1e-16  # below fp64's rounding of a cosine nothing is told apart


def draw(
    name: str,
    title: str,
    paint: Callable[[Axes], None],
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    size: tuple[float, float] = (WIDE, 3.0),
) -> Plot:
    """Draw one figure as SVG for a page; ``name`` is part of its ids, ``size`` in inches."""
    with mpl.rc_context():
        mpl.rcdefaults()  # nobody's matplotlibrc, which may lie in the current folder, has a say
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        paint(axes)
        _label_plainly(axes)
        packed = io.StringIO()
        figure.savefig(packed, format="svg", metadata=dict.fromkeys(("Creator", "Date")))
    svg = packed.getvalue()
    for colour, variable in _NAMES.items():
        svg = svg.replace(colour, f"var({variable})")
    # nor larger than that text of 11 units is 15 pixels, which is a page's own
    whole = inline(svg, name, title).replace(
        "<svg ", f'<svg style="max-width: {100 * size[0]:.0f}px" ', 1
    )
    return Plot(name, Markup(whole), tuple(columns), tuple(map(tuple, rows)))  # noqa: S704


def _label_plainly(axes: Axes) -> None:
    """Write the numbers of logarithmic axes as text: matplotlib's own labels are TeX there."""
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = axis.get_view_interval()
            if axis is axes.yaxis and high < 100 * low:  # else it had two numbers, or one
                evenly(axes)
            axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
            axis.set_minor_formatter(NullFormatter())


def _plain(value: float) -> str:
    return re.sub(r"e([+-])0", r"e\1", f"{value:g}")


def histogram(agreements: Sequence[ReportedAgreement]) -> Plot:
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
        colours = [colour_of(index) for index in range(len(gaps))]
        names = [agreement.candidate for agreement in agreements]
        axes.hist(gaps, bins.tolist(), color=colours, label=names)
        axes.set_xscale("log")
        axes.set_xlabel("1 - cosine with the reference (further left is closer)")
        axes.set_ylabel("images")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        legend_above(axes)

    rows = (
        (agreement.candidate, agreement.reference, image.name, image.cosine, image.max_abs)
        for agreement in agreements
        for image in agreement.check.per_image
    )
    columns = ("candidate", "reference", "image", "cosine", "max_abs")
    title = "Histogram of one minus the cosine of each image"
    return draw("cosines", title, paint, columns, rows)


def colour_of(index: int) -> str:
    """Choose the colour of a series."""
    return SERIES[index % len(SERIES)]


def legend_above(axes: Axes) -> None:
    """Name the series above the plot, where nothing is drawn."""
    axes.figure.legend(loc="outside upper left", ncols=2)


def drift(drifts: Sequence[Drift]) -> Plot:
    """Draw the relative error that each stage makes by itself."""

    def paint(axes: Axes) -> None:
        for index, found in enumerate(drifts):
            errors = [_error(stage) for stage in found.stages]
            places = range(len(errors))
            colour, mark = colour_of(index), _MARKS[index % len(_MARKS)]
            axes.plot(
                places, errors, f"{mark}-", color=colour, markersize=4, label=short(found.candidate)
            )
            # infinite where nothing was measured that could limit it
            limits = [_allowed(stage) for stage in found.stages]
            allowed = [limit if math.isfinite(limit) else math.nan for limit in limits]
            label = f"allowed for {short(found.candidate)}"
            axes.plot(places, allowed, "--", color=colour, linewidth=0.9, label=label)
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
        legend_above(axes)

    rows = (
        (
            short(found.candidate), short(found.reference), stage.name,
            None if stage.own is None else stage.own.relative,
            None if stage.own is None else stage.own.allowed,
            stage.name == found.parted,
        )
        for found in drifts
        for stage in found.stages
    )  # fmt: skip
    columns = ("candidate", "reference", "stage", "relative_error", "allowed", "parted")
    return draw("drift", "Relative error of each block by itself", paint, columns, rows)


def _error(stage: StageDrift) -> float:
    """Give a stage's own error; one that could not be compared has no place on the axis."""
    return math.nan if stage.own is None else max(stage.own.relative, _LEAST)


def _allowed(stage: StageDrift) -> float:
    return math.inf if stage.own is None else stage.own.allowed


def _whole_decades(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.set_ylim(10 ** math.floor(math.log10(low)), 10 ** math.ceil(math.log10(high)))


def headroom(found: Drift) -> Plot:
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

    rows = ((stage.name, stage.headroom, stage.peak, stage.peak_tensor) for stage in found.stages)
    columns = ("stage", "headroom", "largest_value", "tensor")
    return draw("headroom", "fp16 headroom of each block", paint, columns, rows, (WIDE, 2.4))


def _stage_names(axes: Axes, found: Drift) -> None:
    """Number the blocks; what comes before and after them is named one line lower."""
    names = [stage.name.removeprefix("block ") for stage in found.stages]
    shown = [name if name.isdigit() else f"\n{name}" for name in names]
    axes.set_xticks(range(len(names)), shown)
    axes.tick_params(axis="x", length=0)
    labels = axes.get_xticklabels()
    labels[0].set_horizontalalignment("left" if shown[0] != names[0] else "center")
    labels[-1].set_horizontalalignment("right" if shown[-1] != names[-1] else "center")
    if len(names) > 20:  # of many blocks each second number is enough
        for label in labels[2::2]:
            label.set_visible(label is labels[-1])
    axes.set_xlabel("block")


def kinds(artifact: ReportedArtifact) -> Plot:
    """Count an engine's kernels by what they do."""
    assert artifact.census is not None
    counts = dict(reversed(roles(artifact.census).items()))
    title = f"Kernels of {artifact.name} by kind"

    def paint(axes: Axes) -> None:
        _bars(axes, counts, str)

    name = f"kinds-{_slug(artifact.name)}"
    return draw(name, title, paint, ("kind", "kernels"), counts.items(), (HALF, 2.3))


def per_block(artifact: ReportedArtifact) -> Plot:
    """Count an engine's kernels by block."""
    assert artifact.census is not None
    counts = artifact.census.kernels_per_block

    def paint(axes: Axes) -> None:
        bars = axes.bar(range(len(counts)), list(counts.values()), color=SERIES[0], width=0.7)
        axes.bar_label(bars, color=SOFT, fontsize=9)
        axes.set_xticks(range(len(counts)), list(map(str, counts)))
        axes.tick_params(length=0)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("block")
        axes.set_ylabel("kernels")

    name, title = f"blocks-{_slug(artifact.name)}", f"Kernels of {artifact.name} by block"
    return draw(name, title, paint, ("block", "kernels"), counts.items(), (HALF, 2.3))


def sizes(artifacts: Sequence[ReportedArtifact]) -> Plot:
    """Compare the files' sizes."""
    sizes = {artifact.name: artifact.inspection.bytes for artifact in reversed(artifacts)}

    def paint(axes: Axes) -> None:
        megabytes = {name: size / 1e6 for name, size in sizes.items()}
        _bars(axes, megabytes, lambda size: f"{significant(size)} MB")

    height = 0.25 + 0.3 * len(sizes)
    title = "Size of each artifact in MB"
    return draw("sizes", title, paint, ("artifact", "bytes"), sizes.items(), (WIDE, height))


def confused(artifact: ReportedArtifact) -> Plot | None:
    """Draw which classes a fitted classifier takes for which; None where that is not there."""
    manifest = artifact.manifest
    found = manifest.fit.accuracy if manifest is not None and manifest.fit is not None else None
    if manifest is None or found is None or found.confusion is None:
        return None
    if len(manifest.labels) > confusion.MATRIX:
        return None
    return matrix(found.confusion, manifest.labels, "the highest logit")


def matrix(pairs: Sequence[Sequence[int]], names: Sequence[str], by: str) -> Plot:
    """Draw a confusion matrix: right answers in one colour, wrong ones in another.

    The stronger a cell, the more of the class's images it holds.

    Args:
        pairs: images [true][predicted].
        names: the classes.
        by: what predicts.
    """

    def paint(axes: Axes) -> None:
        confusion.paint(axes, pairs, names, by, SERIES)

    rows = (
        (names[true], names[predicted], images)
        for true, row in enumerate(pairs)
        for predicted, images in enumerate(row)
        if images
    )
    columns = ("true", "predicted", "images")
    title = f"Confusion matrix of {len(names)} classes by {by}"
    return draw("confusion", title, paint, columns, rows, confusion.size_of(len(names)))


def times(bench: Bench) -> Plot:
    """Draw the time of an image by batch size, both axes logarithmic."""

    def paint(axes: Axes) -> None:
        for index, one in enumerate(bench.timed):
            found = [bench.timing(one.name, batch) for batch in bench.batches]
            each = [timing.median_ms / timing.batch for timing in found]
            above = [max(0.0, timing.p90_ms - timing.median_ms) / timing.batch for timing in found]
            axes.errorbar(
                bench.batches, each, yerr=[[0.0] * len(each), above], label=one.name,
                color=colour_of(index), marker=_MARKS[index % len(_MARKS)], capsize=3,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(list(bench.batches)))
        axes.xaxis.set_minor_locator(NullLocator())
        evenly(axes)
        axes.set_xlabel("batch")
        axes.set_ylabel("ms an image")
        axes.grid()
        legend_above(axes)

    rows = (
        (t.contender, t.batch, t.median_ms / t.batch, t.p90_ms / t.batch, t.median_ms, t.p90_ms)
        for t in bench.timings
    )
    columns = (
        "contender", "batch", "median_ms_per_image", "p90_ms_per_image", "median_ms", "p90_ms"
    )  # fmt: skip
    title = "Time per image, median of all calls; whiskers reach to p90"
    return draw("times", title, paint, columns, rows, (WIDE, 3.4))


def evenly(axes: Axes) -> None:
    """Make equal ratios equally far apart on the vertical axis, with marks at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())


def _bars(axes: Axes, values: Mapping[str, float], form: Callable[[float], str]) -> None:
    bars = axes.barh(range(len(values)), list(values.values()), color=SERIES[0], height=0.62)
    axes.bar_label(bars, [form(value) for value in values.values()], color=_INK, padding=4)
    axes.set_yticks(range(len(values)), list(values))
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.2)


def _slug(name: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in name)
