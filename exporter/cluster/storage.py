"""Pictures, artifacts and rows as a cluster moves them."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from msn_export import errors as failures
from msn_export import image_folder, images
from msn_export.embedding import decode
from msn_export.embedding.decode import decoded_content, read
from msn_export.embedding.inference import BEST, SHA256, PictureBatch, Rows
from msn_export.embedding.job import Listing, list_pictures
from msn_export.errors import (
    ClusterError,
    ImageError,
    MissingPackageError,
    MsnExportError,
    RunnerError,
)
from msn_export.manifest import manifest_path, sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from msn_export.embedding.decode import Decoded
    from msn_export.preprocessing import Preprocessing


SCHEMES = ("s3", "gs", "gcs")
_LOOKING = 32  # objects whose first bytes are read at once, where no ending tells what they are
# What pyarrow passes on where one object is at fault; anything else is a failure of the store
_OF_ONE_OBJECT = ("ACCESS_DENIED", "NO_SUCH_KEY", "Permission denied")


class PictureAddress(NamedTuple):
    """One picture: where it is opened, and what people call it."""

    path: str
    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Store:
    """Opens pictures, on any machine; ``filesystem`` None is the machine's own."""

    filesystem: Any = None
    root: str = ""  # where relative paths begin
    scheme: str = ""

    def source(self, path: bytes) -> PictureAddress:
        """Name a picture by what its listing calls it."""
        text = os.fsdecode(path)
        if self.filesystem is None:
            return PictureAddress(str(Path(self.root, text)), text)
        return PictureAddress(text, f"{self.scheme}://{text}")


def list_sources(images_at: Path | str) -> tuple[Listing, Store]:
    """List the pictures of a local folder (or one file), or of a bucket's URI."""
    if isinstance(images_at, Path):
        return list_pictures(images_at), Store(root=str(Path.cwd()))
    scheme, _, _ = images_at.partition("://")
    if scheme not in SCHEMES:
        raise ImageError(
            f"{images_at}: buckets of {', '.join(name + '://' for name in SCHEMES)} are read; "
            "expected one of them, or a folder"
        )
    try:
        from pyarrow import fs
    except ImportError as error:
        raise MissingPackageError(
            f"a bucket is read by pyarrow ({error}); pip install 'msn-export[ray]'"
        ) from error
    try:
        filesystem, folder = fs.FileSystem.from_uri(images_at)
        folder = folder.rstrip("/")
        found = [filesystem.get_file_info(folder)]  # one object, or what is taken for a folder
        if found[0].type != fs.FileType.File:
            found = filesystem.get_file_info(fs.FileSelector(folder, recursive=True))
    except (OSError, ValueError) as error:
        text = first_line(error).replace(_key(images_at), "")
        raise ClusterError(f"cannot list {_safe(images_at)}: {text}") from error
    pictures = _bucket(_safe(images_at), folder, found, filesystem)
    return pictures, Store(filesystem, scheme=scheme)


