"""The sidecar of an artifact: what it is, what it came from, and what was checked.

``model.onnx`` has ``model.onnx.json``. Standard library only: the runtime reads it first.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from msn_export import __version__
from msn_export.errors import ManifestError
from msn_export.manifest_records import (
    AttentionRecord,
    CheckpointRecord,
    CheckRecord,
    EngineRecord,
    GoldenRecord,
    QuantizationRecord,
    SourceRecord,
)
from msn_export.preprocessing import Preprocessing
from msn_export.records import from_plain, to_plain
from msn_export.sidecar import manifest_path, sha256_of
from msn_export.spec import BatchRange, Dtype, Scores, TensorSpec

SCHEMA = 1
LIMIT = 16 * 2**20  # bytes; a larger file is no manifest of ours


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is known of an artifact."""

    kind: Literal["onnx", "engine"]
    output: str
    sha256: str
    bytes: int
    dtype: Dtype
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[BatchRange, ...]
    preprocessing: Preprocessing | None
    nodes: int
    ops: dict[str, int]
    attention: AttentionRecord
    check: CheckRecord | None
    opset: int
    target: str
    labels: tuple[str, ...] = ()
    scores: Scores | None = None
    checkpoint: CheckpointRecord | None = None
    config: dict[str, Any] | None = None
    islands: dict[str, float | None] = field(default_factory=dict)
    simplified: str = ""
    source: SourceRecord | None = None
    engine: EngineRecord | None = None
    golden: GoldenRecord | None = None
    quantization: QuantizationRecord | None = None
    notes: tuple[str, ...] = ()
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    product: str = f"msn-export {__version__}"
    schema: int = SCHEMA

    @property
    def rounds_as(self) -> Dtype:
        """The dtype whose gate its figures must reach: TF32 has as much mantissa as fp16."""
        tf32 = self.engine is not None and self.engine.options.get("tf32") is True
        return Dtype.FP16 if tf32 and self.dtype is Dtype.FP32 else self.dtype


def read(artifact: Path, content: bytes | None = None) -> Manifest | None:
    """Read the manifest beside ``artifact`` and verify that it describes this file.

    Args:
        artifact: the file.
        content: its bytes, for a caller that uses these and does not open the file again.

    Returns:
        The manifest, or None if there is none.

    Raises:
        ManifestError: it is malformed, of a later schema, or of another file (size or sha256).
    """
    path = manifest_path(artifact)
    if not path.is_file():
        return None
    manifest = read_unverified(path)
    _require_match(artifact, manifest, content)
    return manifest


def read_unverified(path: Path) -> Manifest:
    """Read a manifest for what it says of itself, as where its artifact is not there.

    Raises:
        ManifestError: it is malformed, or of a later schema.
    """
    if path.stat().st_size > LIMIT:
        raise ManifestError(f"{path} is larger than a manifest can be; export the artifact again")
    try:
        text = path.read_text(encoding="utf-8")
        plain = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair is no text: nothing could write it
            json.dumps(plain, ensure_ascii=False).encode()
        _require_seal(plain, path)
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is not JSON ({error}); export the artifact again") from error
    schema = plain.get("schema") if isinstance(plain, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ManifestError(
            f"{path} has schema {schema}, this version reads up to {SCHEMA}; upgrade msn-export"
        )
    manifest = from_plain(Manifest, plain, path.name)
    for name in ("inputs", "outputs", "profiles"):  # a graph tells them itself, an engine does not
        if manifest.kind == "engine" and not getattr(manifest, name):
            raise ManifestError(f"{path}: there are no {name}; export the artifact again")
    return manifest


def seal(manifest: Manifest) -> str:
    """Write a manifest as JSON with a hash over the rest, so that damage to it is noticed.

    The hash guards against truncation and flipped bits, not against a forger.
    """
    plain = to_plain(manifest)
    return json.dumps({**plain, "seal": _hash_of(plain)}, indent=2, ensure_ascii=False) + "\n"


def _require_seal(plain: Any, path: Path) -> None:
    found = plain.pop("seal", None) if isinstance(plain, dict) else None
    if found != _hash_of(plain):
        raise ManifestError(
            f"{path} was changed or damaged after it was written (its seal does not fit); "
            "export the artifact again"
        )


def _hash_of(plain: Any) -> str:
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _require_match(artifact: Path, manifest: Manifest, content: bytes | None) -> None:
    try:
        size = artifact.stat().st_size if content is None else len(content)
        if size != manifest.bytes:
            differs = f"{size} bytes, manifest {manifest.bytes}"
        else:
            found = sha256_of(artifact) if content is None else hashlib.sha256(content).hexdigest()
            if found == manifest.sha256:
                return
            differs = f"sha256 {found[:12]}…, manifest {manifest.sha256[:12]}…"
    except OSError as error:
        raise ManifestError(f"{artifact} cannot be read: {error.strerror}") from error
    raise ManifestError(
        f"{artifact} is not the file its manifest describes ({differs}); put the manifest that was "
        "written with it beside it, or export it again"
    )


def versions_of(*packages: str) -> dict[str, str]:
    """Look up the installed versions of what took part."""
    import importlib.metadata  # 30 ms that reading a manifest does not need

    found = {"msn-export": __version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
