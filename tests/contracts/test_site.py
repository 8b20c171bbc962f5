"""The site builds strictly from the pages, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
pytestmark = [
    pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="there are no docs here"),
    pytest.mark.skipif(find_spec("material") is None, reason="mkdocs-material is not installed"),
]
LOADED = re.compile(r"<(?:link|script|img|source|iframe)\b[^>]*?(?:href|src|srcset)=\"?([^\s\">]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def build(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess:
    # not --quiet: it turns --strict off
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    return subprocess.run(
        [*command, "--config-file", config, "--site-dir", folder],
        capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip


def test_every_page_is_in_the_site(site) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        name = "index" if page.name == "README.md" else page.stem
        assert (site / f"{name}.html").is_file(), page.name
    assert (site / "CHANGELOG.html").is_file()
    assert (site / "CONTRIBUTING.html").is_file()


def test_what_pages_link_to_outside_of_docs_is_in_the_site(site) -> None:
    assert (site / "benchmarks" / "results" / "lowshot.json").is_file()
    text = (site / "lowshot.html").read_text(encoding="utf-8")
    assert 'href="benchmarks/results/lowshot.json"' in text


def test_no_page_loads_from_elsewhere(site) -> None:
    for page in site.rglob("*.html"):
        for target in LOADED.findall(page.read_text(encoding="utf-8")):
            assert "://" not in target, f"{page.name} loads {target}"
            assert not target.startswith("//"), f"{page.name} loads {target}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_tables_are_tables(site) -> None:
    for page in site.glob("*.html"):
        assert not re.search(r"\|\s*-{3,}", page.read_text(encoding="utf-8")), page.name


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text("# A\n\n[b](missing.md)\n")
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = tmp_path / "mkdocs.yml"
    kept = re.sub(r"^(nav|hooks|extra_css):.*?(?=^\S|\Z)", "", text, flags=re.S | re.M)
    config.write_text(kept)
    done = build(tmp_path / "site", config)
    assert done.returncode == 1
    assert "missing.md" in done.stderr
