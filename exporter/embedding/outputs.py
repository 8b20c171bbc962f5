"""The rows of an output, and those that are done, from which ``--resume`` goes on.

A folder ``<output>.parts``: the arrays, and a journal that says which of their rows count. A part
is what a line of the journal says is done; its rows are on the disk before its line is, so a run
that is killed at any moment loses the part it was in and nothing else. Rows come in any order: on
one machine from the first to the last, on a cluster as its machines finish them.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from msn_export.embedding.growing_array import GrowingArray
from msn_export.embedding.inference import joined
from msn_export.errors import MissingPackageError, OutputError
from msn_export.files import move
from msn_export.input_files import JOURNAL, read_bytes
from msn_export.manifest import manifest_path
from msn_export.schema import to_json, to_plain
from msn_export.spec import Scores

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from msn_export.embedding.inference import Rows
    from msn_export.embedding.job import Listing


# What a line of a journal that is none raises: JSON has infinity, and lists as deep as they like
_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
# A part ends with whichever comes first: what a killed run may lose, and what waits in memory
SECONDS = 10.0
BYTES = 8 * 2**20


START_OVER = "--force without --resume starts over"


class Journal:
    """The finished parts of an output of ``total`` rows.

    ``errors`` is by row; ``turned`` counts the pictures that their EXIF orientation turned.
    """

    def __init__(self, folder: Path, total: int, start_over: str = START_OVER) -> None:
        self.folder, self.total, self._start_over = folder, total, start_over
        self.vectors = GrowingArray(folder / "vectors.npy", total)
        self.best = GrowingArray(folder / "best.npy", total)
        self.hashes = GrowingArray(folder / "hashes.npy", total)
        self.journal = folder / "parts.jsonl"
        self.errors: dict[int, str] = {}
        self.turned = 0
        self._is_done = np.zeros(total, np.bool_)
        self._open: list[tuple[int, Rows]] = []
        self._begun = time.monotonic()
        self._lock = -1

    @classmethod
    def begin(
        cls,
        folder: Path,
        total: int,
        origin: Mapping[str, Any],
        *,
        resume: bool,
        force: bool,
        start_over: str = START_OVER,
    ) -> Self:
        """Start an output, or go on with one that was begun.

        Args:
            folder: keeps the parts.
            total: rows of the whole output.
            origin: all that the rows follow from, by name; parts of another origin are refused.
            resume: go on with those that are there.
            force: throw them away, unless they are to be resumed.
            start_over: how to throw them away, for errors.
        """
        parts = cls(folder, total, start_over)
        folder.mkdir(exist_ok=True)
        parts._claim()
        try:
            if resume or not force:
                parts._continue(json.loads(json.dumps(origin)), resume=resume)
            if not parts.done:  # nothing worth keeping: a header alone, or less
                parts._clear()
                parts._note({"origin": origin, "total": total})
        except BaseException:
            parts.close()
            raise
        return parts

    @property
    def done(self) -> int:
        return int(np.count_nonzero(self._is_done))

    def missing(self, count: int) -> Iterator[range]:
        """Give the batches of ``count`` rows that are not done, each as its rows' numbers."""
        for start in range(0, self.total, count):
            rows = range(start, min(start + count, self.total))
            if not self._is_done[rows.start : rows.stop].all():
                yield rows

    @property
    def has_best(self) -> bool:
        return self.best.path.exists()

    @property
    def broken(self) -> int:
        """Rows that have an error so far, those of the open part among them."""
        return len(self.errors) + sum(len(rows.errors) for _, rows in self._open)

    def add(self, start: int, rows: Rows) -> None:
        """Take a batch whose first row is ``start``; ends the part when it is old or large."""
        self._open.append((start, rows))
        size = sum(one.vectors.nbytes for _, one in self._open)
        if size >= BYTES or time.monotonic() - self._begun >= SECONDS:
            self.end_part()

    def end_part(self) -> None:
        """Write what was added since the last part; after an interruption, again."""
        self._begun = time.monotonic()
        if not self._open:
            return
        errors: dict[int, str] = {}
        spans: list[tuple[int, int]] = []
        turned = sum(rows.turned for _, rows in self._open)
        for start, rows in joined(self._open):
            self.vectors.write(start, rows.vectors)
            if rows.best is not None:
                self.best.write(start, rows.best)
            if rows.hashes is not None:
                self.hashes.write(start, rows.hashes)
            errors |= {start + index: text for index, text in rows.errors.items()}
            spans.append((start, start + len(rows.vectors)))
        again = sum(np.count_nonzero(self._is_done[start:stop]) for start, stop in spans)
        count = self.done + sum(stop - start for start, stop in spans) - int(again)
        self._note({"done": count, "rows": spans, "errors": errors, "turned": turned})
        self._take(spans, errors, turned)
        self._open = []

    def remove(self) -> None:
        """Delete them: the output is in place, or there will be none."""
        self._clear()
        with suppress(OSError):  # someone keeps files of his own in it
            self.folder.rmdir()

    def close(self) -> None:
        """Let another run have them; those without a row are of no use to one."""
        if self._lock >= 0:
            if not self.done:
                self.remove()
            os.close(self._lock)
            self._lock = -1

    def _claim(self) -> None:
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            self._lock = -1
            raise OutputError(
                f"another run is writing {self.folder}; wait for it or choose another -o"
            ) from error

    def _clear(self) -> None:
        for path in (self.vectors.path, self.best.path, self.hashes.path, self.journal):
            path.unlink(missing_ok=True)

    def _continue(self, origin: Mapping[str, Any], *, resume: bool) -> None:
        """Read the journal up to its last whole line, and require that its rows are these."""
        text = read_bytes(self.journal, JOURNAL) if self.journal.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if not whole:
            return
        held = 0
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()]
            began, total = dict(first["origin"]), int(first["total"])
            for line in lines:
                held = int(line["done"])
                if total != self.total:  # of another listing, which will be refused
                    continue
                spans = [(int(start), int(stop)) for start, stop in line["rows"]]
                errors = {int(row): str(text) for row, text in line["errors"].items()}
                self._take(spans, errors, int(line["turned"]))
        except _MALFORMED as error:
            raise OutputError(
                f"{self.journal} is damaged ({error!r}); {self._start_over}"
            ) from error
        if not held:
            return
        if not resume:
            raise OutputError(
                f"{self.folder} holds {held} of {total} rows of an interrupted run; --resume "
                "goes on from there, --force starts over"
            )
        self._require_same(began, origin)
        self._require_rows(held)
        self.journal.write_bytes(whole)

    def _require_same(self, began: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
        for name, now in origin.items():
            before = began.get(name)
            if before != now:
                raise OutputError(
                    f"{self.folder} was begun with another {name.replace('_', ' ')} "
                    f"({_short(before)}, now {_short(now)}); {self._start_over}"
                )

    def _require_rows(self, held: int) -> None:
        last = int(np.flatnonzero(self._is_done).max(initial=-1)) + 1
        rest = [one for one in (self.best, self.hashes) if one.path.exists()]
        if self.done != held or not all(one.holds(last) for one in (self.vectors, *rest)):
            raise OutputError(
                f"{self.folder} is damaged: its journal counts {held} rows and the arrays "
                f"have fewer; {self._start_over}"
            )

    def _take(
        self, spans: Iterable[tuple[int, int]], errors: Mapping[int, str], turned: int
    ) -> None:
        for start, stop in spans:
            if not 0 <= start < stop <= self.total:
                raise ValueError(f"rows {start} to {stop} of {self.total}")
            self._is_done[start:stop] = True
        self.errors |= errors
        self.turned += turned

    def _note(self, line: Mapping[str, Any]) -> None:
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


ENDINGS = (".npy", ".parquet", ".usearch")
_CHUNK = 8 * 2**20  # bytes of vectors that are in memory at once


def files_of(output: Path) -> tuple[Path, ...]:
    """Name every file of an output, the array, table or index last."""
    if output.suffix == ".parquet":
        return (output,)
    if output.suffix == ".usearch":
        return (output.with_suffix(".parquet"), manifest_path(output), output)
    return (manifest_path(output), output.with_name(output.name + ".rows.jsonl"), output)


def require_parquet() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"a .parquet output needs pyarrow ({error}); pip install 'msn-export[parquet]', or "
            "write .npy"
        ) from error


