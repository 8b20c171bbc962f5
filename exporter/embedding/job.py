"""What an embedding run is asked for, its pictures in order, and what it tells when it is done."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

from msn_export import options
from msn_export.errors import SpecError
from msn_export.options import Opt
from msn_export.schema import Count, Job, Result, Within

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from msn_export.preprocessing import Exif, Preprocessing
    from msn_export.spec import Scores


class PictureList(Protocol):
    """The pictures of a run, wherever they are; ``sha256`` tells them from others."""

    @property
    def folder(self) -> object:
        """What people call the place they are in."""

    @property
    def paths(self) -> Sequence[object]:
        """Each one's path, in the order of the rows."""

    @property
    def sha256(self) -> str:
        """The fingerprint of names and sizes."""

    @property
    def skipped(self) -> Mapping[str, int]:
        """By reason, how much that lies there is none of them."""

    def __len__(self) -> int: ...

    def names(self) -> Iterator[str]:
        """Give what each row calls its picture."""


@dataclass(frozen=True, slots=True)
class Listing:
    """Picture files below ``folder``, sorted.

    ``sha256`` is over each one's name below the folder and its size in bytes: what can be known of
    a million files without reading them.
    """

    folder: Path
    paths: tuple[Path, ...]
    sha256: str
    skipped: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.paths)

    def names(self) -> Iterator[str]:
        """Give each path below the folder; bytes that are no UTF-8 are written as escapes."""
        for path in self.paths:
            yield _name(self.folder, path).decode("utf-8", "backslashreplace")


def list_pictures(folder: Path) -> Listing:
    """List the pictures below a folder, or one file."""
    from msn_export import image_folder  # numpy, which --help is not to wait for

    found = image_folder.find(folder)
    digest = hashlib.sha256()
    for path in found.paths:
        try:
            size = path.stat().st_size
        except OSError:
            size = -1  # gone since it was listed: decoding it will say so
        digest.update(_name(folder, path) + b"\0%d\n" % size)
    return Listing(folder, found.paths, digest.hexdigest(), found.skipped)


def _name(folder: Path, path: Path) -> bytes:
    return os.fsencode(path.relative_to(folder) if path != folder else path.name)


def _ending(path: Path) -> Path:
    if path.parts[:1] and path.parts[0] in {"s3:", "gs:", "gcs:"}:
        raise SpecError("the output is a file here; write one and copy it to the bucket")
    if path.suffix not in {".npy", ".parquet"}:
        raise SpecError(f"{path} ends in neither .npy nor .parquet")
    return path


@dataclass(frozen=True, slots=True)
class EmbedJob(Job):
    """What ``msn-export embed`` was asked for; None leaves a choice to the model or the machine.

    ``images`` is a folder, or the URI of a bucket. No number in the rows depends on how many
    ``threads`` there are. ``ray`` None runs on this machine; else it is a cluster's address,
    ``local``, or empty for the cluster that the command was submitted to.
    """

    model: Path
    images: Path | str
    output: Annotated[
        Path, Opt("The .npy or .parquet file to write.", options.OUTPUT, read=_ending)
    ]
    batch: Annotated[Count | None, Opt("Default: what the model is tuned for.")] = None
    workers: Annotated[
        Annotated[int, Within(1, 256)] | None, Opt("Processes that decode pictures.")
    ] = None
    threads: Annotated[Count | None, Opt("Of the model, on a CPU. Default: physical cores.")] = None
    output_name: Annotated[
        str | None, Opt("Output to keep. Default: embedding, or what comes nearest.")
    ] = None
    preprocess: options.Preprocess = None
    exif: options.Exif = None
    image_size: options.OpenSize = None
    providers: options.Providers = ()
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
        ),
    ] = None
    actors: Annotated[Count | None, Opt("--ray: how many hold the model.")] = None
    force: options.Force = False


@dataclass(frozen=True, slots=True, repr=False)
class Embedded(Result):
    """What was written.

    ``turned`` counts the pictures that their EXIF orientation turned, ``skipped`` by reason what
    the folder holds besides pictures that can be read. ``scores`` says what a classifier's logits
    became. ``images_per_second`` is of the rows that this run made.
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
    cluster: str | None
    batch: int
    workers: int
    preprocessing: Preprocessing
    selftest: str
    notes: tuple[str, ...]
    seconds: float
    images_per_second: float
    peak_rss_bytes: int
