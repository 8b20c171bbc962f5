"""A confusion matrix fills a cell for each pair of classes that has images."""

import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from msn_export.reporting import confusion

COLOURS = ("#0000ff", "#ff0000")
PAIRS = ((8, 2, 0), (0, 5, 0), (0, 0, 0))


def painted(pairs, names):
    axes = Figure(figsize=confusion.size_of(len(names))).add_subplot()
    confusion.paint(axes, pairs, names, "logits", COLOURS)
    return axes


def test_right_answers_and_wrong_ones_have_their_colours() -> None:
    (cells,) = painted(PAIRS, ("a", "b", "c")).collections
    colours = [tuple(colour) for colour in cells.get_facecolors()]
    assert colours == [
        pytest.approx(to_rgba(COLOURS[0], 0.25 + 0.35 * 0.8)),
        pytest.approx(to_rgba(COLOURS[1], 0.25 + 0.35 * 0.2)),
        pytest.approx(to_rgba(COLOURS[0], 0.6)),
    ]
    places = [path.get_extents().min for path in cells.get_paths()]
    assert [tuple(place) for place in places] == [(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5)]


def test_few_classes_have_counts_and_many_have_none() -> None:
    axes = painted(PAIRS, ("a", "b", "c"))
    assert [text.get_text() for text in axes.texts] == ["8", "2", "5"]
    many = [[int(i == j) for j in range(21)] for i in range(21)]
    assert list(painted(many, [f"class {i}" for i in range(21)]).texts) == []


def test_names_are_short_and_visible() -> None:
    axes = painted(PAIRS, ("a" * 40, "b\x1b[2J", "\u202ec"))
    shown = [label.get_text() for label in axes.get_yticklabels()]
    assert shown == ["a" * 27 + "…", "b\\x1b[2J", "\\u202ec"]


def test_a_matrix_without_images_is_empty() -> None:
    (cells,) = painted(((0, 0), (0, 0)), ("a", "b")).collections
    assert len(cells.get_paths()) == 0


@pytest.mark.parametrize(
    ("classes", "width", "height"), [(2, 6.4, 3.08), (10, 6.4, 5.0), (100, 10.4, 10.0)]
)
def test_the_plot_grows_up_to_a_page(classes, width, height) -> None:
    assert confusion.size_of(classes) == (width, pytest.approx(height))
