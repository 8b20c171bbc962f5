"""The pictures of a run, in order, with the fingerprint that tells them from others."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from msn_export import image_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


class Pictures(Protocol):
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
