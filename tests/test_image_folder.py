"""A folder of pictures: all that it holds, in order, and what is broken by name."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from msn_export import image_folder
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
