"""Where an artifact's manifest lies, and the hash that ties the two together."""

import hashlib
from pathlib import Path


def manifest_path(artifact: Path) -> Path:
    """Name the sidecar of an artifact: ``model.onnx`` has ``model.onnx.json``."""
    return artifact.with_name(artifact.name + ".json")


def sha256_of(path: Path) -> str:
    """Hash a file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
