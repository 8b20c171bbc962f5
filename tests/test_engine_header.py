"""What an engine file tells without TensorRT, and that a damaged one is never believed."""

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msn_export.engine_header import EngineHeader, read_header
from msn_export.errors import EngineFileError
from msn_export.spec import ComputeCapability, Targets
from tests.builders.engine_builds import built, rtx
from tests.builders.engine_graphs import Vit


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine of our own to damage."""
    copy = tmp_path / "vit.engine"
    copy.write_bytes(built(Vit()).output.read_bytes())
    return copy


@pytest.mark.parametrize("targets", ["7.5", "8.9", "12.0", "8.6 8.9", "7.5 8.0 8.6 8.9 12.0 12.1"])
def test_capabilities_are_those_asked_for(targets: str) -> None:
    result = built(Vit(), targets)
    header = read_header(result.output)
    assert header.targets.named == tuple(map(ComputeCapability.parse, targets.split()))
    assert header.targets == result.targets
    assert not header.targets.later


def test_no_capability_means_ampere_and_later() -> None:
    header = read_header(built(Vit(), "").output)
    assert [str(item) for item in header.targets.named] == ["8.0", "8.6", "8.9", "12.0", "12.1"]
    assert header.targets.later


def test_the_rest_of_the_header() -> None:
    result = built(Vit())
    header = read_header(result.output)
    assert header == EngineHeader(
        "tensorrt-rtx",
        rtx().version,
        result.bytes,
        Targets((ComputeCapability(8, 9),)),
        weight_bytes=header.weight_bytes,
    )
    halves = result.census.weight_bytes["Half"]
    assert header.weight_bytes == pytest.approx(halves, rel=0.01)


def test_full_tensorrt_tells_its_version(tmp_path: Path) -> None:
    path = tmp_path / "full.engine"
    path.write_bytes(b"ftrt" + bytes(20) + bytes([10, 9, 0, 34]) + bytes(100))
    assert read_header(path) == EngineHeader("tensorrt", "10.9.0.34", 128)
    path.write_bytes(b"ftrt" + b"\1" + bytes(120))
    with pytest.raises(EngineFileError, match="its header is not TensorRT's"):
        read_header(path)


def put(data: bytes, offset: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, offset, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "is empty"),
        (lambda data: data[:20], "it ends after 20 bytes, inside its header"),
        (lambda data: data[:-1], "it is truncated: .* bytes, and its header says"),
        (lambda data: data[:90], "it is truncated: 90 bytes"),
        (lambda data: data + b"\0", "it is longer than it should be"),
        (lambda data: put(data, 8, "<Q", 2**60), "its header lists 1152921504606846976 sections"),
        (lambda data: put(data, 8, "<Q", 0), "its header lists 0 sections"),
        (lambda data: put(data, 28, "<I", 0), "its header is not TensorRT-RTX's"),
        (lambda data: b"f" + data[1:], "its header is not TensorRT's"),
        (lambda data: put(data, 26, "B", 9), "it gives two versions of TensorRT-RTX"),
        (lambda data: put(data, 32, "<Q", 0), r"claims GPUs .* does not know \(mask 0x0\)"),
        (lambda data: put(data, 32, "<Q", 1 << 40), r"\(mask 0x10000000000\); it is damaged, or"),
        (lambda data: put(data, 56, "<Q", 1), "gives two sizes for the weights"),
        (lambda data: put(data, 72, "<Q", 2**64 - 8), "a section lies outside the file"),
        (lambda data: put(data, 80, "<Q", 2**64 - 8), "a section lies outside the file"),
        (lambda data: put(data, 64, "<I", 0), "it has no engine section"),
        (lambda data: put(data, 112, "<I", 0), "its engine section does not hold an engine"),
        (lambda data: b'\x11\0\0\0{"task": "embed"}' + data, r"21 bytes of JSON metadata before"),
        (lambda data: b"MSNX" + data, r"4 bytes of something else before it, .*tail -c \+5"),
        (lambda data: b"\x08\x0b\x12\x07pytorch", r"is not a TensorRT engine \(it begins 08 0b 12"),
    ],
)  # fmt: skip
def test_a_damaged_engine_says_what_is_wrong(
    engine: Path, change: Callable[[bytes], bytes], message: str
) -> None:
    engine.write_bytes(change(engine.read_bytes()))
    with pytest.raises(EngineFileError, match=message):
        read_header(engine)


def test_a_missing_file_and_a_graph(tmp_path: Path) -> None:
    with pytest.raises(EngineFileError, match=r"absent\.engine does not exist; give an"):
        read_header(tmp_path / "absent.engine")
    graph = tmp_path / "vit.onnx"
    graph.write_bytes(b"\x08\x0b")
    with pytest.raises(EngineFileError, match=r"is not a TensorRT engine \(an ONNX graph\)"):
        read_header(graph)


def test_no_flip_in_the_header_is_believed(engine: Path) -> None:
    """Only which GPUs are claimed cannot be checked: each is one bit. The manifest's hash can."""
    data, before = engine.read_bytes(), read_header(engine)
    flips = np.random.default_rng(0)
    for offset, bit in zip(flips.integers(112, size=300), flips.integers(8, size=300), strict=True):
        engine.write_bytes(put(data, int(offset), "B", data[offset] ^ 1 << int(bit)))
        try:
            header = read_header(engine)
        except EngineFileError:
            continue
        assert replace(header, targets=before.targets) == before


@pytest.mark.parametrize("seed", range(5))
def test_no_truncation_or_noise_crashes(engine: Path, seed: int) -> None:
    data, choose = engine.read_bytes(), np.random.default_rng(seed)
    for _ in range(40):
        start = data[: choose.integers(200)]
        engine.write_bytes(start + choose.bytes(choose.integers(200)))
        with pytest.raises(EngineFileError):
            read_header(engine)
