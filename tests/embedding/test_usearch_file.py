"""A usearch file whose links lead out of it is refused before usearch follows them."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from usearch.index import Index

from msn_export.embedding.usearch_file import require_sound
from msn_export.errors import OutputError

COUNT, DIM, ROWS = 400, 8, 1200
HEAD = 8 + COUNT * DIM * 4
GRAPH, LEVELS = HEAD + 64, HEAD + 64 + 40
NODES = LEVELS + 2 * COUNT


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Vectors of every third row, on three levels."""
    index = Index(ndim=DIM, metric="cos", dtype="f32")
    vectors = np.random.default_rng(0).standard_normal((COUNT, DIM)).astype(np.float32)
    index.add(np.arange(0, ROWS, 3, dtype=np.uint64), vectors, threads=1)
    path = tmp_path_factory.mktemp("index") / "i.usearch"
    index.save(str(path))
    return path.read_bytes()


def refused(content: bytes, path: Path, **sizes: int) -> str:
    path.write_bytes(content)
    with pytest.raises(OutputError) as error:
        require_sound(path, **{"count": COUNT, "dim": DIM, "rows": ROWS, **sizes})
    return str(error.value)


def changed(content: bytes, kind: str, at: int, value: int) -> bytes:
    found = bytearray(content)
    struct.pack_into(f"<{kind}", found, at, value)
    return bytes(found)


def test_what_usearch_writes_is_sound(written, tmp_path) -> None:
    (tmp_path / "i.usearch").write_bytes(written)
    require_sound(tmp_path / "i.usearch", count=COUNT, dim=DIM, rows=ROWS)
    levels = np.frombuffer(written, "<i2", COUNT, LEVELS)
    assert levels.max() >= 1  # links of several levels were read


FAULTS = [
    ("I", 0, COUNT + 1, "it holds other vectors"),
    ("I", 4, DIM * 2, "it holds other vectors"),
    ("B", HEAD, 0, "its head is not usearch 2's"),
    ("H", HEAD + 7, 3, "its head is not usearch 2's"),
    ("B", HEAD + 13, 105, "it holds no float32 vectors for cosines"),  # inner products
    ("B", HEAD + 14, 10, "it holds no float32 vectors for cosines"),
    ("Q", HEAD + 25, 1, "it holds no float32 vectors for cosines"),  # a deleted one
    ("Q", HEAD + 17, 7, "it holds other vectors"),
    ("Q", GRAPH, COUNT - 1, "its graph has other sizes"),
    ("Q", GRAPH + 8, 2**63, "its graph has other sizes"),
    ("Q", GRAPH + 16, 2**32, "its graph has other sizes"),
    ("Q", GRAPH + 24, 99, "its graph has other sizes"),
    ("Q", GRAPH + 32, COUNT, "its levels contradict each other"),
    ("h", LEVELS, -1, "its levels contradict each other"),
    ("h", LEVELS, 99, "its levels contradict each other"),
    ("h", LEVELS, 1, "its length is another than that of its nodes"),
    ("Q", NODES, ROWS, "its keys are not rows of the table"),
    ("Q", NODES, 3, "its keys are not rows of the table"),  # the second's key
    ("h", NODES + 8, 1, "a node has another level"),
    ("I", NODES + 10, 33, "a node has more links than its level holds"),
    ("I", NODES + 14, COUNT, "a link leads out of it"),
]


@pytest.mark.parametrize(("kind", "at", "value", "why"), FAULTS)
def test_a_file_that_contradicts_itself_is_refused(written, tmp_path, kind, at, value, why) -> None:
    message = refused(changed(written, kind, at, value), tmp_path / "i.usearch")
    assert message == (
        f"{tmp_path / 'i.usearch'} is no index that msn-export wrote: {why}; embed again"
    )


def test_a_link_of_an_upper_level_leads_to_a_node_of_that_level(written, tmp_path) -> None:
    levels = np.frombuffer(written, "<i2", COUNT, LEVELS).astype(np.int64)
    sizes = 10 + 4 * 33 + levels * 4 * 17
    upper, low = int(np.flatnonzero(levels)[0]), int(np.flatnonzero(levels == 0)[0])
    at = NODES + int(sizes[:upper].sum()) + 10 + 4 * 33
    found = refused(changed(written, "I", at + 4, low), tmp_path / "i.usearch")
    assert "a link leads to a node below its level" in found


CUT: list[tuple[Callable[[bytes], bytes], dict[str, int], str]] = [
    (lambda content: content[:-1], {}, "its length is another than that of its nodes"),
    (lambda content: content + b"x", {}, "its length is another than that of its nodes"),
    (lambda content: content[:HEAD], {}, f"{HEAD} bytes for {COUNT} vectors"),
    (lambda _: b"", {}, f"0 bytes for {COUNT} vectors"),
    (bytes, {"count": 2**62}, "bytes for 4611686018427387904 vectors"),
    (bytes, {"count": 0}, "bytes for 0 vectors"),
    (bytes, {"dim": DIM + 1}, "its head is not usearch 2's"),
]


@pytest.mark.parametrize(("spoil", "sizes", "why"), CUT)
def test_a_file_of_another_length_is_refused(written, tmp_path, spoil, sizes, why) -> None:
    assert why in refused(spoil(written), tmp_path / "i.usearch", **sizes)
