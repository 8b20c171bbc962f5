"""Models that OpenVINO compiled, kept in the user's cache for later processes.

One folder for each file, OpenVINO and configuration; OpenVINO writes the model into it and maps it
into memory from there. OpenVINO does not notice every damage to what it wrote, so its hash lies
beside it and is compared first. Nothing that happens to a folder is an error: the model is compiled
again, and ``state`` says why.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from msn_export.errors import MsnExportError
from msn_export.files import cache_folder, locked, write_whole

_PREFIX = "openvino-"
_HASH = "sha256"
_BYTES = 4 << 30  # of all models; those used last are kept
_CHUNK = 1 << 20

Compile = Callable[[Mapping[str, Any]], Any]


def cache_path(model: Path, sha256: str, key: str) -> Path | None:
    """Path of the folder for a file and a configuration; None for a user without a home.

    OpenVINO looks a model up by its path and time, so they are part of the name.
    """
    folder = cache_folder()
    if folder is None:
        return None
    status = model.stat()
    origin = f"{model.resolve()} {status.st_mtime_ns} {status.st_size} {key}"
    return folder / f"{_PREFIX}{sha256[:16]}-{hashlib.sha256(origin.encode()).hexdigest()[:16]}"


class ModelCache:
    """The cache of one model; ``state`` says what was loaded or written, in one line.

    ``path`` None is no cache, and ``reason`` then says why.
    """

    def __init__(
        self,
        path: Path | None,
        reason: str = "there is no cache folder; set XDG_CACHE_HOME or HOME",
    ) -> None:
        self._path, self._reason = path, reason
        self.state = "not used yet"

    def compile(self, compile_model: Compile) -> Any:
        """Compile a model, or load what was compiled before.

        Args:
            compile_model: is given the properties of OpenVINO that turn its cache on, or none.
        """
        if self._path is None:
            self.state = f"off: {self._reason}"
            return compile_model({})
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.mkdir(mode=0o700, exist_ok=True)
            _require_own(self._path)
            with locked(self._path):
                return self._compile(self._path, compile_model)
        except OSError as error:
            self.state = f"off: {self._path} cannot be used ({error.strerror or error})"
            return compile_model({})

    def _compile(self, path: Path, compile_model: Compile) -> Any:
        damaged = not _is_whole(path)
        found = _blobs(path)
        if damaged:
            for blob in found:
                blob.unlink()
        try:
            compiled = compile_model({"CACHE_DIR": str(path)})
        except MsnExportError:  # of the graph, which it raises again, or of a full disk
            compiled = compile_model({})
            self.state = f"off: OpenVINO cannot use {path}"
            return compiled
        blobs = _blobs(path)
        size = sum(blob.stat().st_size for blob in blobs)
        if compiled.get_property("LOADED_FROM_CACHE"):
            self.state = f"loaded {size:,} bytes from {path}"
            os.utime(path)
            return compiled
        self.state = f"made anew: {path} is damaged" if damaged and found else "made anew"
        if not blobs:
            self.state += "; OpenVINO wrote nothing"
            return compiled
        write_whole(path / _HASH, _hash(blobs).encode())
        self.state += f"; {size:,} bytes written to {path}"
        with suppress(OSError, TimeoutError), locked(path.parent):
            _remove_oldest(path)
        return compiled


def _require_own(path: Path) -> None:
    status = path.lstat()
    if not path.is_dir() or path.is_symlink():
        raise OSError("it is no folder")
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise OSError("others may write it")


def _is_whole(path: Path) -> bool:
    """True if the folder holds what was written: of a process that was killed it may be a part."""
    blobs = _blobs(path)
    try:
        return bool(blobs) and (path / _HASH).read_text(encoding="ascii") == _hash(blobs)
    except (OSError, ValueError):
        return False


def _blobs(path: Path) -> list[Path]:
    return sorted(path.glob("*.blob"))


def _hash(blobs: list[Path]) -> str:
    digest = hashlib.sha256()
    for blob in blobs:
        with blob.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _remove_oldest(kept: Path) -> None:
    """Remove the models that were used longest ago, until the rest are not too large together."""
    folders = sorted(
        kept.parent.glob(f"{_PREFIX}*"), key=lambda one: one.stat().st_mtime_ns, reverse=True
    )
    total = 0
    for folder in [kept, *(one for one in folders if one != kept)]:
        total += sum(blob.stat().st_size for blob in _blobs(folder))
        if total > _BYTES and folder != kept:
            shutil.rmtree(folder, ignore_errors=True)
