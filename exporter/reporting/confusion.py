"""A confusion matrix as a plot: which classes are taken for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MATRIX = 100  # classes up to which the matrix is drawn
NAMED = 40  # classes up to which their names are as large as other text
_COUNTED = 20  # classes up to which each cell has its count
_FAINTEST, _STRONGEST = 0.25, 0.6  # of a cell's colour: its count stays readable in either scheme
_NAME = 28  # characters of a class's name beside a plot


def size_of(classes: int) -> tuple[float, float]:
    """Choose the size of the plot, in inches."""
    return 6.4 if classes <= NAMED else 10.4, min(10.0, 2.6 + 0.24 * classes)


def paint(
    axes: Axes,
    confusion: Sequence[Sequence[int]],
    classes: Sequence[str],
    by: str,
    colours: Sequence[str],
) -> None:
    """Fill a cell for each pair of classes that has images, the more of the class the stronger.

    Args:
        axes: what to draw on.
        confusion: images [true][predicted].
        classes: their names.
        by: what predicts.
        colours: of right answers and of wrong ones.
    """
    counts = np.array(confusion, np.int64)
    names = [label(name) for name in classes]
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    places = [(int(y), int(x)) for y, x in zip(*np.nonzero(counts), strict=True)]
    cells = [Rectangle((x - 0.5, y - 0.5), 1, 1) for y, x in places]
    filled = [
        to_rgba(
            colours[0] if y == x else colours[1],
            _FAINTEST + (_STRONGEST - _FAINTEST) * float(shares[y, x]),
        )
        for y, x in places
    ]
    axes.add_collection(PatchCollection(cells, facecolors=filled, edgecolors="none"))
    if len(names) <= _COUNTED:
        for y, x in places:
            axes.text(x, y, str(counts[y, x]), ha="center", va="center", fontsize=8)
    size = 9 if len(names) <= NAMED else 5
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.tick_params(length=0)
    axes.set(
        xlim=(-0.5, len(names) - 0.5),
        ylim=(len(names) - 0.5, -0.5),
        aspect="equal",
        xlabel=f"class by {by}",
        ylabel="true class",
    )


def visible(text: str) -> str:
    """Write characters that cannot be seen, or turn the text around, as their escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in text
    )


def label(name: str) -> str:
    """Shorten a class's name for a plot."""
    shown = visible(name)
    return shown if len(shown) <= _NAME else f"{shown[: _NAME - 1]}…"
