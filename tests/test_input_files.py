"""Files are read where they are regular and not too large; all else is one line at once."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from msn_export.errors import GraphError, ManifestError, SpecError
from msn_export.input_files import (
    GRAPH,
    MANIFEST,
    TRITON_LABELS,
    artifact_kind,
    read_bytes,
    read_json,
    read_text,
    require_regular,
)


def looped(path: Path) -> None:
    path.symlink_to(path.name)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


IRREGULAR: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "graph m.onnx is no regular file; give an .onnx or .engine file"),
    "zero": (
        lambda path: path.symlink_to("/dev/zero"),
        "graph m.onnx is no regular file; give an .onnx or .engine file",
    ),
    "socket": (listening, "graph m.onnx is no regular file; give an .onnx or .engine file"),
    "folder": (Path.mkdir, "graph m.onnx is a folder; give an .onnx or .engine file"),
    "loop": (looped, "graph m.onnx cannot be read: Too many levels of symbolic links"),
    "nothing": (lambda path: None, "graph m.onnx does not exist; give an .onnx or .engine file"),
    "large": (
        lambda path: (path.touch(), os.truncate(path, 2**31)),
        "m.onnx is larger than a graph can be (2,147,483,648 bytes, at most 2,147,483,647); give",
    ),
}


@pytest.mark.parametrize(("make", "message"), IRREGULAR.values(), ids=IRREGULAR.keys())
def test_what_is_no_file_of_its_kind_is_refused_at_once(
    tmp_path, monkeypatch, make, message
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("m.onnx"))
    for read in (read_bytes, read_text, read_json, require_regular):
        with pytest.raises(GraphError) as caught:
            read(Path("m.onnx"), GRAPH)
        assert str(caught.value).startswith(message)


@pytest.mark.parametrize("path", ["", ".", "/", "a\0b", "x" * 9000])
def test_a_path_that_names_no_file_is_refused(path) -> None:
    with pytest.raises(SpecError, match=r"label file .*(is a folder; give another|cannot be read)"):
        read_bytes(Path(path), TRITON_LABELS)


def test_a_file_is_read_whole(tmp_path) -> None:
    path = tmp_path / "m.json"
    path.write_text('{"a": "é"}', encoding="utf-8")
    assert read_json(path, MANIFEST) == {"a": "é"}
    assert require_regular(path, MANIFEST) == 11
    linked = tmp_path / "linked.json"
    linked.symlink_to(path)
    assert read_text(linked, MANIFEST) == '{"a": "é"}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "is not text in UTF-8 ('utf-8' codec can't decode byte 0xff"),
        (b"{", "is not JSON (Expecting property name"),
        (b"[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
    ],
    ids=["text", "json", "deep"],
)
def test_a_file_of_another_form_is_named(tmp_path, content, message) -> None:
    path = tmp_path / "m.onnx.json"
    path.write_bytes(content)
    with pytest.raises(ManifestError) as caught:
        read_json(path, MANIFEST)
    assert f"manifest {path} {message}" in str(caught.value)


def test_a_file_that_becomes_a_pipe_once_it_was_looked_at_is_not_waited_for(
    tmp_path, monkeypatch
) -> None:
    path, other = tmp_path / "m.onnx", tmp_path / "other"
    os.mkfifo(path)
    other.touch()
    before = other.stat()
    monkeypatch.setattr(Path, "stat", lambda self: before)
    with pytest.raises(GraphError, match="is no regular file"):
        read_bytes(path, GRAPH)


def test_an_artifact_that_is_no_onnx_file_is_an_engine() -> None:
    assert artifact_kind(Path("a.onnx")).noun == "graph"
    assert artifact_kind(Path("a.plan")).noun == "engine"
