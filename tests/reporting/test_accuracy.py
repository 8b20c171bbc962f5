"""The page of an accuracy: it loads nothing, shows hostile names as text, and stays readable."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msn_export.metrics.accuracy import WrongImage, accuracy
from msn_export.reporting.accuracy import (
    LISTED,
    MATRIX,
    AccuracyPage,
    class_rows,
    shares,
    visible,
    write_page,
)
from msn_export.reporting.plots import matrix
from tests.builders.pages import read
from tests.fakes.browser import chromium, look_at

HOSTILE = '<img src=x onerror="alert(1)">&{{ 7 * 7 }}$\\frac{$'
TURNED = "gnp\u202eexe\x1b[2J"
NAMES = (HOSTILE, TURNED, "cat")
PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def measured(classes: tuple[str, ...] = NAMES, images: int = 90, wrong: int = 6) -> Any:
    """Make an accuracy of seeded answers; each wrong one is the next class."""
    labels = np.arange(images) % len(classes)
    scores = np.eye(len(classes))[labels]
    rows = np.random.default_rng(0).permutation(images)[:wrong]
    scores[rows] = np.roll(scores[rows], 1, axis=1)
    return accuracy(scores, labels, classes)


def page(**changes: Any) -> AccuracyPage:
    fields: dict[str, Any] = {
        "model": f"{HOSTILE}.onnx",
        "labelled": f"set {TURNED}",
        "logits": measured(),
        "neighbours": measured(wrong=20),
        "voters": "20 neighbours in the other pictures",
        "wrong": (WrongImage(f"a/{TURNED}.png", HOSTILE, "cat"), WrongImage("b.png", "cat", None)),
        "thumbnails": (PIXEL, ""),
        "facts": (("runner", HOSTILE), ("broken", f"{TURNED} \udcff")),
        "notes": (f"a note on {TURNED}",),
        "command": f"msn-export evaluate {HOSTILE}",
        "written": "today",
        "product": "msn-export 0.1.0",
    }
    return AccuracyPage(**{**fields, **changes})


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "accuracy.html"
    write_page(page(), path)
    return path


def text_of(path: Path) -> str:
    body = re.sub(r"<(style|svg).*?</\1>", " ", path.read_text("utf-8"), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", " ", body).split())


def test_it_loads_nothing_and_names_its_parts_once(written) -> None:
    reader, text = read(written), written.read_text("utf-8")
    assert all(target.startswith(("#", "data:")) for target in reader.fetched)
    assert not re.search(r"@import|url\((?!#)|<script", text)
    assert "default-src 'none'" in text
    assert reader.tags.count("svg") == 2
    assert len(reader.ids) == len(set(reader.ids))


def test_a_hostile_name_stays_text_and_what_cannot_be_seen_is_shown(written) -> None:
    text = written.read_text("utf-8")
    assert read(written).tags.count("img") == 1  # the one thumbnail
    assert "{{ 7 * 7 }}" in text
    assert "49" not in text_of(written)
    assert not re.search("[\u202e\x1b\udcff]", text)
    assert r"gnp\u202eexe\x1b[2J" in text_of(written)
    assert r"\udcff" in text
    assert r"$\frac{$" in text


def test_it_has_the_figures_with_their_intervals(written) -> None:
    text = text_of(written)
    assert "93.3 % top-1; 95 % interval 86.2 to 96.9 %" in text
    assert "77.8 % by 20 neighbours in the other pictures; 95 % interval 68.2 to 85.1 %" in text
    assert "All 6 mistakes" not in text  # two of them are shown
    assert "The 2 clearest of 6 mistakes, as the model sees the pictures" in text
    assert "no number , truly cat" in text
    assert "cannot be read any more" in text
    assert re.search(r"cat 30 \d\d \d\d\.\d % \d\d\.\d to \d+\.\d % \d\d\.\d %", text)


def test_without_logits_all_is_by_neighbours(tmp_path) -> None:
    write_page(page(logits=None), tmp_path / "p.html")
    text = text_of(tmp_path / "p.html")
    assert "top-1" not in text
    assert "By 20 neighbours in the other pictures; intervals are" in text
    assert "by neighbours" not in text  # no column of its own


def test_without_a_mistake_it_says_so(tmp_path) -> None:
    write_page(page(logits=measured(wrong=0), wrong=(), thumbnails=()), tmp_path / "p.html")
    text = text_of(tmp_path / "p.html")
    assert "No class was taken for another." in text
    assert "No picture was taken wrongly." in text


def test_of_ten_thousand_classes_the_confused_pairs_are_listed(tmp_path) -> None:
    names = tuple(f"c{number:05}" for number in range(10_000))
    labels, guesses = np.arange(1_100), np.arange(1_100)
    guesses[:30] = 9_999
    scores = np.zeros((1_100, 10_000), np.float32)
    scores[labels, guesses] = 1
    write_page(page(logits=accuracy(scores, labels, names), neighbours=None), tmp_path / "p.html")
    text = text_of(tmp_path / "p.html")
    assert "With 10,000 classes the matrix is too large to draw" in text
    assert "The 30 most confused pairs of classes" in text
    assert "c00029 c09999 1 100.0 %" in text
    assert f"The {LISTED:,} least right classes" in text
    assert "c00999 1 1 100.0 %" in text
    assert "c01000 1 1" not in text
    assert (tmp_path / "p.html").stat().st_size < 1_000_000


# --- plots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 20, 21, MATRIX])
def test_the_matrix_is_drawn_in_the_pages_colours(classes) -> None:
    names = tuple(f"class {number}" for number in range(classes))
    found = measured(names, images=4 * classes, wrong=classes // 2)
    svg = matrix(found.confusion, names, "the highest logit").svg
    title = f"Confusion matrix of {classes} classes by the highest logit"
    assert f' role="img" aria-label="{title}"' in svg
    assert "fill: var(--series-0); fill-opacity:" in svg
    assert "fill: var(--series-1); fill-opacity:" in svg
    assert not re.search(r"#0[1-9]0[1-9]0[1-9]", svg)
    assert (">4</text>" in svg) is (classes <= 20)  # the counts, where there is room
    assert len(svg) < 500_000


def test_a_class_without_images_and_one_that_is_all_wrong_are_drawn() -> None:
    scores = np.eye(3)[[1, 1, 0]]
    found = accuracy(scores, np.array([0, 0, 0]), ("a", "b", "c"))
    assert [(row.name, row.right, row.images) for row in class_rows(found)] == [("a", 1, 3)]
    plot = matrix(found.confusion, tuple(found.per_class), "x")
    assert plot.rows == (("a", "a", 1), ("a", "b", 2))
    ((name, images, right, share, *_),) = shares(found).rows
    assert (name, images, right, share) == ("a", 3, 1, pytest.approx(1 / 3))


def test_classes_come_least_right_first_with_wilsons_interval() -> None:
    rows = class_rows(measured())
    assert [row.share for row in rows] == sorted(row.share for row in rows)
    assert sum(row.right for row in rows) == 84
    assert all(row.interval[0] < row.share <= row.interval[1] for row in rows)


def test_a_long_name_is_cut_beside_a_plot_and_whole_in_the_table(tmp_path) -> None:
    names = ("n" * 60, "b", "c")
    assert f"{'n' * 27}…</text>" in matrix(measured(names).confusion, names, "x").svg
    write_page(page(logits=measured(names), neighbours=None), tmp_path / "p.html")
    assert "n" * 60 in text_of(tmp_path / "p.html")


@pytest.mark.parametrize(
    ("text", "shown"),
    [("plain", "plain"), ("dög", "dög"), ("\u202e", r"\u202e"), ("a\nb\t", r"a\nb\t"),
     ("\u200b\ufeff", r"\u200b\ufeff"), ("\udcff", r"\udcff"), ("猫 ", "猫 ")],
)  # fmt: skip
def test_what_cannot_be_seen_is_written_as_its_escape(text, shown) -> None:
    assert visible(text) == shown


# --- in a browser ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "dark"), [(1200, True), (390, False)])
def test_a_browser_shows_it_without_an_error_and_nothing_sticks_out(written, width, dark) -> None:
    with chromium(width, dark=dark) as opened:
        look_at(opened, written)
        assert opened.get_log("browser") == []
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        background, fills = opened.execute_script(
            "const style = e => getComputedStyle(e);"
            "return [style(document.body).backgroundColor,"
            " [...document.querySelectorAll('svg text')].map(e => style(e).fill)]"
        )
        assert background == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
        brightness = [np.mean([int(n) for n in re.findall(r"\d+", fill)[:3]]) for fill in fills]
        assert min(brightness) > 110 if dark else max(brightness) < 110
        assert opened.execute_script("return document.images[0].naturalWidth") == 1
