"""Labelled pictures are a folder of folders or a table; what contradicts itself is one line."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from msn_export.errors import ImageError
from msn_export.labelled import read_labelled


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes of three pictures each."""
    for number in range(6):
        picture(tmp_path / "set" / ("cat", "dog")[number % 2] / f"{number}.png", number)
    return tmp_path / "set"


def test_a_folder_of_folders_has_its_classes_in_sorted_order(folder) -> None:
    found = read_labelled(folder)
    assert found.classes == ("cat", "dog")
    assert [path.name for path in found.paths] == ["0.png", "2.png", "4.png", "1.png", "3.png",
                                                   "5.png"]  # fmt: skip
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_picture_beside_the_classes_is_skipped_and_counted(folder) -> None:
    picture(folder / "loose.png", 9)
    (folder / "cat" / "notes.txt").write_text("no picture")
    assert read_labelled(folder).skipped == {"no picture": 1, "picture in no class's folder": 1}


def test_a_table_names_files_beside_it(folder, tmp_path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("label,path\nb,set/cat/0.png\na,set/dog/1.png\nb,set/cat/2.png\n")
    found = read_labelled(table)
    assert found.classes == ("a", "b")
    assert found.labels.tolist() == [1, 0, 1]
    assert found.paths[1] == tmp_path / "set/dog/1.png"


def test_a_parquet_table_is_read_alike(folder, tmp_path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"path": ["set/cat/0.png", "set/dog/1.png"], "label": [7, 3]}
    parquet.write_table(pa.table(rows), tmp_path / "labels.parquet")
    found = read_labelled(tmp_path / "labels.parquet")
    assert found.classes == ("3", "7")
    assert found.labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\nset/cat/0.png\n", "has no column label; its columns are path"),
        ("a,b\n1,2\n", "has no column path and no column label; its columns are a, b"),
        ("path,label\nset/none.png,a\nset/dog/1.png,b\n", "names 1 file ("),
        ("path,label\n", "has no rows"),
        ("path,label\nset/cat/0.png,\nset/dog/1.png,b\n", "has no label for 1 file"),
        ("path,label\nset/cat/0.png,a\nset/dog/1.png,a\n", "has 1 class (a); a classifier needs"),
        ("path,label\nset/cat/0.png,a\nset/cat/0.png,b\n", "one picture in two classes"),
        ("path,label\nset/cat/0.png,a\nset/dog/1.png,b\x1b[2J\n", "is not printable text"),
    ],
)  # fmt: skip
def test_a_table_that_says_nothing_right_is_one_line(folder, tmp_path, text, message) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(text)
    with pytest.raises(ImageError) as error:
        read_labelled(table)
    assert message in str(error.value)
    assert str(error.value).isprintable()


def test_a_file_that_is_no_table_is_refused(tmp_path) -> None:
    (tmp_path / "x.csv").write_bytes(b"path,label\n\xff\xfe,a\n")
    with pytest.raises(ImageError, match="is no table in UTF-8"):
        read_labelled(tmp_path / "x.csv")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not")
    with pytest.raises(ImageError, match="is no parquet file"):
        read_labelled(tmp_path / "x.parquet")


def test_an_empty_class_and_one_class_are_refused(folder) -> None:
    (folder / "eel").mkdir()
    with pytest.raises(ImageError, match=r"has 1 class \(eel\) without a picture"):
        read_labelled(folder)
    with pytest.raises(ImageError, match="has no subfolders"):
        read_labelled(folder / "cat")


