"""The file of a usearch index, verified before usearch follows the links in it unchecked.

unum-cloud/usearch 2.26: ``include/usearch/index_dense.hpp``, ``index_dense_head_t``, and
``index.hpp``, ``index_serialized_header_t`` and ``node_t``. In order: how many vectors and bytes a
vector; the vectors; a head; the graph's sizes; a level for each node; the nodes, each with its key,
its level, and a list of links for each level from 0 to its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

from msn_export.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

_HEAD = np.dtype(
    [
        ("magic", "S7"), ("version", "<u2", 3), ("metric", "u1"), ("scalar", "u1"), ("key", "u1"),
        ("slot", "u1"), ("present", "<u8"), ("deleted", "<u8"), ("dimensions", "<u8"),
        ("multi", "u1"), ("rest", "u1", 22),
    ]
)  # fmt: skip
_COSINE, _F32, _U64, _U32 = 99, 11, 14, 15  # metric_kind_t and scalar_kind_t
_GRAPH = np.dtype(
    [("size", "<u8"), ("links", "<u8"), ("base_links", "<u8"), ("top", "<u8"), ("entry", "<u8")]
)
_MOST_LINKS, _MOST_LEVELS = 512, 64
_NUMBERS = 2**21  # of links that are in memory at once


class _Unsound(Exception):  # noqa: N818  the reason, which require_sound turns into an error
    pass


def require_sound(path: Path, *, count: int, dim: int, rows: int) -> None:
    """Require that a file is as long as it says, and that every link leads to a node of it.

    Args:
        path: the file.
        count: vectors that it has.
        dim: numbers of a vector.
        rows: each key is below it.

    Raises:
        OutputError: it is not.
    """
    try:
        _Nodes.of(path, count, dim).require_links(rows)
    except _Unsound as error:
        raise OutputError(
            f"{path} is no index that msn-export wrote: {error}; embed again"
        ) from error


@dataclass(frozen=True, slots=True)
class _Nodes:
    """The nodes of a file: where each begins, its level, and how many links a level has."""

    data: NDArray[np.uint8]
    starts: NDArray[np.int64]
    levels: NDArray[np.int64]
    links: int
    base_links: int
    entry: int

    @classmethod
    def of(cls, path: Path, count: int, dim: int) -> Self:
        size = path.stat().st_size
        head_at = 8 + count * dim * 4
        graph_at = head_at + _HEAD.itemsize
        levels_at = graph_at + _GRAPH.itemsize
        nodes_at = levels_at + 2 * count
        _require(count > 0 < dim and nodes_at < size, f"{size} bytes for {count} vectors")
        data: NDArray[np.uint8] = np.memmap(path, np.uint8, "r")
        _require_head(data[:8].view("<u4"), data[head_at:graph_at].view(_HEAD)[0], count, dim)
        graph = data[graph_at:levels_at].view(_GRAPH)[0]
        links, base, top, entry = (int(graph[n]) for n in ("links", "base_links", "top", "entry"))
        _require(
            1 <= links <= base <= _MOST_LINKS and top < _MOST_LEVELS and graph["size"] == count,
            "its graph has other sizes",
        )
        levels = data[levels_at:nodes_at].view("<i2").astype(np.int64)
        _require(
            levels.min() >= 0 and levels.max() == top and entry < count and levels[entry] == top,
            "its levels contradict each other",
        )
        ends = nodes_at + np.cumsum(10 + 4 * (1 + base) + levels * 4 * (1 + links))
        _require(int(ends[-1]) == size, "its length is another than that of its nodes")
        starts = np.concatenate([[nodes_at], ends[:-1]])
        return cls(data, starts, levels, links, base, entry)

    def require_links(self, rows: int) -> None:
        """Require that keys are rows, each once, and that links lead to nodes of their level."""
        count = len(self.levels)
        keys = np.empty(count, np.uint64)
        step = max(1, _NUMBERS // (1 + self.base_links))
        for at in range(0, count, step):
            nodes = np.arange(at, min(at + step, count))
            keys[nodes] = self._read(self.starts[nodes], "<u8", 1)[:, 0]
            levels = self._read(self.starts[nodes] + 8, "<i2", 1)[:, 0]
            _require((levels == self.levels[nodes]).all(), "a node has another level")
            for level, linked in self._links(nodes):
                _require((linked < count).all(), "a link leads out of it")
                _require(
                    (self.levels[linked] >= level).all(), "a link leads to a node below its level"
                )
        _require(
            keys.max() < rows and len(np.unique(keys)) == count,
            "its keys are not rows of the table",
        )

    def _links(self, nodes: NDArray[np.intp]) -> Iterator[tuple[int, NDArray[np.uint32]]]:
        """Give the nodes that some nodes link to, level by level."""
        for level in range(int(self.levels[nodes].max()) + 1):
            some = self.starts[nodes[self.levels[nodes] >= level]] + 10
            width = self.links if level else self.base_links
            if level:
                some = some + 4 * (1 + self.base_links) + (level - 1) * 4 * (1 + self.links)
            table = self._read(some, "<u4", 1 + width)
            _require((table[:, 0] <= width).all(), "a node has more links than its level holds")
            yield level, table[:, 1:][np.arange(width) < table[:, :1]]

    def _read(self, places: NDArray[np.int64], kind: str, count: int) -> NDArray[np.uint32]:
        """Read some numbers [n, count] at each of places [n]."""
        size = np.dtype(kind).itemsize * count
        found: NDArray[np.uint32] = self.data[places[:, None] + np.arange(size)].view(kind)
        return found


def _require_head(shape: NDArray[np.uint32], head: NDArray[np.void], count: int, dim: int) -> None:
    _require(head["magic"] == b"usearch" and head["version"][0] == 2, "its head is not usearch 2's")
    kinds = [int(head[name]) for name in ("metric", "scalar", "key", "slot", "multi", "deleted")]
    _require(kinds == [_COSINE, _F32, _U64, _U32, 0, 0], "it holds no float32 vectors for cosines")
    _require(
        (*shape.tolist(), head["present"], head["dimensions"]) == (count, 4 * dim, count, dim),
        "it holds other vectors",
    )


def _require(holds: object, why: str) -> None:
    if not holds:
        raise _Unsound(why)
