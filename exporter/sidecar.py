"""Where an artifact's manifest lies, and the hash that ties the two together."""

import functools
import hashlib
import time
from pathlib import Path

# A file that changed less long ago may change again within one tick of its file system's clock
_SETTLED = 2 * 10**9  # nanoseconds; FAT keeps times to 2 s


def manifest_path(artifact: Path) -> Path:
    """Name the sidecar of an artifact: ``model.onnx`` has ``model.onnx.json``."""
    return artifact.with_name(artifact.name + ".json")


def sha256_of(path: Path) -> str:
    """Hash a file's bytes, as 64 hexadecimal digits; a file that stays as it is, once a process."""
    now = path.stat()
    changed = max(now.st_mtime_ns, now.st_ctime_ns)
    if time.time_ns() - changed < _SETTLED:
        return _hash(path)
    return _hash_once(path.absolute(), now.st_dev, now.st_ino, now.st_size, changed)


@functools.lru_cache(maxsize=256)
def _hash_once(path: Path, *_identity: int) -> str:
    return _hash(path)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
