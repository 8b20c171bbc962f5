"""A folder of pictures: all that it holds, in order, and what is broken by name."""

import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from msn_export import image_folder, images
from msn_export.errors import ImageError
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize

SMALL = preset("hf", ImageSize(32, 32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.JPG", "deep/er/c.bmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), "teal").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def test_pictures_are_found_at_every_depth_in_order(folder) -> None:
    found = [str(path.relative_to(folder)) for path in image_folder.find(folder).paths]
    assert found == ["a.JPG", "b.png", "deep/er/c.bmp"]
    assert image_folder.find(folder / "b.png").paths == (folder / "b.png",)


def test_a_table_or_a_list_names_pictures_that_may_lie_elsewhere(folder, tmp_path_factory) -> None:
    table = tmp_path_factory.mktemp("table") / "pictures.txt"
    table.write_text(f"{folder / 'b.png'}\n{folder / 'a.JPG'}\n")
    (table.parent / "own.png").write_bytes((folder / "b.png").read_bytes())
    table.with_suffix(".csv").write_text(f"path\n{folder / 'b.png'}\nown.png\n")
    assert image_folder.find(table).paths == (folder / "b.png", folder / "a.JPG")
    found = image_folder.load(table.with_suffix(".csv"), SMALL, 5)
    assert found.names == (str(folder / "b.png"), "own.png")
    again = image_folder.load_named(table.with_suffix(".csv"), found.names, SMALL)
    assert (again.pixels == found.pixels).all()


def test_a_pattern_names_files_below_its_folder(folder) -> None:
    found = image_folder.find(folder / "**" / "*.[bp]*")
    assert [found.name_of(path) for path in found.paths] == ["b.png", "deep/er/c.bmp"]
    assert found.base == folder
    with pytest.raises(ImageError) as error:
        image_folder.find(folder / "*.tiff")
    assert str(error.value) == f"the pattern {folder / '*.tiff'} matches no file"
    (folder / "set[1]").mkdir()
    Image.new("RGB", (4, 3)).save(folder / "set[1]" / "a.png")
    assert len(image_folder.find(folder / "set[1]").paths) == 1  # a folder of that name


def test_what_is_none_or_hidden_is_skipped_and_counted_by_reason(folder, monkeypatch) -> None:
    picture = Image.new("RGB", (40, 30), "teal")
    (folder / ".ipynb_checkpoints").mkdir()
    picture.save(folder / ".ipynb_checkpoints" / "a-checkpoint.png")
    picture.save(folder / ".hidden.png")
    picture.save(folder / "c.jfif", format="JPEG")
    picture.save(folder / "no ending", format="PNG")
    picture.save(folder / "wrong.txt", format="GIF")
    (folder / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (folder / "new.avif").write_bytes(b"\0\0\0\x18ftypavif")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "linked").symlink_to(folder / "deep")
    (folder / "linked.png").symlink_to(folder / "b.png")
    os.mkfifo(folder / "pipe.png")  # reading one would wait for ever
    monkeypatch.setattr(images, "_formats", lambda: images.FORMATS)
    found = image_folder.find(folder)
    names = [str(path.relative_to(folder)) for path in found.paths]
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert names == [
        "a.JPG", "b.png", "c.jfif", "deep/er/c.bmp", "linked.png", "no ending", "wrong.txt",
    ]  # fmt: skip
    heic = "HEIC picture, which needs pillow-heif (pip install 'msn-export[heic]')"
    avif = "AVIF picture, which needs Pillow 11.3 or later with its AVIF decoder"
    assert found.skipped == {
        heic: 1, avif: 1, "dangling link": 1, "hidden": 2, "link to a folder": 1, "no file": 1,
        "no picture": 1,
    }  # fmt: skip
    loaded = image_folder.load(folder, SMALL, 20)
    assert len(loaded.names) == 7
    assert loaded.skipped == found.skipped
    assert image_folder.notes_on(loaded.broken, loaded.skipped, loaded.turned) == (
        f"skipped 2 hidden, 1 {avif}, 1 {heic}, 1 dangling link, 1 link to a folder, 1 no file, "
        "1 no picture",
    )


def test_no_file_whose_ending_says_what_it_is_is_opened_to_list_it(folder, monkeypatch) -> None:
    opened = []

    def refuse(path: str, *options: Any, **more: Any) -> Any:
        opened.append(Path(path).name)
        return open(path, *options, **more)  # noqa: PTH123

    monkeypatch.setattr(image_folder, "open", refuse, raising=False)
    image_folder.find(folder)
    assert opened == ["notes.txt"]


