"""Finished rows as the files a user asked for: .npy with its sidecars, or .parquet."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.errors import MissingPackageError, OutputError
from msn_export.manifest import manifest_path
from msn_export.schema import to_json, to_plain
from msn_export.spec import Scores

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from msn_export.embed.job import PictureList
    from msn_export.embed.journal import Journal

ENDINGS = (".npy", ".parquet")
_CHUNK = 8 * 2**20  # bytes of vectors that are in memory at once


@dataclass(frozen=True, slots=True)
class Row:
    """All that is known of one picture besides its vector."""

    path: str
    error: str | None
    best: tuple[str, float] | None  # label, score


def files_of(output: Path) -> tuple[Path, ...]:
    """Name every file of an output, the array or table last."""
    if output.suffix == ".parquet":
        return (output,)
    return (manifest_path(output), output.with_name(output.name + ".rows.jsonl"), output)


def require_parquet() -> None:
    """Require the library, before any work is done.

    Raises:
        MissingPackageError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"a .parquet output needs pyarrow ({error}); pip install 'msn-export[parquet]', or "
            "write .npy"
        ) from error


def require_fit(output: Path, row: Sequence[int]) -> None:
    """Require that rows of a shape can be written.

    Raises:
        OutputError: a table is to hold what is no vector.
    """
    if output.suffix == ".parquet" and len(row) != 1:
        raise OutputError(
            f"an image gives {list(row)} numbers and a .parquet row holds one vector; write .npy, "
            "or export the model with --head cls"
        )


def write_npy(
    parts: Journal,
    listing: PictureList,
    labels: Sequence[str],
    about: Mapping[str, Any],
    stage: Path,
) -> tuple[Path, ...]:
    """Write the sidecars; the array itself is already whole and only has to be moved.

    Returns:
        The files in the order of ``files_of``.
    """
    described, lines = stage / "about.json", stage / "rows.jsonl"
    described.write_text(to_json(about), encoding="utf-8")
    with lines.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows_of(parts, listing, labels)):
            line: dict[str, Any] = {"row": number, "path": row.path, "error": row.error}
            if row.best is not None:
                line["label"], line["score"] = row.best
                line["probability"] = _probability(row.best[1], about)
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return described, lines, parts.vectors.path


def write_parquet(
    parts: Journal,
    listing: PictureList,
    labels: Sequence[str],
    about: Mapping[str, Any],
    stage: Path,
) -> tuple[Path, ...]:
    """Write one table, row group by row group.

    Columns: ``path``, ``embedding`` (list of a fixed size, float32; null where there is an error),
    ``error``, and for a classifier ``label``, ``score`` and ``probability`` (null where the score
    is none). What it was made from stands in the schema's metadata under ``msn-export``.
    """
    import pyarrow as pa
    from pyarrow import parquet

    (size,) = parts.vectors.read(0, 1).shape[1:]
    fields = [("path", pa.string()), ("embedding", pa.list_(pa.float32(), size))]
    fields.append(("error", pa.string()))
    if parts.has_best:
        fields += [
            ("label", pa.string()), ("score", pa.float32()), ("probability", pa.float32()),
        ]  # fmt: skip
    schema = pa.schema(fields, metadata={"msn-export": json.dumps(about)})
    table = stage / "table.parquet"
    step = max(1, _CHUNK // (4 * size))
    rows = rows_of(parts, listing, labels)
    # vectors are noise to a dictionary, and nothing reads their least and greatest number
    texts = ["path", "error", "label"]
    with parquet.ParquetWriter(
        table, schema, use_dictionary=["label"], write_statistics=texts, compression="zstd"
    ) as writer:
        for start in range(0, parts.total, step):
            chunk = list(islice(rows, step))
            vectors = parts.vectors.read(start, start + len(chunk))
            broken = pa.array([row.error is not None for row in chunk])
            columns = [
                pa.array([row.path for row in chunk]),
                pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), size, mask=broken),
                pa.array([row.error for row in chunk], pa.string()),
            ]
            if parts.has_best:
                best = [row.best or (None, None) for row in chunk]
                columns.append(pa.array([label for label, _ in best], pa.string()))
                scores = [number for _, number in best]
                columns.append(pa.array(scores, pa.float32()))
                columns.append(pa.array([_probability(x, about) for x in scores], pa.float32()))
            writer.write_batch(pa.record_batch(columns, schema=schema), row_group_size=step)
    return (table,)


def _probability(score: float | None, about: Mapping[str, Any]) -> float | None:
    """Give a score that is a probability; a regression's is none."""
    return None if about.get("scores") == Scores.RAW else score


def rows_of(parts: Journal, listing: PictureList, labels: Sequence[str]) -> Iterator[Row]:
    """Give each row's path, error, and likeliest class where the model has a classifier."""
    step = 1 << 16
    names = listing.names()
    for start in range(0, parts.total, step):
        stop = min(start + step, parts.total)
        best = parts.best.read(start, stop) if parts.has_best else None
        for row in range(start, stop):
            error = to_plain(parts.errors.get(row))  # it has the path, whose bytes may be no text
            found = None
            if best is not None and error is None:
                number = int(best["class"][row - start])
                label = labels[number] if number < len(labels) else str(number)
                # nine digits give a float32 back exactly
                found = label, float(np.format_float_positional(best["score"][row - start]))
            yield Row(next(names), error, found)


def place(made: Sequence[Path], output: Path) -> None:
    """Move finished files to their places.

    The old array goes first and the new one comes last: at no moment does one lie beside sidecars
    that are not its own.

    Raises:
        OutputError: the file system refused.
    """
    places = files_of(output)
    try:
        places[-1].unlink(missing_ok=True)
        for path, target in zip(made, places, strict=True):
            path.replace(target)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}") from error
