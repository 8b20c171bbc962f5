"""Read what an engine file says of itself, without TensorRT and without a GPU.

Layout of a TensorRT-RTX engine (1.5 to 1.7, little endian), found by building one graph for each
compute capability, for several and for none, and comparing:

======  =====  =========================================================================
offset  bytes  meaning
======  =====  =========================================================================
0       4      ``vtrt``
8       8      number of sections
16      8      size of the file
24      4      TensorRT-RTX version: major, minor, patch, build
28      4      ``vtrt``
32      8      compute capabilities, a bit each (below)
56      8      size of the weights
64      24     a section: name as 8 bytes reversed (``ENGN``, ``WGHT``), offset, size
======  =====  =========================================================================

Full TensorRT writes ``ftrt``, a 4-byte serialisation version and, at 24, its version
(NVIDIA/TensorRT samples/trtexec, --getPlanVersionOnly); the rest is not read here.
Everything in a file is hostile: nothing is indexed that was not measured first.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msn_export.errors import EngineFileError
from msn_export.input_files import ENGINE, open_regular
from msn_export.spec import ComputeCapability, Targets

_RTX = b"vtrt"
_FULL = b"ftrt"
_PLAN = b"ptrt"  # first bytes of the ENGN section
_HEADER = struct.Struct("<4s4xQQ4B4sQ16xQ")
_SECTION = struct.Struct("<4s4xQQ")
# The plan repeats the version at its byte 20: four numbers, each behind a tag.
_VERSION_AGAIN = struct.Struct("<" + "4sB" * 4)
_TAG = b"\x02\x80\x01\x00"
_SEARCHED = 1 << 20  # bytes in which a tool's prefix is looked for

# Bit of the mask -> capability; bit 6 alone is set where none was named ("Ampere and later").
CAPABILITIES = tuple(
    ComputeCapability(*pair) for pair in ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
)
_LATER = 1 << 6
ANY_GPU = "MSN_EXPORT_ANY_GPU"  # tries TensorRT-RTX where its maker promises nothing


def may_target(capability: ComputeCapability) -> bool:
    """True for GPUs that TensorRT-RTX compiles for: all it knows, and those after the last."""
    return capability in CAPABILITIES or capability > max(CAPABILITIES)


def tries_any_gpu() -> bool:
    return os.environ.get(ANY_GPU) == "1"


@dataclass(frozen=True, slots=True)
class EngineHeader:
    """Claims of an engine; sizes in bytes.

    ``targets`` is empty and ``weight_bytes`` None where the format has none (full TensorRT).
    """

    backend: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    bytes: int
    targets: Targets = Targets()
    weight_bytes: int | None = None


def read_header(path: Path) -> EngineHeader:
    with open_regular(path, ENGINE) as file:
        start = file.read(_SEARCHED)
        size = os.fstat(file.fileno()).st_size
    return parse_header(start, path, size)


def parse_header(start: bytes, path: Path, size: int | None = None) -> EngineHeader:
    """Read the header of an engine in memory; ``start`` is its first MiB at least.

    ``size`` is the whole file's in bytes, where ``start`` is not all of it.
    """
    size = len(start) if size is None else size
    if start[:4] == _RTX:
        return _read_rtx(path, start, size)
    if start[:4] == _FULL:
        return _read_full(path, start, size)
    raise EngineFileError(_describe_foreign(path, start[:_SEARCHED]))


def _read_rtx(path: Path, start: bytes, size: int) -> EngineHeader:
    if size < _HEADER.size or len(start) < _HEADER.size:
        raise _damaged(path, f"it ends after {size} bytes, inside its header")
    _, sections, claimed, *version, again, mask, weights = _HEADER.unpack_from(start)
    if again != _RTX:
        raise _damaged(path, "its header is not TensorRT-RTX's")
    if claimed != size:
        kind = "truncated" if size < claimed else "longer than it should be"
        raise _damaged(path, f"it is {kind}: {size} bytes, and its header says {claimed}")
    found = _read_sections(path, start, size, sections)
    if _version_again(start) not in {None, tuple(version)}:
        raise _damaged(path, "it gives two versions of TensorRT-RTX")
    if found.get("WGHT") != weights:
        raise _damaged(path, "its header gives two sizes for the weights")
    unknown = mask & ~(_LATER | ((1 << len(CAPABILITIES)) - 1))
    if not mask or unknown:
        raise EngineFileError(
            f"engine {path} claims GPUs that this version of msn-export does not know (mask "
            f"{mask:#x}); it is damaged, or made by a newer TensorRT-RTX: upgrade msn-export"
        )
    return EngineHeader(
        "tensorrt-rtx",
        ".".join(map(str, version)),
        size,
        Targets(
            tuple(item for bit, item in enumerate(CAPABILITIES) if mask >> bit & 1),
            bool(mask & _LATER),
        ),
        weights,
    )


def _read_sections(path: Path, start: bytes, size: int, count: int) -> dict[str, int]:
    """Read the table of sections: name -> size, each in the file and after the one before."""
    if not 1 <= count <= 16 or _HEADER.size + count * _SECTION.size > len(start):
        raise _damaged(path, f"its header lists {count} sections")
    sections: dict[str, int] = {}
    end = _HEADER.size + count * _SECTION.size
    for index in range(count):
        name, offset, length = _SECTION.unpack_from(start, _HEADER.size + index * _SECTION.size)
        if offset < end or length > size - offset:
            raise _damaged(path, "a section lies outside the file")
        end = offset + length
        sections[name[::-1].decode("ascii", "replace")] = length
        if name == b"NGNE" and start[offset : offset + 4] != _PLAN:
            raise _damaged(path, "its engine section does not hold an engine")
    if "ENGN" not in sections:
        raise _damaged(path, "it has no engine section")
    return sections


def _version_again(start: bytes) -> tuple[int, ...] | None:
    """Read the version out of the plan; None where it is not where 1.5 to 1.7 put it."""
    offset = start.find(_PLAN, _HEADER.size) + 20
    if offset < 20 or len(start) < offset + _VERSION_AGAIN.size:
        return None
    fields = _VERSION_AGAIN.unpack_from(start, offset)
    return fields[1::2] if set(fields[::2]) == {_TAG} else None


def _read_full(path: Path, start: bytes, size: int) -> EngineHeader:
    if len(start) < 28:
        raise _damaged(path, f"it ends after {size} bytes, inside its header")
    if start[4:8] != bytes(4) or start[24] < 8:
        raise _damaged(path, "its header is not TensorRT's")
    return EngineHeader("tensorrt", ".".join(str(byte) for byte in start[24:28]), size)


def _describe_foreign(path: Path, start: bytes) -> str:
    if not start:
        return f"engine {path} is empty"
    for magic in (_RTX, _FULL):
        offset = start.find(magic)
        if offset > 0:
            what = "JSON metadata" if b"{" in start[:8] else "something else"
            return (
                f"engine {path} has {offset} bytes of {what} before it, as other tools write; "
                f"TensorRT cannot load it so: cut them off (tail -c +{offset + 1})"
            )
    what = "an ONNX graph" if path.suffix == ".onnx" else f"it begins {start[:8].hex(' ')}"
    return f"{path} is not a TensorRT engine ({what})"


def _damaged(path: Path, why: str) -> EngineFileError:
    return EngineFileError(f"engine {path} is damaged: {why}; build it again")