def test_folders_may_be_nested_deeper_than_python_recurses(tmp_path) -> None:
    made = [tmp_path]
    while len(made) < sys.getrecursionlimit() + 100:
        made.append(made[-1] / "d")
        made[-1].mkdir()
    picture = made[-1] / "a.png"
    Image.new("RGB", (4, 4)).save(picture)
    assert image_folder.find(tmp_path).paths == (picture,)
    picture.unlink()
    for folder in reversed(made[1:]):  # pytest's own cleaning recurses
        folder.rmdir()


def test_a_folder_of_pictures_that_cannot_be_read_says_why(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setattr(images, "_formats", lambda: images.FORMATS)
    with pytest.raises(ImageError) as raised:
        image_folder.find(tmp_path)
    assert str(raised.value) == (
        f"image folder {tmp_path} holds no picture that can be read (skipped 1 HEIC picture, which "
        "needs pillow-heif (pip install 'msn-export[heic]'))"
    )


def test_turned_pictures_are_counted(folder) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(folder / "phone.jpg", exif=exif)
    loaded = image_folder.load(folder, SMALL, 10)
    assert (loaded.turned, len(loaded.names)) == (1, 4)
    assert "pictures turned by their EXIF orientation: 1" in image_folder.notes_on(
        loaded.broken, loaded.skipped, loaded.turned
    )
    assert image_folder.load(folder, replace(SMALL, exif="ignore"), 10).turned == 0


def test_broken_ones_are_named_and_the_others_read(folder) -> None:
    (folder / "broken.png").write_bytes(b"not a picture")
    loaded = image_folder.load(folder, SMALL, 10)
    assert loaded.names == ("a.JPG", "b.png", "deep/er/c.bmp")
    assert loaded.pixels.shape == (3, 32, 32, 3)
    (broken,) = loaded.broken
    assert broken.startswith(f"{folder / 'broken.png'} is not a readable picture (")
    assert image_folder.load(folder / "b.png", SMALL, 10).names == ("b.png",)


def test_a_folder_without_a_picture_that_can_be_read_is_an_error(tmp_path) -> None:
    with pytest.raises(ImageError, match=r"image folder .*none does not exist; give a folder of"):
        image_folder.find(tmp_path / "none")
    with pytest.raises(ImageError, match=r"image folder .* holds no picture that can be read$"):
        image_folder.load(tmp_path, SMALL, 10)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ImageError) as raised:
        image_folder.load(tmp_path, SMALL, 10)
    assert str(raised.value).startswith(
        f"all 2 pictures of {tmp_path} are broken; the first: {tmp_path / 'a.png'} is not a"
    )


@given(st.integers(0, 60), st.integers(1, 20))
def test_a_limit_is_spread_evenly_over_the_list(count, limit) -> None:
    paths = [Path(f"{i:03}") for i in range(count)]
    chosen = image_folder.spread(paths, limit)
    assert len(chosen) == min(count, limit)
    assert chosen == sorted(set(chosen))
    assert chosen[:1] == paths[:1]
    gaps = [int(b.name) - int(a.name) for a, b in pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_a_folder_is_read_part_by_part_and_its_skipped_entries_counted_once(tmp_path) -> None:
    for number in range(7):
        Image.new("RGB", (8, 8), (number * 30, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    whole = image_folder.load(tmp_path, SMALL, 7)
    assert whole.given == 7
    parts = list(image_folder.load_parts(tmp_path, SMALL, None, 3))
    assert [len(part.pixels) for part in parts] == [3, 3, 1]
    assert sum((part.names for part in parts), ()) == whole.names
    assert [part.given for part in parts] == [7, 7, 7]
    assert [part.skipped for part in parts] == [{"no picture": 1}, {}, {}]
    some = list(image_folder.load_parts(tmp_path, SMALL, 4, 2))
    assert sum((part.names for part in some), ()) == image_folder.load(tmp_path, SMALL, 4).names


def test_pictures_are_read_again_by_their_names(folder) -> None:
    whole = image_folder.load(folder, SMALL, 10)
    again = image_folder.load_named(folder, whole.names[1:], SMALL)
    assert again.names == whole.names[1:]
    assert (again.pixels == whole.pixels[1:]).all()
    alone = image_folder.load_named(folder / "b.png", ("b.png",), SMALL)
    assert alone.names == ("b.png",)
