"""Pictures to fit on, and their features: a graph runs in onnxruntime, its rows stay on disk."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.commands.embed import EmbedRun, kept, open_here
from msn_export.embedding import job as embed_job
from msn_export.embedding.growing_array import GrowingArray
from msn_export.embedding.job import EmbedJob, Listing
from msn_export.errors import ImageError, OutputError
from msn_export.files import STAGING_PREFIX, no_room_reported, sweep
from msn_export.image_folder import Found
from msn_export.input_files import JOURNAL, read_json
from msn_export.labelled import Labelled, read_labelled
from msn_export.schema import to_plain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from msn_export.commands.fit_job import FitJob
    from msn_export.progress import Progress

_RECORD, _LOCK = "fit.json", "lock"
_CHUNK = 2**20  # numbers of features that are read at once
DRAWS = 3  # facebookresearch/msn has imagenet_subsets1 to imagenet_subsets3


@dataclass(frozen=True, slots=True)
class FitPictures:
    """The pictures that are run: to train on, and to test on where those are others.

    ``draws`` are the rows of ``labelled`` that each draw trains on, the first being exported.
    """

    labelled: Labelled
    test: Labelled | None
    draws: tuple[NDArray[np.intp], ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: FitJob) -> FitPictures:
        labelled = read_labelled(job.labelled)
        test = notes = None
        if job.test is not None:
            test, notes = _test(job.test, labelled)
        if job.shots is None:
            return cls(labelled, test, (np.arange(len(labelled)),), notes or ())
        count = job.draws or DRAWS
        draws = [labelled.drawn(job.shots, job.seed, number) for number in range(count)]
        if test is not None:  # nothing else is asked of the others
            run = np.unique(np.concatenate(draws))
            labelled, draws = labelled.some(run), [np.searchsorted(run, rows) for rows in draws]
        return cls(labelled, test, tuple(draws), notes or ())


def _test(source: Path, labelled: Labelled) -> tuple[Labelled, tuple[str, ...]]:
    given = read_labelled(source).as_classes(labelled.classes, str(labelled.source))
    test = given.without(labelled)
    shared = len(given) - len(test)
    if not len(test):
        raise ImageError(
            f"all {shared} pictures of --test {source} are among those of {labelled.source}; give "
            "others, or leave --test out"
        )
    if not shared:
        return test, ()
    also = f"{shared} of {len(given)} pictures of {source} are among those of {labelled.source}"
    return test, (f"{also}: not tested on",)


@contextmanager
def work_folder(folder: Path, origin: Mapping[str, Any], *, force: bool) -> Iterator[Path]:
    """Give a folder that outlives a run which is killed, and that the same run finds again.

    It is deleted at the end, also of a run that fails; one that was interrupted keeps its rows, and
    so does one whose pictures are right.

    Args:
        folder: its path.
        origin: all that its rows follow from, by name; a folder of another origin is refused.
        force: delete a folder of another origin.
    """
    wanted = json.loads(json.dumps(to_plain(origin)))
    sweep(folder.parent)
    with no_room_reported(folder.parent):
        folder.mkdir(exist_ok=True)
    # not the folder itself, which is locked while a file is put in place
    lock = os.open(folder / _LOCK, os.O_RDONLY | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"another run is writing {folder}; wait for it or choose another -o"
            ) from error
        _begin(folder, wanted, force=force)
        try:
            with no_room_reported(folder.parent):
                yield folder
        except ImageError:  # the pictures must change: their features are of no use
            _remove(folder)
            raise
        except BaseException:
            if not any(folder.glob("*.parts")):
                _remove(folder)
            raise
        _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Delete a folder so that a kill leaves it whole, or as what the next run removes."""
    gone = folder.with_name(f"{STAGING_PREFIX}{secrets.token_hex(8)}")
    folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)  # another run may sweep it


