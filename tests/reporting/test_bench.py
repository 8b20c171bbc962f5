"""The page of a benchmark: one file that fetches nothing and shows what was measured."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from msn_export.reporting.bench import memory, ratios, write_page
from msn_export.reporting.describe import significant
from msn_export.schema import to_plain
from tests.builders.benches import made_up
from tests.builders.pages import read


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "bench.html"
    write_page(made_up(), path)
    return path


def test_it_fetches_nothing_and_is_small(page) -> None:
    text = page.read_text()
    assert all(target.startswith(("#", "data:")) for target in read(page).fetched)
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|url\((?!#)", text)
    assert page.stat().st_size < 1_000_000


def test_it_has_the_plots_and_a_row_for_each_time(page) -> None:
    reader = read(page)
    assert reader.tags.count("svg") == 3
    assert len(reader.ids) == len(set(reader.ids))
    text = page.read_text()
    for timing in made_up().timings:
        assert f'<td class="number">{significant(timing.median_ms, 4)}</td>' in text
    assert text.count('class="best"') == text.count("(fastest)") == 2  # one of each batch


def test_where_a_ratio_is_too_noisy_no_fastest_is_marked_and_it_says_why(tmp_path) -> None:
    first, *rest = made_up().timings
    noisy = replace(first, noisy="quartiles of the ratio are 0.7 and 1.1")
    write_page(made_up(timings=(noisy, *rest)), tmp_path / "bench.html")
    text = (tmp_path / "bench.html").read_text()
    assert text.count("(fastest)") == 1  # of the other batch
    assert "Too noisy, run again on an idle machine: eager at batch 1, quartiles of the" in text


def test_the_data_of_each_plot_is_there_to_download(page) -> None:
    links = re.findall(r'<a download="(\w+)\.csv" href="data:text/csv;', page.read_text())
    assert links == ["times", "ratios", "memory"]
    assert ratios(made_up()).rows[0] == ("eager", 1, 1, 1.0)
    assert len(ratios(made_up()).rows) == 3 * 2 * 10
    assert memory(made_up()).rows[0] == ("eager", 1, 10**8, None)


def test_colours_are_those_of_the_page(page) -> None:
    text = page.read_text()
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "var(--ink)" in text
    assert not re.search(r"#0[1-9]0[1-9]0[1-9]", text)


def test_its_data_is_inside(page) -> None:
    text = page.read_text()
    (data,) = re.findall(r'<script type="application/json" id="bench">(.*?)</script>', text, re.S)
    assert json.loads(data) == to_plain(made_up())


def test_a_hostile_name_stays_text(tmp_path) -> None:
    name = '</script><img src=x onerror="alert(1)">.onnx'
    write_page(made_up(names=("eager", name)), tmp_path / "bench.html")
    assert "img" not in read(tmp_path / "bench.html").tags


def test_a_dollar_in_a_name_is_a_dollar_in_the_plots(tmp_path) -> None:
    write_page(made_up(names=("eager", r"a$\frac{$.onnx")), tmp_path / "bench.html")
    assert read(tmp_path / "bench.html").tags.count("svg") == 3


def test_it_is_rendered_without_an_error(page, tmp_path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0",
        "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "CONSOLE" not in run.stderr
    assert run.stdout.count("<svg") == 3