def require_fit(output: Path, row: Sequence[int]) -> None:
    if output.suffix != ".npy" and len(row) != 1:
        raise OutputError(
            f"an image gives {list(row)} numbers and a {output.suffix} row holds one vector; write "
            ".npy, or export the model with --head cls"
        )


def write_npy(
    journal: Journal,
    listing: Listing,
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
    raw = about.get("scores") == Scores.RAW
    with lines.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows_of(journal, listing, labels, raw=raw)):
            text = json.dumps(
                {"row": number, **row}, ensure_ascii=False, default=datetime.isoformat
            )
            file.write(text + "\n")
    return described, lines, journal.vectors.path


def write_parquet(
    journal: Journal,
    listing: Listing,
    labels: Sequence[str],
    about: Mapping[str, Any],
    stage: Path,
) -> tuple[Path, ...]:
    """Write one table, row group by row group.

    Columns: ``root`` and ``path`` below it, the file's size in ``bytes``, when it was ``changed``
    and its ``sha256``, ``embedding`` (list of a fixed size, float32; null where there is an
    error), ``error``, and for a classifier
    ``label``, ``score`` and ``probability`` (null where the score is none). Where several classes
    were kept, ``labels`` and ``scores`` are lists of them. What it was made from stands in the
    schema's metadata under ``msn-export``.
    """
    import pyarrow as pa
    from pyarrow import parquet

    (size,) = journal.vectors.read(0, 1).shape[1:]
    fields = {
        "root": pa.string(),
        "path": pa.string(),
        "bytes": pa.int64(),
        "changed": pa.timestamp("us", tz="UTC"),
        "sha256": pa.string(),
        "embedding": pa.list_(pa.float32(), size),
        "error": pa.string(),
    }
    if journal.has_best:
        fields |= {"label": pa.string(), "score": pa.float32(), "probability": pa.float32()}
        if journal.best.read(0, 1).shape[1] > 1:
            fields |= {"labels": pa.list_(pa.string()), "scores": pa.list_(pa.float32())}
    schema = pa.schema(fields.items(), metadata={"msn-export": json.dumps(about)})
    table = stage / "table.parquet"
    step = max(1, _CHUNK // (4 * size))
    rows = rows_of(journal, listing, labels, raw=about.get("scores") == Scores.RAW)
    # vectors and hashes are noise to a dictionary, and nothing reads their least and greatest
    texts = ["path", "error", "label"]
    with parquet.ParquetWriter(
        table, schema, use_dictionary=["root", "label"], write_statistics=texts, compression="zstd"
    ) as writer:
        for start in range(0, journal.total, step):
            chunk = list(islice(rows, step))
            vectors = pa.array(journal.vectors.read(start, start + len(chunk)).ravel())
            broken = pa.array([row["error"] is not None for row in chunk])
            for row in chunk:
                row["root"] = listing.root
            columns = [
                pa.FixedSizeListArray.from_arrays(vectors, size, mask=broken)
                if name == "embedding"
                else pa.array([row.get(name) for row in chunk], kind)
                for name, kind in fields.items()
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema), row_group_size=step)
    return (table,)


