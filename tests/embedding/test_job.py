"""A run's pictures have one order and one fingerprint, wherever the folder lies."""

import os
from pathlib import Path

import pytest

from msn_export.embedding.job import list_pictures
from tests.builders.tiny_artifacts import pictures


def test_names_and_fingerprint_are_those_below_the_folder(tmp_path, monkeypatch) -> None:
    for place in ("one", "two/deeper"):
        pictures(tmp_path / place, 4)
    one, two = list_pictures(tmp_path / "one"), list_pictures(tmp_path / "two/deeper")
    assert list(one.names()) == [str(path.relative_to(tmp_path / "one")) for path in one.paths]
    assert (list(one.names()), one.sha256) == (list(two.names()), two.sha256)
    monkeypatch.chdir(tmp_path / "one")
    assert list(list_pictures(Path()).names()) == list(one.names())
    assert list_pictures(Path()).sha256 == one.sha256


def test_the_size_of_each_file_and_when_it_was_written_are_kept(tmp_path) -> None:
    found = list_pictures(pictures(tmp_path, 2))
    os.utime(found.paths[1], ns=(0, 1_700_000_000_123_456_000))
    found = list_pictures(tmp_path)
    assert list(found.sizes) == [path.stat().st_size for path in found.paths]
    assert found.changed[1] == 1_700_000_000_123_456


def test_names_are_below_the_root_wherever_the_command_runs(tmp_path, monkeypatch) -> None:
    folder = pictures(tmp_path / "some/pictures", 2)
    listed = tmp_path / "list.txt"
    listed.write_text("some/pictures/a/000.png\n")
    away = tmp_path / "away"
    away.mkdir()
    (away / "list.txt").write_text(f"{folder}/b/001.png\n")
    monkeypatch.chdir(folder)
    for given in (folder, Path(), Path("../pictures"), folder / "a/000.png", listed):
        found = list_pictures(given)
        assert [
            (Path(found.root) / name).samefile(path)
            for name, path in zip(found.names(), found.paths, strict=True)
        ] == [True] * len(found)
        assert Path(found.root).is_absolute()
    outside = list_pictures(away / "list.txt")  # whole paths
    assert (outside.root, *outside.names()) == ("", f"{folder}/b/001.png")


def test_one_more_byte_or_another_name_is_another_fingerprint(tmp_path) -> None:
    before = list_pictures(pictures(tmp_path, 2))
    (path, _) = before.paths
    path.write_bytes(path.read_bytes() + b"x")
    longer = list_pictures(tmp_path)
    path.rename(path.with_name("z.png"))
    assert len({before.sha256, longer.sha256, list_pictures(tmp_path).sha256}) == 3


def test_one_file_is_called_by_its_name(tmp_path) -> None:
    (path,) = list_pictures(pictures(tmp_path, 1)).paths
    assert list(list_pictures(path).names()) == [path.name]


@pytest.mark.parametrize("name", [b"caf\xe9.png", "café.png".encode()])
def test_bytes_that_are_no_text_are_written_as_escapes(tmp_path, name) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"")
    assert list(list_pictures(tmp_path).names()) == [name.decode("utf-8", "backslashreplace")]