def _bucket(uri: str, folder: str, found: list[Any], store: Any) -> Listing:
    """List a bucket's pictures in the order that a local copy of it would have."""
    from pyarrow import fs

    files = [one for one in found if one.type == fs.FileType.File]
    single = len(files) == 1 and files[0].path == folder
    reasons = {} if single else _reasons([one.path for one in files], folder, store)
    pictures = [one for one in files if one.path not in reasons]
    skipped = Counter(reasons.values())
    if not pictures:
        why = f" ({image_folder.skips(skipped)})" if skipped else ""
        raise ImageError(f"{uri} holds no picture that can be read{why}")
    pictures.sort(key=lambda one: one.path.split("/"))
    below = folder.rfind("/") + 1 if single else len(folder) + 1
    paths = [one.path for one in pictures]
    stats = ((one.size, -1 if one.mtime_ns is None else one.mtime_ns // 1000) for one in pictures)
    return Listing.of(uri, paths, stats, below, dict(sorted(skipped.items())))


def _reasons(paths: list[str], folder: str, store: Any) -> dict[str, str]:
    """Give by path why an object is no picture that can be read here."""
    reasons: dict[str, str] = {}
    unsure = []
    for path in paths:
        below = PurePosixPath(path).relative_to(folder)
        if any(part.startswith(".") for part in below.parts):
            reasons[path] = "hidden"
        elif below.suffix.lower() not in image_folder.ENDINGS:
            unsure.append(path)
    with ThreadPoolExecutor(_LOOKING) as pool:
        for path, reason in zip(unsure, pool.map(lambda at: _look(at, store), unsure), strict=True):
            if reason is not None:
                reasons[path] = reason
    return reasons


def _look(path: str, store: Any) -> str | None:
    try:
        with store.open_input_file(path) as file:
            kind = images.kind_of(file.read(images.HEADER))
    except OSError as error:
        if _is_of_one(error):
            return "object that cannot be opened"
        raise ClusterError(f"cannot read {path}: {first_line(error)}") from error
    return "no picture" if kind is None else images.unreadable(kind)


def _is_of_one(error: OSError) -> bool:
    text = first_line(error)
    return isinstance(error, FileNotFoundError) or any(word in text for word in _OF_ONE_OBJECT)


def read_source(source: PictureAddress, *, store: Store, preprocessing: Preprocessing) -> Decoded:
    if store.filesystem is None:
        return read(Path(source.path), preprocessing, source.name)
    try:
        content = _fetch(source, store.filesystem)
    except ImageError as error:
        return str(error)
    return decoded_content(content, source.name, preprocessing)


def _fetch(source: PictureAddress, filesystem: Any) -> bytes:
    try:
        with filesystem.open_input_file(source.path) as file:
            size = file.size()
            if size > decode.LARGEST:
                raise ImageError(decode.too_large(str(source), size))
            return bytes(file.read())
    except OSError as error:
        text = first_line(error)
        if _is_of_one(error):
            raise ImageError(f"{source} is not a readable picture ({text})") from error
        raise ClusterError(f"cannot read {source}: {text}") from error


def first_line(error: BaseException) -> str:
    """Give the first line of what an error says, or its type's name."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # Ray colours its messages
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _safe(uri: str) -> str:
    """Leave a key and its secret, which an s3 URI may hold, out of what is shown and written."""
    return uri.partition("?")[0].replace(_key(uri), "")


def _key(uri: str) -> str:
    """Give the part before the bucket: ``KEY:SECRET@``; a secret may have a slash in it."""
    found = re.match(r"[^:]+://([^/@]*:[^?]*@|[^/@]*@)", uri)
    return found[1] if found else "\0"  # which is in no text


@dataclass(frozen=True, slots=True)
class ArtifactBytes:
    """An artifact and its manifest; arrays, for Ray shares those between processes uncopied."""

    path: Path  # where it lies on the machine that sends it
    sha256: str
    artifact: NDArray[np.uint8]
    manifest: NDArray[np.uint8] | None


def pack(model: Path) -> ArtifactBytes:
    if not model.is_file():
        raise RunnerError(f"{model} does not exist; give an .onnx file or an engine")
    sidecar = manifest_path(model)
    return ArtifactBytes(
        model.absolute(),
        sha256_of(model),
        np.fromfile(model, np.uint8),
        np.fromfile(sidecar, np.uint8) if sidecar.is_file() else None,
    )


@contextmanager
def unpacked(model: ArtifactBytes) -> Iterator[Path]:
    """Give the artifact as a file, for as long as it takes to open it.

    Where the very file lies at the same path, as on a file system that the machines share, it is
    that one: then weights in files beside it are found too.
    """
    if model.path.is_file() and sha256_of(model.path) == model.sha256:
        yield model.path
        return
    with tempfile.TemporaryDirectory(prefix="msn-export-") as folder:
        path = Path(folder, model.path.name)
        model.artifact.tofile(path)
        if model.manifest is not None:
            model.manifest.tofile(manifest_path(path))
        yield path


Record: TypeAlias = "dict[str, Any]"


def encode_pixels(start: int, pictures: PictureBatch) -> Record:
    """Write a batch of pictures and why some are black."""
    return {
        "start": start,
        "shape": json.dumps(pictures.pixels.shape),
        "pixels": pictures.pixels.tobytes(),
        "hashes": pictures.hashes.tobytes(),
        "errors": json.dumps(pictures.errors),
        "turned": pictures.turned,
    }


def decode_pixels(record: Record) -> tuple[int, PictureBatch]:
    pixels = np.frombuffer(record["pixels"], np.uint8).reshape(json.loads(record["shape"]))
    hashes = np.frombuffer(record["hashes"], np.uint8).reshape(-1, SHA256)
    # copied: a runner may refuse read-only memory
    pictures = PictureBatch(pixels.copy(), _errors(record), int(record["turned"]), hashes)
    return int(record["start"]), pictures


def encode_rows(start: int, rows: Rows) -> Record:
    return {
        "start": start,
        "shape": json.dumps(rows.vectors.shape),
        "vectors": rows.vectors.tobytes(),
        "best": b"" if rows.best is None else rows.best.tobytes(),
        "hashes": b"" if rows.hashes is None else rows.hashes.tobytes(),
        "errors": json.dumps(rows.errors),
        "turned": rows.turned,
        "failure": "",
    }


def encode_failure(error: MsnExportError) -> Record:
    """Write why there are no rows.

    As a record it comes after the rows that were made before it. Raised, it would overtake them:
    Ray Data drops what is on its way, and a resumed run would make it again.
    """
    nothing = Rows(np.zeros((0, 0), np.float32))
    return encode_rows(0, nothing) | {"failure": json.dumps([type(error).__name__, str(error)])}


def decode_rows(record: Record) -> tuple[int, Rows]:
    if record["failure"]:
        name, text = json.loads(record["failure"])
        kind = getattr(failures, name, None)
        if isinstance(kind, type) and issubclass(kind, MsnExportError):
            raise kind(text)
        raise ClusterError(text)
    vectors = np.frombuffer(record["vectors"], np.float32).reshape(json.loads(record["shape"]))
    best = None
    if record["best"]:
        best = np.frombuffer(record["best"], BEST).reshape(len(vectors), -1)
    hashes = None
    if record["hashes"]:
        hashes = np.frombuffer(record["hashes"], np.uint8).reshape(-1, SHA256)
    rows = Rows(vectors, best, _errors(record), int(record["turned"]), hashes)
    return int(record["start"]), rows


def _errors(record: Record) -> dict[int, str]:
    return {int(index): text for index, text in json.loads(record["errors"]).items()}
