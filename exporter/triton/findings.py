"""What a check of a repository finds, and the model folder it looks at."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from msn_export.triton.artifact import Artifact, Platform
from msn_export.triton.messages import ModelConfig
from msn_export.triton.releases import Release


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about a repository. ``wrong`` fails the check, ``note`` says what was not known.

    ``where`` is a file under the model's folder and, for a configuration, the field.
    """

    level: Literal["wrong", "note"]
    model: str
    where: str
    what: str


Findings: TypeAlias = Iterator[Finding]
ReadArtifact: TypeAlias = Callable[[Path, Platform], Artifact]


@dataclass(frozen=True, slots=True)
class Subject:
    """One configuration of one model, with what its versions hold.

    ``versions`` has the artifacts of each version by their file's name, as far as they could be
    read. ``release`` is the Triton it is for, where anyone said.
    """

    folder: Path
    place: str
    config: ModelConfig
    platform: Platform | None
    versions: dict[int, dict[str, Artifact]] = field(default_factory=dict)
    release: Release | None = None

    def wrong(self, where: str, what: str) -> Finding:
        """Report what Triton would refuse or serve wrongly."""
        return Finding("wrong", self.folder.name, f"{self.place}: {where}", what)

    def note(self, where: str, what: str) -> Finding:
        """Report what could not be checked, or only costs speed."""
        return Finding("note", self.folder.name, f"{self.place}: {where}", what)

    @property
    def artifacts(self) -> Iterator[tuple[str, Artifact]]:
        """Each version's files that could be read, by their path in the folder."""
        for version, files in self.versions.items():
            for name, artifact in files.items():
                yield f"{version}/{name}", artifact


def safe_file(folder: Path, name: str, root: Path) -> Path | str:
    """Find a file that a configuration names; the reason as text where it must not be opened.

    A name is one file of ``folder``: what a configuration says is hostile, and Triton joins it to
    the folder as it is. A link may not lead out of ``root``.
    """
    if not name or "/" in name or "\\" in name or name in {".", ".."} or "\0" in name:
        return f"{name!r} is not the name of a file in {folder.name}/"
    path = folder / name
    try:
        there = path.exists()
    except OSError as error:
        return f"{name[:40]!r}… cannot be looked up: {error.strerror}"
    if not there:
        return f"{name} does not exist" + (" (a broken link)" if path.is_symlink() else "")
    if not path.resolve().is_relative_to(root.resolve()):
        return f"{name} is a link that leads out of the repository"
    return path if path.is_file() else f"{name} is no file"
