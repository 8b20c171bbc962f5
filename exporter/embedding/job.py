"""An embedding run: the job, its pictures in order, and what it reports when it is done."""

from __future__ import annotations

import hashlib
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from msn_export import options
from msn_export.errors import SpecError
from msn_export.options import Opt
from msn_export.schema import Count, Job, Result, Within

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from msn_export.image_folder import Found
    from msn_export.preprocessing import Exif, Preprocessing
    from msn_export.runtime.runner import Precision
    from msn_export.spec import Scores


@dataclass(frozen=True, slots=True)
class Listing:
    """Pictures below a folder or a bucket's, in the order of the rows.

    ``folder`` is what people call it, ``below`` how many characters of each path lead to it.
    ``sha256`` is over each one's name below the folder and its size in bytes: what can be known of
    a million files without reading them. ``sizes`` are those, and ``changed`` when each file was
    written last, in microseconds since 1970; -1 where that is not known.
    """

    folder: Path | str
    paths: Sequence[Path | str]
    below: int
    sha256: str
    sizes: Sequence[int]
    changed: Sequence[int]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        folder: Path | str,
        paths: Sequence[Path | str],
        stats: Iterable[tuple[int, int]],
        below: int,
        skipped: Mapping[str, int],
    ) -> Listing:
        """List files with their ``stats``: the size of each, and when it was changed."""
        digest, sizes, changed = hashlib.sha256(), array("q"), array("q")
        for path, (size, time) in zip(paths, stats, strict=True):
            digest.update(os.fsencode(str(path)[below:]) + b"\0%d\n" % size)
            sizes.append(size)
            changed.append(time)
        return cls(folder, paths, below, digest.hexdigest(), sizes, changed, skipped)

    @property
    def root(self) -> str:
        """The folder or bucket that each name is below; empty where names are whole paths."""
        first = str(self.paths[0])
        if isinstance(self.folder, str):
            scheme = self.folder.partition("://")[0]
            return f"{scheme}://{first[: self.below].rstrip('/')}"
        if not self.below and os.path.isabs(first):  # noqa: PTH117  of a text
            return ""
        above = Path(first[: self.below]).absolute()
        return os.fsencode(above).decode("utf-8", "backslashreplace")

    def __len__(self) -> int:
        return len(self.paths)

    def names(self) -> Iterator[str]:
        """Give each path below the folder; bytes that are no UTF-8 are written as escapes."""
        for path in self.paths:
            yield os.fsencode(str(path)[self.below :]).decode("utf-8", "backslashreplace")


def list_pictures(folder: Path) -> Listing:
    """List the pictures below a folder, those of a table, or one picture."""
    from msn_export import image_folder  # numpy, which --help is not to wait for

    return listing_of(folder, image_folder.find(folder))


def listing_of(source: Path, found: Found) -> Listing:
    """List pictures that were found; those of a table may lie elsewhere than beside it."""
    first = found.paths[0]
    inside = source.is_dir() or all(path.is_relative_to(found.base) for path in found.paths)
    below = len(str(first)) - len(found.name_of(first)) if inside else 0
    return Listing.of(source, found.paths, map(_stat, found.paths), below, found.skipped)


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return -1, -1  # gone since it was listed: decoding it will say so
    return found.st_size, found.st_mtime_ns // 1000


def _ending(path: Path) -> Path:
    if path.parts[:1] and path.parts[0] in {"s3:", "gs:", "gcs:"}:
        raise SpecError("the output is a file here; write one and copy it to the bucket")
    return options.ending(".npy", ".parquet", ".usearch")(path)


@dataclass(frozen=True, slots=True)
class EmbedJob(Job):
    """The options of ``msn-export embed``; None leaves a choice to the model or the machine.

    ``images`` is a folder, or the URI of a bucket. No number in the rows depends on how many
    ``threads`` there are. ``ray`` None runs on this machine; else it is a cluster's address,
    ``local``, or empty for the cluster that the command was submitted to.
    """

    model: Path
    images: Path | str
    output: Annotated[
        Path,
        Opt(
            "The .npy or .parquet file to write, or a .usearch: a .parquet with an index.",
            options.OUTPUT,
            read=_ending,
            panel=options.WRITTEN,
        ),
    ]
    batch: Annotated[
        Count | None, Opt("Pictures at a time. Default: what the model is tuned for.")
    ] = None
    workers: Annotated[
        Annotated[int, Within(1, 256)] | None,
        Opt("Processes that decode pictures. Default: one a core."),
    ] = None
    threads: Annotated[
        Count | None,
        Opt("Threads of the model, on a CPU. Default: physical cores.", panel=options.RUN),
    ] = None
    output_name: Annotated[
        str | None,
        Opt("Output to keep. Default: embedding, or what comes nearest.", metavar="NAME"),
    ] = None
    top_k: Annotated[
        Count | None, Opt("A classifier's best labels of each picture to keep. Default: 1.")
    ] = None
    normalize: Annotated[bool, Opt("Divide each vector by its norm.")] = False
    preprocess: options.Preprocess = None
    exif: options.Exif = None
    image_size: options.OpenSize = None
    providers: options.Providers = ()
    precision: options.Precision = None
    device: options.Device = None
    trust: options.Trust = False
    check: Annotated[bool, Opt("Do not run the model's golden input first.")] = True
    resume: Annotated[bool, Opt("Go on where an interrupted run stopped.")] = False
    ray: Annotated[
        str | None,
        Opt(
            "Run on a Ray cluster: HOST:PORT, auto, or one of this machine's own.",
            metavar="[ADDRESS|local]",
            bare="",
            panel=options.RUN,
        ),
    ] = None
    actors: Annotated[
        Count | None,
        Opt(
            "--ray: how many hold the model. Default: as many as there is room for.",
            panel=options.RUN,
        ),
    ] = None
    force: options.Force = False


@dataclass(frozen=True, slots=True, repr=False)
class Embedded(Result):
    """A run's outcome.

    ``turned`` counts the pictures that their EXIF orientation turned, ``skipped`` by reason what
    the folder holds besides pictures that can be read. ``scores`` says what a classifier's logits
    became. ``images_per_second`` is of the rows that this run made. ``precision`` is what was
    compiled, where the runtime says it.
    """

    output: str
    files: tuple[str, ...]
    shape: tuple[int, ...]
    output_name: str
    scores: Scores | None
    images: int
    broken: int
    exif: Exif
    turned: int
    skipped: dict[str, int]
    errors: tuple[str, ...]
    resumed_at: int
    runner: str
    precision: Precision | None
    cluster: str | None
    batch: int
    workers: int
    preprocessing: Preprocessing
    selftest: str
    notes: tuple[str, ...]
    seconds: float
    images_per_second: float
    peak_rss_bytes: int
