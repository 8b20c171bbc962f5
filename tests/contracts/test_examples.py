"""The examples run as their READMEs say, and show what they claim."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msn_export.runtime import open_runner
from tests.builders.pages import read
from tests.builders.tiny_artifacts import classifier

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MAPS = EXAMPLES / "attention_maps"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the example as a script; give what it prints, or why it ended."""
    script = MAPS / "attention_maps.py"
    sys.argv[:] = [str(script), *map(str, arguments)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return str(end.code)
    return capsys.readouterr().out.strip()


@pytest.fixture(autouse=True)
def _own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])


@pytest.fixture(scope="module")
def overlay() -> Any:
    return runpy.run_path(str(MAPS / "attention_maps.py"))["overlay"]


def test_maps_of_attention_are_drawn_over_photographs(photographs, tmp_path, capsys) -> None:
    graph = classifier(tmp_path, heads=("features", "attention"))
    page = tmp_path / "page.html"
    assert run(capsys, graph, photographs, page) == f"{page}: 8 pictures, 2 heads"
    reader, text = read(page), page.read_text("utf-8")
    assert reader.tags.count("img") == 8 * (1 + 1 + 2)
    assert all(target.startswith("data:image/jpeg;base64,") for target in reader.fetched)
    names = sorted(path.name for path in photographs.iterdir())[:8]
    assert re.findall("<h2>(.*?)</h2>", text) == names
    with open_runner(graph) as runner:
        maps = runner(sorted(photographs.iterdir())[:8]).attention
    drawn = [f"{each.max():.1%}" for own in maps for each in (own.mean(axis=0), *own)]
    assert re.findall(r"peak ([\d.]+%)\"", text) == drawn


def test_a_picture_is_as_it_is_at_the_peak_and_dark_where_nothing_is_looked_at(overlay) -> None:
    pixels = np.full((32, 32, 3), 200, np.uint8)
    weights = np.zeros((4, 4), np.float32)
    weights[1, 2] = 0.3
    shown = np.asarray(overlay(pixels, weights))
    assert (shown[11:13, 19:21] > 170).all()  # the middle of the patch
    assert (shown[:4, :4] == 40).all()
    assert (shown[24:] == 40).all()


def test_a_model_without_the_head_and_a_folder_that_is_none_are_one_line(
    photographs, tmp_path, capsys
) -> None:
    graph = classifier(tmp_path, heads=("cls",))
    assert run(capsys, graph, photographs, tmp_path / "page.html") == (
        f"error: {graph} has no output 'attention'; export it with --head attention"
    )
    assert "error: image folder " in run(capsys, graph, tmp_path / "none", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_every_example_has_a_readme_that_names_its_script() -> None:
    folders = [path for path in EXAMPLES.iterdir() if path.is_dir() and path.name[0] not in "._"]
    assert folders
    for folder in folders:
        assert f"examples/{folder.name}/{folder.name}.py" in (folder / "README.md").read_text()
        assert (folder / f"{folder.name}.py").is_file()
