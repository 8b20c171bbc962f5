"""Labelled pictures: a folder with a subfolder for each class, or a table of paths and labels."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import ImageError
from msn_export.image_folder import find
from msn_export.picture_table import TABLES, listed, read_rows, shown

_COLUMNS = ("path", "label")
_NAMED = 3  # classes of a model that a message names


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
        twice = [name for name, count in Counter(classes).items() if count > 1]
        if unsure := set(twice).intersection(self.classes):
            raise ImageError(
                f"{of} has more than one class of the name {shown(min(unsure))}, so the labels of "
                f"{self.source} cannot be matched with them; name them apart with --labels when "
                "the checkpoint is exported"
            )
        lacking = [name for name in self.classes if name not in place]
        if lacking:
            raise ImageError(
                f"{self.source} has {listed(lacking, 'class')} that {of} lacks; its classes are "
                f"{', '.join(map(shown, classes[:_NAMED]))}{', …' * (len(classes) > _NAMED)}"
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
                f"{self.source} has {listed(few, 'class')} with fewer than {shots} pictures; "
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
        digests = {_digest(path) for path in other.paths if path.stat().st_size in theirs} - {None}
        both = {row for row in own if _digest(self.paths[row]) in digests}
        return self.some([row for row in range(len(self)) if row not in both]) if both else self


def read_labelled(source: Path) -> Labelled:
    """Read a folder with a subfolder for each class, or a .csv or .parquet with path and label.

    The classes of a folder are its subfolders in sorted order, as torchvision's ImageFolder has
    them; those of a table its labels in sorted order. Paths of a table are relative to it. A
    picture that is there twice counts once: trained on and tested on, it would be an answer known
    before.
    """
    if source.is_dir():
        rows, skipped = _folder(source)
    elif source.suffix.lower() in TABLES and source.is_file():
        rows, skipped = _table(source), Counter[str]()
    else:
        raise ImageError(
            f"{source} is neither a folder with a subfolder for each class nor a "
            f"{' or '.join(TABLES)} with the columns {' and '.join(_COLUMNS)}"
        )
    classes = tuple(sorted({label for _, label in rows}))
    for name in classes:
        if not name.isprintable():
            raise ImageError(f"{source}: the class {name!r} is not printable text; rename it")
    if len(classes) < 2:
        raise ImageError(
            f"{source} has {listed(classes, 'class') or 'no class'}; a classifier needs two or "
            "more: a subfolder each, or labels in a table"
        )
    rows = _once(source, rows, skipped)
    index = {name: number for number, name in enumerate(classes)}
    labels = np.array([index[label] for _, label in rows], np.intp)
    return Labelled(source, tuple(path for path, _ in rows), labels, classes, dict(skipped))


def _folder(source: Path) -> tuple[list[tuple[Path, str]], Counter[str]]:
    if source.is_file():
        raise ImageError(
            f"{source} is one file; give a folder with a subfolder for each class, or a table "
            f"({' or '.join(TABLES)})"
        )
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
        (entry.name, entry.is_symlink())
        for entry in source.iterdir()
        if entry.is_dir() and not entry.name.startswith(".") and entry.name not in named
    )
    if empty:
        names, links = zip(*empty, strict=True)
        links_too = "; links to folders are not followed" if any(links) else ""
        raise ImageError(
            f"{source} has {listed(names, 'class')} without a picture that can be read; remove "
            f"the folder or fill it{links_too}"
        )
    if not rows:
        raise ImageError(f"{source} has no subfolders; give one with a subfolder for each class")
    return rows, skipped


def _table(source: Path) -> list[tuple[Path, str]]:
    rows = read_rows(source, _COLUMNS)
    without = [str(path) for path, label in rows if not label]
    if without:
        raise ImageError(f"{source} has no label for {listed(without, 'file')}")
    return rows


def _once(
    source: Path, rows: Sequence[tuple[Path, str]], skipped: Counter[str]
) -> list[tuple[Path, str]]:
    """Leave out copies: files of the same bytes; one picture in two classes is refused."""
    sizes = Counter(path.stat().st_size for path, _ in rows)
    seen: dict[bytes, tuple[Path, str]] = {}
    kept, twice = [], []
    for path, label in rows:
        size = path.stat().st_size
        # a size that no other has need not be read; an empty file is no picture
        digest = _digest(path) if size and sizes[size] > 1 else None
        first, one = (path, label) if digest is None else seen.setdefault(digest, (path, label))
        if one != label:
            twice.append(f"{shown(str(first))} is {one!r} and {shown(str(path))} is {label!r}")
        elif first is path:
            kept.append((path, label))
        else:
            skipped["copy of another picture"] += 1
    if twice:
        more = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise ImageError(f"{source} has one picture in two classes: {twice[0]}{more}; remove one")
    return kept


def _digest(path: Path) -> bytes | None:
    """Hash a file; None of one that cannot be read, which decoding it will say."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        return None
