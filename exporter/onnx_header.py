"""Read what an ONNX file says of itself beside its graph, with the standard library alone.

The file is a protobuf message (onnx/onnx.proto, ``ModelProto``). Its fields are walked, and the
graph, which is nearly all of it, is skipped by its length. Everything in a file is hostile: nothing
is read that was not measured first, and what its metadata says is read as strictly as a manifest.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from msn_export import __version__
from msn_export.errors import GraphError, ManifestError
from msn_export.input_files import GRAPH, open_regular
from msn_export.preprocessing import Preprocessing
from msn_export.schema import from_plain, to_json, to_plain
from msn_export.spec import Dtype, ImageSize, Scores, Target
from msn_export.version_table import Row, row_of

# Field numbers of onnx/onnx.proto: of ModelProto, OperatorSetIdProto and StringStringEntryProto
_OPSETS, _GRAPH, _METADATA = 8, 7, 14
_DOMAIN, _VERSION = 1, 2
_KEY, _VALUE = 1, 2
# Wire types: protobuf.dev/programming-guides/encoding
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5

LARGEST = 4 * 2**20  # bytes of all metadata together; 21,000 labels of ImageNet take 0.6 MiB
LARGEST_LABELS = 2**20  # bytes; more are in the manifest alone
_ENTRIES = 1000  # of each kind; ours has ten


@dataclass(frozen=True, slots=True)
class OnnxHeader:
    """An ONNX file's opset (None: it names none) and its ``metadata_props``."""

    opset: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_onnx_header(path: Path) -> OnnxHeader:
    """Walk a file's outermost fields.

    Raises:
        GraphError: it cannot be read, is no ONNX file, or its metadata is larger than any of ours.
    """
    try:
        with open_regular(path, GRAPH) as file:
            return _walk(file, os.fstat(file.fileno()).st_size)
    except MalformedError as error:
        raise GraphError(f"{path} is not an ONNX file ({error}); export it again") from error


class MalformedError(Exception):
    """A file that is no ONNX file, with the reason."""


def _walk(file: BinaryIO, size: int) -> OnnxHeader:
    opset, metadata, read, has_graph = None, dict[str, str](), 0, False
    for number, wire, length, _ in fields(file, size):
        has_graph |= number == _GRAPH and wire == _LENGTH
        if number not in {_OPSETS, _METADATA} or wire != _LENGTH:
            file.seek(length, os.SEEK_CUR)
            continue
        read += length
        if read > LARGEST or len(metadata) > _ENTRIES:
            raise MalformedError(f"its metadata is larger than {LARGEST} bytes")
        found = _message(file.read(length))
        if number == _METADATA:
            metadata[text(found.get(_KEY, b""))] = text(found.get(_VALUE, b""))
        elif text(found.get(_DOMAIN, b"")) in {"", "ai.onnx"}:
            version = found.get(_VERSION)
            opset = version if isinstance(version, int) else None
    if not has_graph:
        raise MalformedError("no graph in it")
    return OnnxHeader(opset, metadata)


def fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Give each field's number, wire type, the bytes that follow, and its value, up to ``end``.

    Whoever takes one leaves the file at that field's end. A number is read here: no bytes follow
    it; the value of all else is 0.
    """
    while file.tell() < end:
        tag = varint(file)
        number, wire = tag >> 3, tag & 7
        length = value = 0
        if wire == _VARINT:
            value = varint(file)
        elif wire in {_FIXED64, _FIXED32}:
            length = 8 if wire == _FIXED64 else 4
        elif wire == _LENGTH:
            length = varint(file)
        else:
            raise MalformedError(f"wire type {wire} at byte {file.tell()}")
        if not number or length > end - file.tell():
            raise MalformedError(f"a field of {length} bytes where {end - file.tell()} are left")
        yield number, wire, length, value


def _message(content: bytes) -> dict[int, int | bytes]:
    """Read a small message's numbers and texts; of a field that comes twice the last."""
    import io

    found: dict[int, int | bytes] = {}
    file = io.BytesIO(content)
    while file.tell() < len(content):
        tag = varint(file)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            found[number] = varint(file)
        elif wire == _LENGTH:
            length = varint(file)
            if length > len(content) - file.tell():
                raise MalformedError(f"a text of {length} bytes in {len(content)}")
            found[number] = file.read(length)
        else:
            raise MalformedError(f"wire type {wire} in its metadata")
    return found


def varint(file: BinaryIO | Any) -> int:
    number = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise MalformedError("it is cut short")
        number |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return number
    raise MalformedError("a number of more than 64 bits")


def text(value: int | bytes) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else ""
    except UnicodeDecodeError as error:
        raise MalformedError("metadata that is not UTF-8") from error


UNSEALED = "no manifest beside it: labels and preprocessing are read from the file itself, unsealed"
PRODUCT = "product"  # names us; another tool's keys may be called as ours are


@dataclass(frozen=True, slots=True)
class GraphMetadata:
    """The part of a manifest that a graph's own file holds, so that it can be served alone.

    No hash seals it: it may have been changed after it was written. ``target`` is None in files of
    before it was written.
    """

    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()
    scores: Scores | None = None
    target: Target | None = None
    dtype: Dtype | None = None

    def __post_init__(self) -> None:
        """Leave out labels that are too many for a file's head."""
        if len(_json(self.labels).encode()) > LARGEST_LABELS:
            object.__setattr__(self, "labels", ())

    @property
    def row(self) -> Row | None:
        """Its row of the version table, None where that is not known."""
        return row_of(self.target, self.dtype) if self.dtype is not None else None

    def require_fit(self, size: ImageSize, channels: int, name: str) -> None:
        """Refuse preprocessing that makes other images than the graph takes."""
        own = self.preprocessing
        if own is not None and (own.size, own.channels) != (size, channels):
            raise ManifestError(
                f"{name} takes images of {size} with {channels} channels, and its own metadata "
                f"makes them of {own.size} with {own.channels}; export it again"
            )

    def props(self) -> dict[str, str]:
        """Write it as ``metadata_props``."""
        return {
            PRODUCT: f"msn-export {__version__}",
            "preprocessing": to_json(self.preprocessing).strip(),
            "labels": _json(self.labels),
            "scores": self.scores or "",
            "target": self.target or "",
            "dtype": self.dtype or "",
        }

    @classmethod
    def of(cls, path: Path) -> "GraphMetadata | None":
        """Read it from an ONNX file; None where another tool wrote that.

        Raises:
            GraphError: it is not an ONNX file.
            ManifestError: what is in it is not what this version writes.
        """
        props = read_onnx_header(path).metadata
        if not props.get(PRODUCT, "").startswith("msn-export "):
            return None
        where = f"{path.name}, its metadata"
        try:
            plain = {
                "preprocessing": json.loads(props.get("preprocessing", "null")),
                "labels": json.loads(props.get("labels", "[]")),
                **{name: props.get(name) or None for name in ("scores", "target", "dtype")},
            }
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{where}: it is not JSON ({error}); export it again") from error
        return from_plain(cls, plain, where)


def _json(labels: tuple[str, ...]) -> str:
    return json.dumps(to_plain(labels), ensure_ascii=False, separators=(",", ":"))
