"""Tables of pictures: .csv, .parquet and .txt; what is none is one line."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from msn_export import picture_table
from msn_export.errors import ImageError
from msn_export.input_files import TABLE
from msn_export.picture_table import listed, read_rows


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"picture")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"path,label\na.png,x\nb.png,y\n"),
        ("t.csv", b"\xef\xbb\xbfpath,label\r\na.png,x\r\nb.png,y\r\n"),  # of a spreadsheet
        ("T.CSV", b"label,path\nx,a.png\ny,b.png\n,\n"),
        ("t.csv", b'path,label,more\n"a.png",x,1\nb.png,y,2,3\n'),
    ],
)
def test_a_csv_names_pictures_beside_it(place, name, content) -> None:
    (place / name).write_bytes(content)
    assert read_rows(place / name, ("path", "label")) == [
        (place / "a.png", "x"), (place / "b.png", "y"),
    ]  # fmt: skip


def test_a_list_has_a_path_in_each_line(place) -> None:
    (place / "list.txt").write_text(f"a.png\n\n{place / 'b.png'}\n")
    assert read_rows(place / "list.txt") == [(place / "a.png", ""), (place / "b.png", "")]


@pytest.mark.parametrize("labels", [[7, 3], ["7", "3"], pa.array(["7", "3"]).dictionary_encode()])
def test_a_parquet_may_have_labels_of_any_plain_kind(place, labels) -> None:
    table = pa.table({"path": ["a.png", "b.png"], "label": labels})
    parquet.write_table(table, place / "t.parquet")
    rows = read_rows(place / "t.parquet", ("path", "label"))
    assert [label for _, label in rows] == ["7", "3"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "has no column path; its columns are none"),
        ("t.csv", "path,path\na.png,b.png\n", "has two columns path; rename one"),
        ("t.csv", "path\n", "has no rows; expected the column path"),
        ("t.txt", "\n", "has no rows; expected a path in each line"),
        ("t.txt", "none.png\n", "names 1 file ("),
        ("t.csv", "path\n" + "a" * 5000 + ".png\n", "a…) that does not exist; paths are relative"),
        ("t.csv", "path\na\0b.png\n", "a\\x00b.png') that does not exist"),
        ("t.csv", "path\n.\n", ") that does not exist"),
        ("t.parquet", "path\n", "is no parquet file: "),
    ],
)
def test_a_table_that_names_no_pictures_is_one_line(place, name, text, message) -> None:
    (place / name).write_text(text)
    with pytest.raises(ImageError) as error:
        read_rows(place / name)
    assert message in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": [b"a.png"]}, "the column path is binary; expected text"),
        ({"path": [["a.png"]]}, "the column path is list<element: string>; expected text"),
        ({"path": [{"bytes": "a"}]}, "the column path is struct<bytes: string>; expected text"),
    ],
)
def test_a_column_that_is_no_text_is_refused(place, columns, message) -> None:
    parquet.write_table(pa.table(columns), place / "t.parquet")
    with pytest.raises(ImageError) as error:
        read_rows(place / "t.parquet")
    assert message in str(error.value)


def test_two_columns_of_one_name_are_refused(place) -> None:
    table = pa.Table.from_arrays([pa.array(["a.png"])] * 2, names=["path", "path"])
    parquet.write_table(table, place / "t.parquet")
    with pytest.raises(ImageError, match="has two columns path; rename one"):
        read_rows(place / "t.parquet")


def test_a_parquet_that_unpacks_to_more_than_memory_is_refused(place, monkeypatch) -> None:
    table = pa.table({"path": ["a.png"] * 100_000})
    parquet.write_table(table, place / "t.parquet")
    monkeypatch.setattr(picture_table, "_ROWS", 99_999)
    with pytest.raises(ImageError, match=r"t.parquet has more than 99,999 rows, or 4 GiB of text"):
        read_rows(place / "t.parquet")


def test_a_table_that_is_too_large_is_refused_unread(place, monkeypatch) -> None:
    (place / "t.csv").write_text("path\na.png\n")
    monkeypatch.setattr(picture_table, "TABLE", TABLE._replace(limit=8))
    with pytest.raises(ImageError, match=r"t.csv is larger than a table can be "):
        read_rows(place / "t.csv")


def test_a_file_that_cannot_be_read_is_one_line(place) -> None:
    (place / "t.csv").mkdir()
    with pytest.raises(ImageError, match=r"t.csv is a folder; give another file"):
        read_rows(place / "t.csv")


def test_names_are_counted_and_the_first_shown() -> None:
    assert listed([], "class") == ""
    assert listed(["a"], "class") == "1 class (a)"
    assert listed(["a", "b\n", "c", "d"], "class") == "4 classes (a, 'b\\n', c, …)"
