"""The page of an accuracy: confusion matrix, accuracy of each class, pictures taken wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from msn_export.metrics.accuracy import Accuracy, WrongImage, wilson
from msn_export.reporting.confusion import MATRIX, label, visible
from msn_export.reporting.plots import SERIES, SOFT, WIDE, Plot, draw, matrix
from msn_export.reporting.render import environment

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

PLOTTED = 40  # classes whose accuracies are drawn, the least right ones
LISTED = 1000  # classes in the table, the least right ones
_HIT = SERIES[0]


@dataclass(frozen=True, slots=True)
class AccuracyPage:
    """All that the page shows.

    ``logits`` and ``neighbours`` are accuracies by what tells the classes, one of them at least;
    ``voters`` says whose neighbours. ``wrong`` are some pictures that were taken wrongly, and
    ``thumbnails`` show them as data URIs, empty where one could not be read again. ``facts`` are
    rows of a name and a text.
    """

    model: str
    labelled: str
    logits: Accuracy | None
    neighbours: Accuracy | None
    voters: str
    wrong: tuple[WrongImage, ...]
    thumbnails: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    command: str
    written: str
    product: str

    @property
    def main(self) -> Accuracy:
        """The accuracy by logits, or by neighbours where there are none."""
        found = self.logits or self.neighbours
        assert found is not None, "one of them is measured"
        return found

    @property
    def wrong_in_all(self) -> int:
        """Count all mistakes."""
        return self.main.images - sum(row.right for row in class_rows(self.main))

    @property
    def by(self) -> str:
        """The name of what tells the classes."""
        return "the highest logit" if self.logits is not None else self.voters


@dataclass(frozen=True, slots=True)
class ClassRow:
    """One class: its images, those that are right, and Wilson's interval of their share."""

    name: str
    images: int
    right: int
    share: float
    interval: tuple[float, float]


def class_rows(found: Accuracy) -> list[ClassRow]:
    """Describe each class that has images, the least right first."""
    rows = []
    for name, share in found.per_class.items():
        if share is not None:
            images = found.class_images[name]
            right = round(share * images)
            rows.append(ClassRow(name, images, right, share, wilson(right, images)))
    return sorted(rows, key=lambda row: (row.share, row.name))


def shares(found: Accuracy) -> Plot:
    """Draw the accuracy of each class with its interval, the least right first."""
    rows = class_rows(found)[:PLOTTED]

    def paint(axes: Axes) -> None:
        places = range(len(rows))
        middle = [100 * row.share for row in rows]
        below = [100 * max(0.0, row.share - row.interval[0]) for row in rows]
        above = [100 * max(0.0, row.interval[1] - row.share) for row in rows]
        axes.errorbar(
            middle, places, xerr=[below, above], fmt="o", color=_HIT, ecolor=SOFT, capsize=3
        )
        axes.set_yticks(places, [label(row.name) for row in rows])
        axes.tick_params(length=0)
        axes.set(xlim=(-2, 102), ylim=(len(rows) - 0.4, -0.6), xlabel="% of the images are right")
        axes.grid(axis="x")

    figures = ((row.name, row.images, row.right, row.share, *row.interval) for row in rows)
    columns = ("class", "images", "right", "accuracy", "interval_low", "interval_high")
    size = (WIDE, 1.0 + 0.26 * len(rows))
    return draw("classes", "Accuracy of each class", paint, columns, figures, size)


def _plots(page: AccuracyPage) -> Iterator[tuple[str, Plot]]:
    found = page.main
    if found.confusion is not None and len(found.per_class) <= MATRIX:
        yield "matrix", matrix(found.confusion, tuple(found.per_class), page.by)
    yield "classes", shares(found)


def write_page(page: AccuracyPage, path: Path) -> None:
    """Write the page with its plots: one file that loads nothing."""
    opened = environment(autoescape=True)
    # whoever names a class or a file may have put anything in it
    opened.finalize = lambda value: value if isinstance(value, Markup) else visible(str(value))
    text = opened.get_template("accuracy.html.j2").render(
        page=page,
        plots=dict(_plots(page)),
        rows=_rows(page),
        limits={"plotted": PLOTTED, "listed": LISTED},
    )
    path.write_text(text.lstrip(), encoding="utf-8")


def _rows(page: AccuracyPage) -> Sequence[tuple[ClassRow, ClassRow | None]]:
    """Put each class beside what neighbours make of it, where both were asked."""
    beside: dict[str, ClassRow] = {}
    if page.logits is not None and page.neighbours is not None:
        beside = {row.name: row for row in class_rows(page.neighbours)}
    return [(row, beside.get(row.name)) for row in class_rows(page.main)]
