"""``msn-export search``: the nearest pictures of an index, by the model that it was made with."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from pyarrow import parquet

import msn_export
from msn_export.cli import main
from msn_export.errors import MsnExportError
from tests.builders.embeds import embed
from tests.builders.pages import read
from tests.builders.tiny_artifacts import classifier, pictures

COUNT, BROKEN = 24, 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("search"), "--batch", "1:4:8")


@pytest.fixture(scope="module")
def index(model: Path) -> Path:
    """An index of pictures of which one is broken; not to be changed."""
    folder = pictures(model.with_name("set"), COUNT, (BROKEN,))
    result = embed(model, folder, model.with_name("i.usearch"))
    assert result.exit_code == 0, result.output
    return model.with_name("i.usearch")


@pytest.fixture(scope="module")
def asked(index: Path) -> list[Path]:
    """Pictures of the folder that can be read."""
    paths = parquet.read_table(index.with_suffix(".parquet")).to_pylist()
    return [index.with_name("set") / row["path"] for row in paths if row["error"] is None]


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def search(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["search", *map(str, arguments)])


def found(*arguments: object) -> dict[str, Any]:
    result = search(*arguments, "--json")
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def refused(*arguments: object) -> str:
    result = search(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    line: str = result.stderr.strip().splitlines()[-1]
    return line.removeprefix("error: ")


def test_the_nearest_are_those_of_the_vectors_in_the_table(index, asked) -> None:
    told = found(index, *asked[:9], "-k", 4)  # more than a batch
    rows = parquet.read_table(index.with_suffix(".parquet")).to_pylist()
    kept = [number for number, row in enumerate(rows) if row["error"] is None]
    vectors = np.array([rows[number]["embedding"] for number in kept])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (told["images"], told["exact"]) == (COUNT - 1, True)
    for number, query in enumerate(told["queries"]):
        cosines = vectors @ vectors[number]
        order = np.argsort(-cosines)[:4]
        assert query["picture"] == str(asked[number])
        assert [one["row"] for one in query["neighbours"]] == [kept[at] for at in order]
        assert [one["cosine"] for one in query["neighbours"]] == pytest.approx(
            cosines[order], abs=1e-5
        )
        first = query["neighbours"][0]
        assert (first["picture"], first["label"]) == (
            name_of(asked[number]), rows[kept[number]]["label"]
        )  # fmt: skip
    assert "1 of 24 rows have no vector and are not searched" in told["notes"]


def test_a_picture_that_cannot_be_read_is_a_row_with_an_error(index, asked, tmp_path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    first, second = found(index, broken, asked[0], "-k", 1)["queries"]
    assert first["neighbours"] == []
    assert first["error"].startswith(f"{broken} is not a readable picture")
    assert second["neighbours"][0]["picture"] == name_of(asked[0])
    message = refused(index, broken)
    assert message.startswith(f"none of the 1 pictures can be searched for; the first: {broken} is")


def test_the_table_shows_cosine_picture_and_label(index, asked) -> None:
    result = search(index, asked[0], "-k", 2)
    assert result.exit_code == 0, result.output
    assert "1.0000" in result.stdout
    assert name_of(asked[0]) in result.stdout
    assert "23 pictures of" in result.stdout


def test_a_page_shows_thumbnails(index, asked, tmp_path) -> None:
    page = tmp_path / "page.html"
    result = search(index, *asked[:2], "-k", 3, "-o", page)
    assert result.exit_code == 0, result.output
    assert read(page).tags.count("img") == 2 + 2 * 3
    assert refused(index, asked[0], "-o", page).startswith(f"output {page} exists; --force")
    assert search(index, asked[0], "-k", 1, "-o", page, "--force").exit_code == 0
    assert read(page).tags.count("img") == 2


def test_pictures_that_are_gone_or_lie_elsewhere_are_not_shown(model, tmp_path) -> None:
    """A table may name any file; a page shows those below the folder."""
    folder = pictures(tmp_path / "set", 3)
    (only,) = pictures(tmp_path / "elsewhere", 1).rglob("*.png")
    table = folder / "list.txt"
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    table.write_text("\n".join([*names[:2], f"../elsewhere/{only.relative_to(only.parents[1])}"]))
    assert embed(model, table, tmp_path / "i.usearch").exit_code == 0
    query = shutil.copy(folder / names[0], tmp_path / "query.png")
    (folder / names[1]).unlink()
    page = tmp_path / "page.html"
    assert search(tmp_path / "i.usearch", query, "-o", page).exit_code == 0
    assert read(page).tags.count("img") == 2  # the query, and the one that is there
    assert page.read_text().count("cannot be shown") == 2


def test_another_model_is_refused_by_its_hash(index, asked, model, tmp_path) -> None:
    other = classifier(tmp_path, "--batch", "1:4:8", heads=("cls",))
    assert refused(index, asked[0], "--model", other).startswith(
        f"{other} is not the model of {index}: its sha256 is "
    )
    moved = Path(shutil.copy(model, tmp_path / "moved.onnx"))
    shutil.copy(f"{model}.json", f"{moved}.json")
    told = found(index, asked[0], "--model", moved)
    assert told["model"] == str(moved)


def test_a_model_that_was_moved_is_asked_for(index, asked, tmp_path) -> None:
    for path in index.parent.glob("i.*"):
        shutil.copy(path, tmp_path / path.name)
    side = tmp_path / "i.usearch.json"
    gone = json.loads(side.read_text()) | {"model": str(tmp_path / "gone.onnx")}
    side.write_text(json.dumps(gone))
    assert refused(tmp_path / "i.usearch", asked[0]) == (
        f"{tmp_path / 'i.usearch'} was made with {tmp_path / 'gone.onnx'}, which is not there; "
        "name that file with --model"
    )


def test_an_output_that_is_no_page_is_refused(index, asked, tmp_path) -> None:
    assert refused(index, asked[0], "-o", tmp_path / "x.npy") == (
        f"output {tmp_path / 'x.npy'} is a page; name it .html"
    )
    message = refused(index, asked[0], "-o", tmp_path / "none" / "x.html")
    assert "output folder" in message
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_named_before_any_work(
    index, asked, model, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    assert "pip install 'msn-export[search]'" in refused(index, asked[0])
    result = embed(model, index.with_name("set"), tmp_path / "x.usearch")
    assert result.exit_code == 1
    assert "pip install 'msn-export[search]'" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_index_does_not_replace_a_table(index, model, tmp_path) -> None:
    (tmp_path / "x.parquet").write_text("mine")
    result = embed(model, index.with_name("set"), tmp_path / "x.usearch")
    assert result.exit_code == 1
    assert f"output {tmp_path / 'x.parquet'} exists" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_python_searches_alike(index, asked) -> None:
    result = msn_export.search(index, *asked[:2], k=3)
    assert [len(query.neighbours) for query in result.queries] == [3, 3]
    assert result.queries[1].neighbours[0].picture == name_of(asked[1])
    with pytest.raises(MsnExportError, match="a SearchJob takes at least one picture"):
        msn_export.search(index)
