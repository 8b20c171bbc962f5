"""Files that are read: regular ones alone, and no more bytes than a file of their kind can have.

A pipe, a device or a folder is refused before a byte is read: reading one may never end.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

from msn_export.errors import (
    CheckpointError,
    EngineFileError,
    GraphError,
    ImageError,
    ManifestError,
    MsnExportError,
    OutputError,
    SpecError,
)


class FileKind(NamedTuple):
    """A kind of file: its noun, the most bytes it can have, and the error of one that is refused.

    ``hint`` ends the message.
    """

    noun: str
    limit: int
    error: type[MsnExportError]
    hint: str = "give another file"


_MIB = 2**20
# Limits: some ten times the largest file of the kind that was seen, or protobuf's own
GRAPH = FileKind("graph", 2**31 - 1, GraphError, "give an .onnx or .engine file")
ENGINE = FileKind("engine", 64 * 2**30, EngineFileError, "give an .onnx or .engine file")
MANIFEST = FileKind("manifest", 16 * _MIB, ManifestError, "export the artifact again")
CONFIGURATION = FileKind("configuration", 16 * _MIB, CheckpointError)  # labels of 21k classes: 1
RANGES = FileKind("ranges file", 64 * _MIB, ManifestError)  # of the largest published shape: 6
ISLANDS = FileKind("islands file", 16 * _MIB, GraphError)
BENCH = FileKind(
    # its samples: 20,000 calls of a fast engine are 0.2
    "benchmark",
    64 * _MIB,
    SpecError,
    "write it with 'msn-export bench … --json > FILE.json'",
)
TIMING_CACHE = FileKind("timing cache", 1024 * _MIB, OutputError)
TABLE = FileKind("table", 1024 * _MIB, ImageError)  # ten million pictures
JOURNAL = FileKind("journal", 4096 * _MIB, OutputError)
TRITON_CONFIG = FileKind("configuration", _MIB, SpecError)
HASHED = FileKind("file", 2**50, SpecError)
TRITON_LABELS = FileKind("label file", 16 * _MIB, SpecError)


def artifact_kind(path: Path) -> FileKind:
    """Name the kind of an artifact by its ending, as every command does."""
    return GRAPH if path.suffix == ".onnx" else ENGINE


def read_bytes(path: Path, kind: FileKind) -> bytes:
    """Read a whole file; ``kind.error`` where it is no regular file, or too large."""
    with open_regular(path, kind) as file:
        try:
            return file.read(os.fstat(file.fileno()).st_size)  # and not what is written meanwhile
        except OSError as error:
            raise _unreadable(path, kind, error) from error


def read_text(path: Path, kind: FileKind) -> str:
    """Read a whole file of UTF-8."""
    try:
        return read_bytes(path, kind).decode()
    except UnicodeDecodeError as error:
        raise kind.error(f"{kind.noun} {path} is not text in UTF-8 ({error})") from error


def read_json(path: Path, kind: FileKind) -> Any:
    """Read a file of JSON, which may be nested as deeply as Python can follow."""
    text = read_text(path, kind)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise kind.error(f"{kind.noun} {path} is not JSON ({error})") from error


def require_regular(path: Path, kind: FileKind) -> int:
    """Refuse what ``read_bytes`` refuses, for a library that opens the file itself.

    Returns:
        Its size in bytes.
    """
    with open_regular(path, kind) as file:
        return os.fstat(file.fileno()).st_size


@contextmanager
def open_regular(path: Path, kind: FileKind) -> Iterator[BufferedReader]:
    """Open a file for reading; ``kind.error`` where it is no regular file, or too large."""
    try:
        _require_kind(path, kind, path.stat())  # first: to open a device may do something
        # what has become a pipe since is not waited for
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _unreadable(path, kind, error) from error
    try:
        _require_kind(path, kind, os.fstat(descriptor))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _require_kind(path: Path, kind: FileKind, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise kind.error(f"{kind.noun} {path} is {what}; {kind.hint}")
    if status.st_size > kind.limit:
        raise _too_large(path, kind, status.st_size)


def _unreadable(path: Path, kind: FileKind, error: Exception) -> MsnExportError:
    if isinstance(error, FileNotFoundError):
        return kind.error(f"{kind.noun} {path} does not exist; {kind.hint}")
    reason = error.strerror if isinstance(error, OSError) else error  # a null in its name
    return kind.error(f"{kind.noun} {path} cannot be read: {reason}")


def _too_large(path: Path, kind: FileKind, size: int) -> MsnExportError:
    return kind.error(
        f"{path} is larger than {'an' if kind.noun[0] in 'aei' else 'a'} {kind.noun} can be "
        f"({size:,} bytes, at most {kind.limit:,}); {kind.hint}"
    )