def test_one_picture_in_two_classes_is_named_whatever_it_is_called(folder) -> None:
    (folder / "dog" / "copy.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    with pytest.raises(ImageError, match=r"cat/0.png is 'cat' and .*dog/copy.png is 'dog'"):
        read_labelled(folder)


def test_a_copy_within_a_class_counts_once(folder, tmp_path) -> None:
    """Else a fold of cross-validation is tested on what it was trained on."""
    (folder / "cat" / "copy.png").write_bytes((folder / "cat" / "0.png").read_bytes())
    found = read_labelled(folder)
    assert [path.name for path in found.paths[:3]] == ["0.png", "2.png", "4.png"]
    assert (len(found), found.skipped) == (6, {"copy of another picture": 1})
    table = tmp_path / "labels.csv"
    table.write_text("path,label\nset/cat/0.png,a\nset/dog/1.png,b\nset/cat/0.png,a\n")
    assert len(read_labelled(table)) == 2


def test_empty_files_are_no_copies_of_one_picture(folder) -> None:
    for name in ("cat", "dog"):
        (folder / name / "empty.png").touch()
    assert len(read_labelled(folder)) == 8  # decoding them will name them


@pytest.mark.parametrize("name", ["notes.txt", "photo.png", "labels.tsv"])
def test_a_file_that_is_no_table_of_labels_is_one_line(tmp_path, name) -> None:
    (tmp_path / name).write_text("path,label\n")
    with pytest.raises(ImageError) as error:
        read_labelled(tmp_path / name)
    assert str(error.value) == (
        f"{tmp_path / name} is neither a folder with a subfolder for each class nor a .csv or "
        ".parquet with the columns path and label"
    )


def test_a_link_to_a_class_is_said_not_to_be_followed(folder, tmp_path) -> None:
    picture(tmp_path / "elsewhere" / "1.png", 60)
    (folder / "eel").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ImageError, match=r"\(eel\) without .*; links to folders are not followed$"):
        read_labelled(folder)


def test_a_model_with_two_classes_of_one_name_is_refused(folder) -> None:
    with pytest.raises(ImageError) as error:
        read_labelled(folder).as_classes(("dog", "cat", "cat"), "the model")
    assert str(error.value).startswith("the model has more than one class of the name cat, so the")
    found = read_labelled(folder).as_classes(("crane", "cat", "crane", "dog"), "the model")
    assert found.labels.tolist() == [1, 1, 1, 3, 3, 3]  # crane is not asked for


def test_classes_are_matched_by_name(folder) -> None:
    found = read_labelled(folder).as_classes(("dog", "fish", "cat"), "the model")
    assert found.labels.tolist() == [2, 2, 2, 0, 0, 0]
    with pytest.raises(ImageError, match=r"has 1 class \(cat\) that the model lacks"):
        read_labelled(folder).as_classes(("dog", "fish"), "the model")


def test_shots_are_drawn_of_each_class_by_the_seed(folder) -> None:
    found = read_labelled(folder)
    rows = found.drawn(2, seed=0)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert np.bincount(found.labels[rows]).tolist() == [2, 2]
    assert found.drawn(2, seed=0).tolist() == rows.tolist()
    draws = {tuple(found.drawn(1, seed=0, number=number)) for number in range(30)}
    assert len(draws) == 9  # every pair of one cat and one dog
    assert {tuple(found.drawn(1, seed=seed)) for seed in range(30)} == draws
    assert found.drawn(3, seed=0).tolist() == list(range(6))


def test_a_class_with_too_few_pictures_is_named(folder) -> None:
    (folder / "cat" / "2.png").unlink()
    with pytest.raises(ImageError) as error:
        read_labelled(folder).drawn(3, seed=0)
    assert str(error.value) == (
        f"{folder} has 1 class (cat has 2) with fewer than 3 pictures; choose --shots 2 or less, "
        "or add pictures"
    )


def test_pictures_that_another_set_has_too_are_left_out(folder, tmp_path) -> None:
    other = tmp_path / "other"
    (other / "cat").mkdir(parents=True)
    (other / "cat" / "renamed.png").write_bytes((folder / "cat" / "2.png").read_bytes())
    picture(other / "cat" / "new.png", 77)
    picture(other / "dog" / "new.png", 78)
    test, train = read_labelled(other), read_labelled(folder)
    found = test.without(train)
    assert [path.name for path in found.paths] == ["new.png", "new.png"]
    assert found.labels.tolist() == [0, 1]
    assert len(train.without(train)) == 0
    assert found.without(train) is found
