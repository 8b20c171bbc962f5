"""An artifact on its way to other machines: its files as bytes, and as files again."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from msn_export.errors import RunnerError
from msn_export.sidecar import manifest_path, sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Cargo:
    """An artifact and its manifest; arrays, for Ray shares those between processes uncopied."""

    path: Path  # where it lies on the machine that sends it
    sha256: str
    artifact: NDArray[np.uint8]
    manifest: NDArray[np.uint8] | None


def pack(model: Path) -> Cargo:
    """Read an artifact for sending.

    Raises:
        RunnerError: it does not exist.
    """
    if not model.is_file():
        raise RunnerError(f"{model} does not exist; give an .onnx file or an engine")
    sidecar = manifest_path(model)
    return Cargo(
        model.absolute(),
        sha256_of(model),
        np.fromfile(model, np.uint8),
        np.fromfile(sidecar, np.uint8) if sidecar.is_file() else None,
    )


@contextmanager
def unpacked(cargo: Cargo) -> Iterator[Path]:
    """Give the artifact as a file, for as long as it takes to open it.

    Where the very file lies at the same path, as on a file system that the machines share, it is
    that one: then weights in files beside it are found too.
    """
    if cargo.path.is_file() and sha256_of(cargo.path) == cargo.sha256:
        yield cargo.path
        return
    with tempfile.TemporaryDirectory(prefix="msn-export-") as folder:
        path = Path(folder, cargo.path.name)
        cargo.artifact.tofile(path)
        if cargo.manifest is not None:
            cargo.manifest.tofile(manifest_path(path))
        yield path
