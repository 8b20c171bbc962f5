"""An index for search: the vectors of a table in usearch's format, and what they belong to.

``x.usearch`` has a key for each vector: the number of its row in ``x.parquet`` beside it. Its side
file ``x.usearch.json`` says by hash which model, table and index belong together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.embedding.outputs import write_parquet
from msn_export.embedding.usearch_file import require_sound
from msn_export.errors import ImageError, ManifestError, MissingPackageError, OutputError
from msn_export.manifest import manifest_path, sha256_of
from msn_export.preprocessing import Preprocessing
from msn_export.schema import from_plain, to_json, to_plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from usearch.index import Index

    from msn_export.embedding.job import Listing
    from msn_export.embedding.outputs import Journal

ENDING = ".usearch"
EXACT = 1_000_000  # vectors that a search compares one by one; of more it follows the links
_NUMBERS = 2**21  # of vectors that are in memory at once
_SIDE = 2**20  # bytes of a side file

# n vectors, d numbers a vector


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """The side file of an index of ``indexed`` vectors of ``rows`` rows.

    ``model`` is where the model was, ``folder`` where the pictures were.
    """

    product: str
    model: str
    model_sha256: str
    output_name: str
    preprocessing: Preprocessing
    folder: str
    dim: int
    rows: int
    indexed: int
    table_sha256: str
    index_sha256: str
    schema: int = 1


def table_of(index: Path) -> Path:
    """Name the table whose rows the keys of an index are."""
    return index.with_suffix(".parquet")


def require_usearch() -> None:
    try:
        import usearch.index  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"an index needs usearch ({error}); pip install 'msn-export[search]'"
        ) from error


def write_index(
    journal: Journal,
    listing: Listing,
    labels: Sequence[str],
    about: Mapping[str, Any],
    stage: Path,
    model: Path,
) -> tuple[Path, ...]:
    """Write the table, and an index of those of its vectors that have a direction.

    Returns:
        The table, the side file, the index.

    Raises:
        ImageError: no vector has a direction.
    """
    from usearch.index import Index

    (table,) = write_parquet(journal, listing, labels, about, stage)
    (dim,) = journal.vectors.read(0, 1).shape[1:]
    index = Index(ndim=dim, metric="cos", dtype="f32")
    step = max(1, _NUMBERS // dim)
    for start in range(0, journal.total, step):
        vectors = journal.vectors.read(start, min(start + step, journal.total))
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        rows = np.flatnonzero(np.isfinite(lengths) & (lengths > 0))
        if len(rows):
            # one thread: the same vectors give the same bytes
            index.add((rows + start).astype(np.uint64), vectors[rows], threads=1)
    if not len(index):
        raise ImageError(f"no vector of {listing.folder} has a direction; none can be searched")
    path, side = stage / f"index{ENDING}", stage / "index.json"
    index.save(str(path))
    record = IndexRecord(
        product=about["product"],
        model=str(model.absolute()),
        model_sha256=about["model"],
        output_name=about["output_name"],
        preprocessing=from_plain(Preprocessing, about["preprocessing"], "preprocessing"),
        folder=about["folder"],
        dim=dim,
        rows=journal.total,
        indexed=len(index),
        table_sha256=sha256_of(table),
        index_sha256=sha256_of(path),
    )
    side.write_text(to_json(record), encoding="utf-8")
    return table, side, path


def read_record(index: Path) -> IndexRecord:
    """Read the side file of an index."""
    side = manifest_path(index)
    try:
        if side.stat().st_size > _SIDE:
            raise ManifestError(f"{side} is larger than a side file can be; embed again")
        plain = json.loads(side.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ManifestError(
            f"{side} is missing: nothing says which model {index} belongs to; embed again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{side} is not JSON ({error}); embed again") from error
    schema = plain.get("schema") if isinstance(plain, dict) else None
    if isinstance(schema, int) and schema > 1:
        raise ManifestError(f"{side} has schema {schema}, this version reads 1; upgrade msn-export")
    return from_plain(IndexRecord, plain, side.name)


def open_index(path: Path, record: IndexRecord) -> Index:
    """Verify an index and its table, and open it; its vectors stay in the file.

    Raises:
        OutputError: a file is missing or another one, or its links lead out of it.
    """
    for file, wanted in ((table_of(path), record.table_sha256), (path, record.index_sha256)):
        if not file.is_file():
            raise OutputError(f"{file} does not exist; embed again")
        if sha256_of(file) != wanted:
            raise OutputError(
                f"{file} is not the file that {manifest_path(path)} names; embed again"
            )
    require_sound(path, count=record.indexed, dim=record.dim, rows=record.rows)
    from usearch.index import Index

    index = Index(ndim=record.dim, metric="cos", dtype="f32")
    try:
        index.view(str(path))
    except Exception as error:  # usearch has no error of its own
        raise OutputError(f"{path} cannot be opened by usearch: {to_plain(str(error))}") from error
    return index


def nearest(
    index: Index, vectors: NDArray[np.float32], k: int
) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Find the keys [m, k] of the nearest vectors of queries [m, d], and their cosines [m, k]."""
    k = min(k, len(index))
    found = index.search(vectors, k, exact=len(index) <= EXACT)
    return found.keys.reshape(-1, k), 1 - found.distances.reshape(-1, k)
