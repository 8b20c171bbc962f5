"""What docs/embed.md says of other programs reads what embed writes."""

import re
from pathlib import Path

import pytest

from tests.builders.embeds import embed
from tests.builders.tiny_artifacts import classifier, pictures

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "embed.md"
pytestmark = pytest.mark.skipif(not DOCUMENT.is_file(), reason="there are no docs here")
COUNT, BROKEN = 12, 0
READERS = ("pandas", "polars", "duckdb", "faiss", "usearch")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of which the first has an error, as a table and an index."""
    folder = tmp_path_factory.mktemp("docs")
    images = pictures(folder / "photographs", COUNT, (BROKEN,))
    result = embed(classifier(folder), images, folder / "photographs.usearch")
    assert result.exit_code == 0, result.output
    return folder


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "package",
    [name if name == "usearch" else pytest.param(name, marks=pytest.mark.slow) for name in READERS],
)
def test_other_programs_read_what_is_written(written, monkeypatch, capsys, package) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed; make slow installs it")
    (block,) = [text for text in blocks() if re.search(rf"^(import|from) {package}\b", text, re.M)]
    monkeypatch.chdir(written)
    names: dict[str, object] = {}
    # the tiny model's vectors have 64 numbers
    exec(block.replace("FLOAT[384]", "FLOAT[64]"), names)  # noqa: S102  our own document
    if "vectors" in names:
        assert names["vectors"].shape == (COUNT - 1, 64)
    if package == "duckdb":
        assert names["nearest"][0] == ("a/002.png", pytest.approx(1, abs=1e-6))
        assert len(names["nearest"]) == 10
    if package == "faiss":
        assert names["rows"][0][0] == 0
        assert names["cosines"][0][0] == pytest.approx(1, abs=1e-6)
    if package == "usearch":
        first, *_ = capsys.readouterr().out.splitlines()
        assert first.startswith("a/002.png 1.0") or first.startswith("a/002.png 0.99999")


def test_the_whole_path_and_the_source_of_the_rows_are_read(written, monkeypatch, capsys) -> None:
    (block,) = [text for text in blocks() if "schema.metadata" in text]
    monkeypatch.chdir(written)
    names: dict[str, object] = {}
    exec(block, names)  # noqa: S102  our own document
    assert names["picture"] == written / "photographs" / "a" / "002.png"
    assert capsys.readouterr().out.startswith(f"{names['picture']} ")


@pytest.mark.slow
def test_the_line_that_finds_the_same_picture_twice_is_run(written, monkeypatch) -> None:
    duckdb = pytest.importorskip("duckdb", reason="make slow installs it")
    (line,) = re.findall(r"^`(SELECT sha256, .*)`\.$", DOCUMENT.read_text(), re.MULTILINE)
    monkeypatch.chdir(written)
    assert duckdb.sql(line).fetchall() == []
    assert len(duckdb.sql(line.replace("> 1", "= 1")).fetchall()) == COUNT - 1


def test_every_example_is_run() -> None:
    assert len(blocks()) == len(READERS) + 1
