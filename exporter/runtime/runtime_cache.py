"""Kernels that TensorRT-RTX compiled for an engine, kept in the user's cache for later processes.

TensorRT-RTX compiles an engine's kernels on the user's GPU, in every process anew unless it has a
runtime cache. The cache is one per engine, shared by its contexts. Its file is for one engine, one
TensorRT-RTX, one driver and one GPU; TensorRT-RTX checks that again before it loads it. Nothing
that happens to the file is an error: the engine runs without it, and ``state`` says why.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from msn_export.errors import one_line
from msn_export.files import cache_folder, locked, write_whole
from msn_export.host import Device, driver_release
from msn_export.runtime.versions import IHostMemory, IRuntimeCache, IRuntimeConfig

_LARGEST = 1 << 30  # bytes; more is no file of ours
_FILES = 64  # of all engines; those used last are kept
_PREFIX = "kernels-"


def cache_path(engine_sha256: str, version: str, device: Device) -> Path | None:
    """Path of the file for an engine, a TensorRT-RTX, this machine's driver and a GPU.

    None for a user without a home.
    """
    folder = cache_folder()
    if folder is None:
        return None
    model = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    sm = f"sm{device.capability.major}{device.capability.minor}"
    driver = driver_release() or "any"  # as on WSL; TensorRT-RTX checks it too
    return folder / f"{_PREFIX}{engine_sha256[:16]}-{version}-{driver}-{sm}-{model}"


class RuntimeCache:
    """The runtime cache of an engine; ``path`` is its file, None where there is no place for one.

    Everything but ``state`` wants the GPU to be current.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._cache: IRuntimeCache | None = None
        self._kept = b""  # hash of what the file is known to hold, or of an empty cache
        self._replaces = False  # the file is of no use, whatever its size
        self._found = "not used yet"
        self._written = ""

    @property
    def state(self) -> str:
        """Report of what was loaded and what was written, in one line."""
        return "; ".join(filter(None, (self._found, self._written)))

    def attach(self, config: IRuntimeConfig) -> None:
        """Give the cache to a context's configuration; the first time, make and load it."""
        try:
            self._attach(config)
        except Exception as error:  # noqa: BLE001  pybind raises what it likes
            self._found = f"off: {one_line(error)}"

    def _attach(self, config: IRuntimeConfig) -> None:
        if self._path is None:
            self._found = "off: there is no cache folder; set XDG_CACHE_HOME or HOME"
            return
        if self._cache is None:
            cache: IRuntimeCache = config.create_runtime_cache()
            if cache is None:
                self._found = "off: TensorRT-RTX makes no runtime cache"
                return
            self._cache = cache
            self._found = self._load(self._path)
            self._kept = _hash(self._serialize())
        if not config.set_runtime_cache(self._cache):
            self._found = "off: TensorRT-RTX takes no runtime cache"

    def store(self) -> None:
        """Write the kernels that were compiled since they were last written or loaded."""
        if self._cache is None or self._path is None:
            return
        try:
            content = self._serialize()
            if content and _hash(content) != self._kept:
                self._written = self._store(self._path, content)
        except Exception as error:  # noqa: BLE001  pybind raises what it likes
            reason = getattr(error, "strerror", None) or one_line(error)
            self._written = f"{self._path} cannot be written ({reason})"

    def _store(self, path: Path, content: bytes) -> str:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            # of processes that run other batches each has kernels that the others lack
            if not self._replaces and _size(path) > len(content):
                return f"not written: {path} has more kernels, of another process"
            write_whole(path, content)
            _remove_oldest(path.parent)
        self._kept, self._replaces = _hash(content), False
        return f"{len(content):,} bytes written to {path}"

    def close(self) -> None:
        """Free the cache; contexts that use it must be gone."""
        self._cache = None

    def _load(self, path: Path) -> str:
        """Load the file, and say what came of it."""
        try:
            content = _read(path)
        except FileNotFoundError:
            return "made anew"
        except OSError as error:
            self._replaces = True
            return f"made anew: {path} cannot be read ({error.strerror or error})"
        cache: IRuntimeCache = self._cache
        if not cache.deserialize(content):
            self._replaces = True
            return (
                f"made anew: {path} is damaged, or of another TensorRT-RTX, driver or GPU "
                f"({len(content):,} bytes)"
            )
        with suppress(OSError):
            os.utime(path)  # files that are used are kept
        return f"loaded {len(content):,} bytes from {path}"

    def _serialize(self) -> bytes:
        cache: IRuntimeCache = self._cache
        memory: IHostMemory = cache.serialize()
        return b"" if memory is None else bytes(memoryview(memory))


def _read(path: Path) -> bytes:
    """Read a file that is ours; a pipe is not waited for."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if status.st_uid != os.geteuid():  # what it holds runs on the GPU
            raise OSError("it belongs to another user")
        if status.st_size > _LARGEST:
            raise OSError(f"it is larger than {_LARGEST >> 20} MiB")
        return file.read(_LARGEST)


def _size(path: Path) -> int:
    """Bytes that another process may have written."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _remove_oldest(folder: Path) -> None:
    files = sorted(folder.glob(f"{_PREFIX}*"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-_FILES]:
        file.unlink(missing_ok=True)


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
