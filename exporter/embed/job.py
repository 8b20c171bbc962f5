"""What an embedding run is asked for, its pictures in order, and what it tells when it is done."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

from msn_export import image_folder
from msn_export.preprocessing import Exif, Preprocessing
from msn_export.schema import Count, Index, Job, Within
from msn_export.spec import ImageSize, Scores

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


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
    """List the pictures below a folder, or one file.

    Raises:
        ImageError: there is none.
    """
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


@dataclass(frozen=True, slots=True)
class EmbedJob(Job):
    """What ``msn-export embed`` was asked for; None leaves a choice to the model or the machine.

    ``images`` is a folder, or the URI of a bucket. ``threads`` are those an .onnx file computes
    with on a CPU: no number in the rows depends on how many (tests/test_run_embed.py). ``ray`` None
    runs on this machine; else it is a cluster's address, ``local``, or empty for the cluster that
    the command was submitted to.
    """

    model: Path
    images: Path | str
    output: Path
    batch: Count | None = None
    workers: Annotated[int, Within(1, 256)] | None = None
    threads: Count | None = None
    output_name: str | None = None
    providers: tuple[str, ...] = ()
    device: Index | None = None
    trust: bool = False
    preprocess: str | None = None
    exif: Exif | None = None
    image_size: ImageSize | None = None
    check: bool = True
    resume: bool = False
    force: bool = False
    ray: str | None = None
    actors: Count | None = None


@dataclass(frozen=True, slots=True)
class Embedded:
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
