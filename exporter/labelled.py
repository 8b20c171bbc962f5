"""Labelled pictures: a folder with a subfolder for each class, or a table of paths and labels."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import ImageError, MissingPackageError
from msn_export.image_folder import find

TABLES = (".csv", ".parquet")
_COLUMNS = ("path", "label")
_BYTES = 2**30  # of a table: a hundred bytes a picture are ten million pictures
_NAMED = 3  # faults of one kind that a message names


@dataclass(frozen=True, slots=True)
class Labelled:
    """Pictures with their classes, in the order of ``paths``.

    ``labels`` [n] are indices of ``classes``. ``skipped`` counts by reason what a folder holds
    besides pictures that can be read.
    """

    source: Path
    paths: tuple[Path, ...]
    labels: NDArray[np.intp]
    classes: tuple[str, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def some(self, rows: Sequence[int] | NDArray[np.intp]) -> Labelled:
        """Give some of the pictures, with all classes."""
        paths = tuple(self.paths[row] for row in rows)
        return replace(self, paths=paths, labels=self.labels[np.asarray(rows, np.intp)])

    def as_classes(self, classes: tuple[str, ...], of: str) -> Labelled:
        """Give the same with the classes of a model, matched by name.

        Args:
            classes: the model's.
            of: what to call the model in errors.
        """
        if not classes:
            raise ImageError(
                f"{of} does not name its classes, so the labels of {self.source} cannot be matched "
                "with them; name them with --labels when the checkpoint is exported"
            )
        place = {name: number for number, name in enumerate(classes)}
        lacking = [name for name in self.classes if name not in place]
        if lacking:
            raise ImageError(
                f"{self.source} has {_listed(lacking, 'class')} that {of} lacks; its classes are "
                f"{', '.join(map(_shown, classes[:_NAMED]))}{', …' * (len(classes) > _NAMED)}"
            )
        index = np.array([place[name] for name in self.classes], np.intp)
        return replace(self, labels=index[self.labels], classes=classes)

    def drawn(self, shots: int, seed: int, number: int = 0) -> NDArray[np.intp]:
        """Draw ``shots`` pictures of each class; give their rows in ascending order.

        Args:
            shots: pictures of each class.
            seed: what is drawn follows from it, and from ``number``.
            number: tells several draws of one seed apart.
        """
        counts = np.bincount(self.labels, minlength=len(self.classes))
        few = [f"{self.classes[i]} has {counts[i]}" for i in np.flatnonzero(counts < shots)]
        if few:
            raise ImageError(
                f"{self.source} has {_listed(few, 'class')} with fewer than {shots} pictures; "
                f"choose --shots {counts.min()} or less, or add pictures"
            )
        shuffled = np.random.default_rng([seed, number]).permutation(len(self))
        by_class = shuffled[np.argsort(self.labels[shuffled], kind="stable")]
        starts = np.cumsum(counts) - counts
        return np.sort(np.concatenate([by_class[at : at + shots] for at in starts]))

    def without(self, other: Labelled) -> Labelled:
        """Leave out the pictures that ``other`` has too: files of the same bytes."""
        sizes = {path.stat().st_size for path in other.paths}
        own = [row for row, path in enumerate(self.paths) if path.stat().st_size in sizes]
        theirs = {self.paths[row].stat().st_size for row in own}
        digests = {_digest(path) for path in other.paths if path.stat().st_size in theirs}
        both = {row for row in own if _digest(self.paths[row]) in digests}
        return self.some([row for row in range(len(self)) if row not in both]) if both else self


def read_labelled(source: Path) -> Labelled:
    """Read a folder with a subfolder for each class, or a .csv or .parquet with path and label.

    The classes of a folder are its subfolders in sorted order, as torchvision's ImageFolder has
    them; those of a table its labels in sorted order. Paths of a table are relative to it.
    """
    if source.suffix in TABLES and source.is_file():
        rows, skipped = list(_table(source)), Counter[str]()
    else:
        rows, skipped = _folder(source)
    classes = tuple(sorted({label for _, label in rows}))
    for name in classes:
        if not name.isprintable():
            raise ImageError(f"{source}: the class {name!r} is not printable text; rename it")
    if len(classes) < 2:
        raise ImageError(
            f"{source} has {_listed(classes, 'class') or 'no class'}; a classifier needs two or "
            "more: a subfolder each, or labels in a table"
        )
    _require_once(source, rows)
    index = {name: number for number, name in enumerate(classes)}
    labels = np.array([index[label] for _, label in rows], np.intp)
    return Labelled(source, tuple(path for path, _ in rows), labels, classes, dict(skipped))


def _folder(source: Path) -> tuple[list[tuple[Path, str]], Counter[str]]:
    found = find(source)
    rows, skipped = [], Counter(found.skipped)
    for path in found.paths:
        inside = path.relative_to(source).parts
        if len(inside) == 1:
            skipped["picture in no class's folder"] += 1
        else:
            rows.append((path, inside[0]))
    named = {label for _, label in rows}
    empty = sorted(
        entry.name
        for entry in source.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in named
    )
    if empty:
        raise ImageError(
            f"{source} has {_listed(empty, 'class')} without a picture that can be read; remove "
            "the folder or fill it"
        )
    if not rows:
        raise ImageError(f"{source} has no subfolders; give one with a subfolder for each class")
    return rows, skipped


def _table(source: Path) -> Iterator[tuple[Path, str]]:
    if source.stat().st_size > _BYTES:
        raise ImageError(f"{source} is larger than {_BYTES >> 30} GiB; split it")
    paths, labels = _read_csv(source) if source.suffix == ".csv" else _read_parquet(source)
    rows = [
        (source.parent / path, label) for path, label in zip(paths, labels, strict=True) if path
    ]
    lacking = [path for path, _ in rows if not path.is_file()]
    if lacking:
        raise ImageError(
            f"{source} names {_listed([str(path) for path in lacking], 'file')} that "
            f"{'does' if len(lacking) == 1 else 'do'} not exist; paths are relative to the table"
        )
    if not rows:
        raise ImageError(f"{source} has no rows; expected the columns path and label")
    without = [str(path) for path, label in rows if not label]
    if without:
        raise ImageError(f"{source} has no label for {_listed(without, 'file')}")
    yield from rows


def _read_csv(source: Path) -> tuple[list[str], list[str]]:
    try:
        with source.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            _require_columns(source, reader.fieldnames or ())
            rows = [(row["path"] or "", row["label"] or "") for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ImageError(f"{source} is no table in UTF-8: {error}") from error
    return [path for path, _ in rows], [label for _, label in rows]


def _read_parquet(source: Path) -> tuple[list[str], list[str]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise MissingPackageError(
            f"{source} needs pyarrow ({error}); pip install 'msn-export[parquet]', or give a .csv"
        ) from error
    try:
        file = parquet.ParquetFile(source)
        _require_columns(source, file.schema_arrow.names)
        table = file.read(list(_COLUMNS))
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise ImageError(f"{source} is no parquet file: {reason}") from error
    paths, labels = (table.column(name).to_pylist() for name in _COLUMNS)
    return [str(path or "") for path in paths], ["" if x is None else str(x) for x in labels]


def _require_columns(source: Path, names: Sequence[str]) -> None:
    lacking = [name for name in _COLUMNS if name not in names]
    if lacking:
        shown = ", ".join(map(_shown, names[:8])) or "none"
        raise ImageError(
            f"{source} has no column {' and no column '.join(lacking)}; its columns are {shown}"
        )


def _require_once(source: Path, rows: Sequence[tuple[Path, str]]) -> None:
    """Refuse one picture in two classes: the same file, or files of the same bytes."""
    sizes: dict[int, list[tuple[Path, str]]] = defaultdict(list)
    for path, label in rows:
        sizes[path.stat().st_size].append((path, label))
    classes: dict[bytes, dict[str, Path]] = defaultdict(dict)
    for same in sizes.values():
        if len({label for _, label in same}) > 1:  # others need not be read
            for path, label in same:
                classes[_digest(path)].setdefault(label, path)
    twice = [list(found.items()) for found in classes.values() if len(found) > 1]
    if twice:
        (one, first), (other, second), *_ = twice[0]
        more = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise ImageError(
            f"{source} has one picture in two classes: {first} is {one!r} and {second} is "
            f"{other!r}{more}; remove one"
        )


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _listed(names: Sequence[str], noun: str) -> str:
    if not names:
        return ""
    shown = ", ".join(map(_shown, names[:_NAMED])) + (", …" if len(names) > _NAMED else "")
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{len(names)} {noun if len(names) == 1 else plural} ({shown})"


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)
