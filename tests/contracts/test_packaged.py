"""A wheel is held against the tree before its tests: a missing or other file is named."""

import zipfile
from importlib.metadata import metadata
from pathlib import Path

import pytest
import test_wheel

SHARE = "msn_export-0.1.data/data/share/doc/msn-export"
WRITTEN = {
    "exporter/a.py": "a",
    "exporter/page.j2": "b",
    "models/m.py": "m",
    "calibration/c.py": "c",
    "CHANGELOG.md": "changes",
    "docs/page.md": "page",
    "docs/images/x.svg": "x",
}
PACKED = {"msn_export/a.py": "a", "msn_export/page.j2": "b", "msn_export/models/m.py": "m",
          "msn_export/calibration/c.py": "c", "msn_export-0.1.dist-info/METADATA": "x",
          f"{SHARE}/CHANGELOG.md": "changes", f"{SHARE}/docs/page.md": "page",
          f"{SHARE}/docs/images/x.svg": "x"}  # fmt: skip


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    for name, text in WRITTEN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "exporter/__pycache__").mkdir()
    (tmp_path / "exporter/__pycache__/a.pyc").write_text("compiled")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wheel(folder: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(folder / "x.whl", "w") as packed:
        for name, text in files.items():
            packed.writestr(name, text)
    return folder / "x.whl"


def test_a_wheel_of_the_trees_files_has_no_difference(tree) -> None:
    assert test_wheel.differences(wheel(tree, PACKED)) == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"msn_export/page.j2": None}, ["msn_export/page.j2"]),
        ({"msn_export/models/m.py": "older"}, ["msn_export/models/m.py"]),
        ({"msn_export/left.py": "of another build"}, ["msn_export/left.py"]),
        ({"models/m.py": "m"}, ["models/m.py"]),
        ({f"{SHARE}/CHANGELOG.md": None}, ["share/doc/msn-export/CHANGELOG.md"]),
        ({f"{SHARE}/docs/page.md": "older"}, ["share/doc/msn-export/docs/page.md"]),
    ],
)
def test_each_difference_is_named(tree, change, named) -> None:
    files = {name: text for name, text in {**PACKED, **change}.items() if text is not None}
    assert test_wheel.differences(wheel(tree, files)) == named


def test_metadata_names_author_platform_and_every_python_that_is_tested() -> None:
    of = metadata("msn-export")
    classifiers = of.get_all("Classifier") or []
    assert "maintainers" in of["Author"]
    assert "Operating System :: POSIX :: Linux" in classifiers
    for minor in (11, 12, 13):
        assert f"Programming Language :: Python :: 3.{minor}" in classifiers
    assert of["Requires-Python"] == ">=3.11"
    assert any("arxiv.org/abs/2204.07141" in url for url in of.get_all("Project-URL") or [])


def test_the_tests_of_packaging_are_there() -> None:
    root = Path(__file__).parent.parent.parent
    assert [name for name in test_wheel.PACKAGED if not (root / name).is_file()] == []