def rows_of(
    journal: Journal, listing: Listing, labels: Sequence[str], *, raw: bool
) -> Iterator[dict[str, Any]]:
    """Give each row's path, file and ``error``, and of a classifier its likeliest class.

    Of the file there are its size in ``bytes``, when it was ``changed``, and the ``sha256`` of what
    was decoded, None of a picture that could not be. The class is ``label``,
    ``score``, and ``probability``: the score, which a ``raw`` one is not. Where several classes
    were kept, they are ``labels`` with their ``scores``, the likeliest first.
    """
    step = 1 << 16
    names = listing.names()
    for start in range(0, journal.total, step):
        stop = min(start + step, journal.total)
        best = journal.best.read(start, stop) if journal.has_best else None
        hashes = journal.hashes.read(start, stop) if journal.hashes.path.exists() else None
        for number in range(start, stop):
            # an error has the path, whose bytes may be no text
            error = to_plain(journal.errors.get(number))
            size, changed = listing.sizes[number], listing.changed[number]
            row: dict[str, Any] = {
                "path": next(names),
                "bytes": None if size < 0 else size,
                "changed": None if changed < 0 else datetime.fromtimestamp(changed / 1e6, UTC),
                "sha256": None if hashes is None else _hex(hashes[number - start]),
                "error": error,
            }
            if best is not None and error is None:
                guesses = best[number - start]
                found = [
                    labels[index] if index < len(labels) else str(index)
                    for index in guesses["class"].tolist()
                ]
                # nine digits give a float32 back exactly
                scores = [float(np.format_float_positional(score)) for score in guesses["score"]]
                row["label"] = found[0]
                row |= {"score": scores[0], "probability": None if raw else scores[0]}
                if len(found) > 1:
                    row |= {"labels": found, "scores": scores}
            yield row


def _hex(digest: NDArray[np.uint8]) -> str | None:
    """Write a hash in hexadecimal; None where all is zero: the picture could not be decoded."""
    return digest.tobytes().hex() if digest.any() else None


def move_in(finished: Sequence[Path], output: Path) -> None:
    """Move finished files to their places.

    The old array goes first and the new one comes last: at no moment does one lie beside sidecars
    that are not its own.
    """
    places = files_of(output)
    try:
        places[-1].unlink(missing_ok=True)
        for path, target in zip(finished, places, strict=True):
            move(path, target)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror}") from error