def _begin(folder: Path, wanted: Mapping[str, Any], *, force: bool) -> None:
    """Start the folder, or require that it is of the same run."""
    record, partial = folder / _RECORD, folder / f"{_RECORD}.partial"
    partial.unlink(missing_ok=True)
    entries = [entry for entry in folder.iterdir() if entry.name != _LOCK]
    if entries:
        before = _origin_in(folder)
        other = [name for name in wanted if before.get(name) != wanted[name]]
        if not other:
            return
        if not force:
            was, now = before.get(other[0]), wanted[other[0]]
            raise OutputError(
                f"{folder} keeps an interrupted run with another {other[0].replace('_', ' ')} "
                f"({_short(was)}, now {_short(now)}); --force starts over, -o writes elsewhere"
            )
        for entry in entries:
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    partial.write_text(json.dumps(wanted, indent=2), encoding="utf-8")
    partial.replace(record)


def _origin_in(folder: Path) -> dict[str, Any]:
    """Read what a folder's rows follow from; a folder of somebody else is left alone."""
    try:
        found = read_json(folder / _RECORD, JOURNAL)
    except OutputError:
        found = None
    if not isinstance(found, dict):
        raise OutputError(
            f"{folder} is not a folder of this command, which would work in it; move it, or choose "
            "another -o"
        )
    return found


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Features of labelled pictures on disk, [n, width] fp32.

    ``errors`` says by row why a picture has none; ``turned`` counts those that EXIF turned.
    """

    labelled: Labelled
    array: GrowingArray
    width: int
    errors: Mapping[int, str]
    turned: int

    def readable(self, rows: NDArray[np.intp]) -> NDArray[np.intp]:
        """Leave out the rows of pictures without features."""
        broken = np.zeros(len(self.labelled), np.bool_)
        broken[list(self.errors)] = True
        return rows[~broken[rows]]

    def parts(self, rows: NDArray[np.intp]) -> Iterator[tuple[NDArray[np.float32], slice]]:
        """Read some rows, in ascending order, a part at a time: the part, and its place in them."""
        step = max(1, _CHUNK // self.width)
        for start in range(0, len(self.labelled), step):
            stop = min(start + step, len(self.labelled))
            place = slice(*np.searchsorted(rows, (start, stop)).tolist())
            if place.start < place.stop:
                yield self.array.read(start, stop)[rows[place] - start], place

    def taken(self, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """Read some rows, in ascending order, into memory."""
        found = np.empty((len(rows), self.width))
        for part, place in self.parts(rows):
            found[place] = part
        return found


def extract(
    graph: Path, labelled: Labelled, folder: Path, name: str, progress: Progress
) -> FeatureRows:
    """Run labelled pictures through a graph of features, on from where a killed run was.

    Args:
        graph: the graph, with one output [b, width].
        labelled: the pictures.
        folder: keeps the rows.
        name: of the rows within it.
        progress: is told how many are done.
    """
    job = EmbedJob(graph, labelled.source, folder / f"{name}.npy", resume=True)
    again = f"remove {folder} to start over"
    with open_here(job, progress, listing_of(labelled)) as executor:
        run = EmbedRun(job, executor)
        parts = run.begin(again)
        with closing(parts), kept(parts, "the same command"):
            run.fill(parts, progress)
            if len(parts.errors) == parts.total:
                raise ImageError(
                    f"none of the {parts.total} pictures of {labelled.source} gives features; the "
                    f"first: {parts.errors[0]}"
                )
            width = parts.vectors.read(0, 1).shape[1]
        return FeatureRows(labelled, parts.vectors, width, parts.errors, parts.turned)


def listing_of(labelled: Labelled) -> Listing:
    source = labelled.source
    base = source if source.is_dir() else source.parent
    return embed_job.listing_of(source, Found(labelled.paths, base, labelled.skipped))


def hash_of(labelled: Labelled) -> str:
    """Hash each picture's path below the source, class and size."""
    digest = hashlib.sha256(listing_of(labelled).sha256.encode())
    for label in labelled.labels:
        digest.update(labelled.classes[label].encode() + b"\0")
    return digest.hexdigest()
