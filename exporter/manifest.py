"""The sidecar of an artifact: what it is, what it came from, and what was checked.

``model.onnx`` has ``model.onnx.json``. Standard library only: the runtime reads it first.
"""

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from msn_export import __version__
from msn_export.errors import ManifestError, SpecError
from msn_export.fit_record import FitRecord
from msn_export.input_files import HASHED, MANIFEST, open_regular, read_bytes
from msn_export.onnx_header import GraphMetadata
from msn_export.preprocessing import Preprocessing
from msn_export.schema import from_plain, to_plain
from msn_export.spec import (
    BatchRange,
    ComputeCapability,
    Dtype,
    Scores,
    Target,
    Targets,
    TensorSpec,
)
from msn_export.version_table import Row, row_of

# A file that changed less long ago may change again within one tick of its file system's clock
_SETTLED = 2 * 10**9  # nanoseconds; FAT keeps times to 2 s


def manifest_path(artifact: Path) -> Path:
    """Name the sidecar of an artifact: ``model.onnx`` has ``model.onnx.json``."""
    if not artifact.name:
        raise SpecError(f"{str(artifact)!r} names no file; give the path of an artifact")
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
    with open_regular(path, HASHED) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """The origin of the weights, and what the user chose to read them so."""

    source: str
    sha256: str
    notes: tuple[str, ...] = ()
    variant: str | None = None
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class AttentionRecord:
    """The number of attention cores, and of those that are fused operators."""

    expected: int
    fused: int
    form: str


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image's worst figures in a check. None: not a number."""

    name: str
    cosine: float | None
    max_abs: float | None


Conclusion: TypeAlias = Literal[
    "significant loss", "allowed loss", "no significant loss", "too few images"
]


@dataclass(frozen=True, slots=True)
class ShareRecord:
    """The share of images whose class is right, with Wilson's interval at 95 %."""

    top1: float
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class AccuracyRecord:
    """Accuracy of both sides on the same labelled images.

    ``lost`` images are right in the reference alone, ``gained`` ones in the candidate alone.
    ``p_value`` is McNemar's exact test, one-sided: the probability that chance alone loses as many.
    ``loss_bound`` is not exceeded by the loss, with 95 % confidence. ``allowed`` is the loss that
    does not fail, ``not_finite`` counts the candidate's answers with NaN or infinity. Shares are
    from 0 to 1 (``msn_export.metrics.accuracy``). ``images`` of the ``given`` pictures of
    ``labelled`` were judged; ``by`` says by what: logits, or neighbours.
    """

    images: int
    reference: ShareRecord
    candidate: ShareRecord
    difference: float
    lost: int
    gained: int
    p_value: float
    loss_bound: float
    allowed: float
    not_finite: int
    conclusion: Conclusion
    passed: bool
    labelled: str = ""
    classes: int = 0
    by: str = ""
    given: int = 0


@dataclass(frozen=True, slots=True)
class CheckRecord:
    """The figures of a check, those of the worst output. None: not a number.

    ``images`` of the ``given`` ones were run. ``relative``, ``cls`` and ``worst_token`` are errors
    relative to the reference (``msn_export.metrics.metrics.Errors``); ``limits`` says by output
    what they may be, as it was measured on ``limits_from``, and is empty where nothing could be.
    ``twin_error`` is what the candidate's precision costs the reference on these images.
    ``neighbours`` and ``classes`` are the shares of images whose nearest neighbour and whose class
    are the reference's, None where not measured. ``gate`` holds the numbers that had to be reached
    beside the limits. ``skipped`` says by reason how many files of the folder are no pictures that
    can be read. ``accuracy`` is that of both sides on labelled images, where some were given.
    ``images_apart`` says that every operator of the graph is known to keep the images of a batch
    apart: then larger batches than ``batches`` were not run, for they compute the same.
    """

    images: int
    source: str
    batches: tuple[int, ...]
    max_abs: float | None
    mean_abs: float | None
    cosine_min: float | None
    cosine_p1: float | None
    cosine_median: float | None
    passed: bool
    executed_on: str
    reference: str
    outputs: dict[str, dict[str, float | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    neighbours: float | None = None
    classes: float | None = None
    per_image: tuple[ImageRecord, ...] = ()
    gate: dict[str, float] = field(default_factory=dict)
    given: int = 0
    relative: float | None = None
    norm_ratio_min: float | None = None
    norm_ratio_max: float | None = None
    cls: float | None = None
    worst_token: float | None = None
    twin_error: float | None = None
    limits: dict[str, dict[str, float | None]] = field(default_factory=dict)
    limits_from: str = ""
    skipped: dict[str, int] = field(default_factory=dict)
    accuracy: AccuracyRecord | None = None
    images_apart: bool = False


@dataclass(frozen=True, slots=True)
class SumsRecord:
    """The precision that fused attention computes with in the engine, and its check.

    ``fp16`` are the ONNX nodes whose kernel sums in fp16, ``bf16`` those typed bf16 in the engine
    alone. ``scores`` and ``sums`` are the largest absolute score and unnormalised sum of values of
    those in ``fp16`` in the CPU's emulation of the kernel (None: not finite), ``check`` what came
    of it; None where it was not emulated.
    """

    fp16: tuple[str, ...] = ()
    bf16: tuple[str, ...] = ()
    scores: dict[str, float | None] = field(default_factory=dict)
    sums: dict[str, float | None] = field(default_factory=dict)
    check: CheckRecord | None = None


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """The kernels and types of a compiled engine, and whether it has run.

    ``later`` says that it is for GPUs after the last of ``compute_capabilities`` too.
    ``accumulators`` counts the fused attention kernels by what they sum in: fp16, fp32, int32, or
    unknown where the engine does not tell.
    """

    backend: str
    version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    kernels: int
    kernels_per_block: dict[str, int]
    fused_attention: int
    gemm_dtypes: dict[str, int]
    executed: bool
    reason: str
    later: bool = False
    quantised_products: int = 0
    accumulators: dict[str, int] = field(default_factory=dict)
    census: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    check: CheckRecord | None = None
    attention: SumsRecord | None = None

    def __post_init__(self) -> None:
        _ = self.targets  # a manifest that names no generation is refused where it is read

    @property
    def targets(self) -> Targets:
        return Targets(tuple(map(ComputeCapability.parse, self.compute_capabilities)), self.later)


@dataclass(frozen=True, slots=True)
class GoldenRecord:
    """A seeded input as a recipe, and what the reference made of it (``msn_export.golden``).

    ``shape`` is that of the pixels [b, h, w, c]; ``values`` are float32 [b, dim], little endian,
    in base64: the output called ``output``, of tokens [b, n, dim] the first. ``limit`` is what the
    relative error of a machine may be; None where nothing was checked.
    """

    generator: str
    seed: int
    shape: tuple[int, ...]
    output: str
    dim: int
    values: str
    reference: str
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """The file an artifact was made from."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class QuantizationRecord:
    """The quantisation of a graph: how it was done, what it costs and what it saves.

    Shares are from 0 to 1, sizes in bytes. ``kept`` names the blocks that stay in ``base`` with
    why; ``drift`` is the relative error of the embedding with one block quantised at a time, where
    that was measured; ``smoothing_errors`` are those of the products at each strength. ``twin`` is
    the same graph in ``base``, ``compiled`` what TensorRT made of both, or why it did not.
    """

    format: str
    base: str
    observer: str
    smoothing: float | None
    smoothing_errors: dict[str, float]
    attention: bool
    bias_correction: bool
    products: int
    expected: int
    kept: dict[str, str]
    drift: dict[str, float]
    calibration_images: int
    held_out: tuple[str, ...]
    seed: int
    limit: int
    ranges: SourceRecord
    sizes: dict[str, int]
    twin: CheckRecord
    neighbours: dict[str, float | None]
    classes: dict[str, float | None]
    compiled: dict[str, Any]
    latency: dict[str, Any]
    worthwhile: bool
    verdict: str


SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """All that is known of an artifact.

    ``least_versions`` says of other runtimes the first version that takes a graph (None: none
    does), as the version table had it when the graph was written.
    """

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
    fit: FitRecord | None = None
    least_versions: dict[str, str | None] = field(default_factory=dict)
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

    @property
    def row(self) -> Row | None:
        """A graph's row of the version table; None of an engine."""
        base = Dtype(self.quantization.base) if self.quantization is not None else None
        return row_of(Target.of(self.target), self.dtype, base) if self.kind == "onnx" else None

    @property
    def metadata(self) -> GraphMetadata:
        """The part of it that a graph's own file holds."""
        return GraphMetadata(
            self.preprocessing, self.labels, self.scores, Target.of(self.target), self.dtype
        )


class Described:
    """An artifact that is described by a manifest, else by the metadata in its own file."""

    __slots__ = ()
    manifest: Manifest | None
    metadata: GraphMetadata | None

    @property
    def stated(self) -> Manifest | GraphMetadata | None:
        """Whatever says how it is used."""
        return self.manifest or self.metadata

    @property
    def labels(self) -> tuple[str, ...]:
        """The classifier's labels; empty where the artifact has none."""
        return self.stated.labels if self.stated is not None else ()

    @property
    def scores(self) -> Scores | None:
        """Kind of scores that logits become; None decides by the number of classes."""
        return self.stated.scores if self.stated is not None else None


def read(artifact: Path, content: bytes | None = None) -> Manifest | None:
    """Read the manifest beside ``artifact`` and verify that it describes this file.

    Args:
        artifact: the file.
        content: its bytes, for a caller that uses these and does not open the file again.

    Returns:
        The manifest, or None if there is none.

    Raises:
        ManifestError: it is malformed, of a later schema, or of another file (size or sha256), or
            says other things than the file itself.
    """
    path = manifest_path(artifact)
    if not os.path.lexists(path):
        return None
    manifest = read_unverified(path)
    _require_match(artifact, manifest, content)
    if manifest.kind == "onnx" and _is_graph(artifact):
        _require_agreement(artifact, manifest)
    return manifest


def read_stated(artifact: Path) -> Manifest | GraphMetadata | None:
    """Read the manifest beside an artifact; of a graph without one what its own file says."""
    manifest = read(artifact)
    return GraphMetadata.of(artifact) if manifest is None and _is_graph(artifact) else manifest


def _is_graph(artifact: Path) -> bool:
    return artifact.suffix == ".onnx"


def read_unverified(path: Path) -> Manifest:
    """Read a manifest for what it says of itself, as where its artifact is not there."""
    content = read_bytes(path, MANIFEST)
    try:
        text = content.decode()
        plain = json.loads(text)
        if "\\ud" in text.lower():  # half of a surrogate pair is no text: nothing could write it
            json.dumps(plain, ensure_ascii=False).encode()
        _require_manifest(plain, path)
        _require_seal(plain, path)
    except (ValueError, RecursionError) as error:
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
    _require_possible(manifest, path)
    return manifest


_PROFILES = 64  # of one engine; each has its own kernels and memory
_ENLARGED = 16  # a picture's side before the crop, in sides of what is cut out


def _require_possible(manifest: Manifest, path: Path) -> None:
    """Refuse numbers that no export writes: they decide how much memory is asked for."""
    wrong = None
    preprocessing = manifest.preprocessing
    if len(manifest.profiles) > _PROFILES:
        wrong = f"{len(manifest.profiles):,} profiles, at most {_PROFILES} can be"
    elif preprocessing is not None:
        sides = (
            preprocessing.short_side or 1,
            *(dataclasses.astuple(preprocessing.squash) if preprocessing.squash else ()),
        )
        if max(sides) > _ENLARGED * max(preprocessing.size.height, preprocessing.size.width):
            wrong = f"pictures resized to {max(sides)} pixels for a crop of {preprocessing.size}"
        elif manifest.inputs:
            wrong = _misfit(manifest, preprocessing)
    if wrong is not None:
        raise ManifestError(f"{path} has {wrong}; export the artifact again")


def _misfit(manifest: Manifest, preprocessing: Preprocessing) -> str | None:
    """Describe an input that differs from what preprocessing makes, or from the batches."""
    taken = manifest.inputs[0]
    images = (preprocessing.size.height, preprocessing.size.width, preprocessing.channels)
    if taken.dtype != "uint8":
        images = (preprocessing.channels, preprocessing.size.height, preprocessing.size.width)
    batch, *rest = taken.shape if taken.shape else (0,)
    alike = len(rest) == 3 and all(
        isinstance(size, str) or size == one for size, one in zip(rest, images, strict=True)
    )
    if not alike:
        return f"an input {list(taken.shape)}, and preprocessing that makes {list(images)}"
    if isinstance(batch, int) and any((p.min, p.max) != (batch, batch) for p in manifest.profiles):
        return f"an input {list(taken.shape)}, and batches {', '.join(map(str, manifest.profiles))}"
    return None


def require_input(manifest: Manifest | None, inputs: Sequence[TensorSpec], name: str) -> None:
    """Refuse a manifest whose input is not the one that the graph has."""
    if manifest is None or not manifest.inputs or len(inputs) != 1:
        return
    stated, taken = manifest.inputs[0], inputs[0]
    sizes = zip(stated.shape, taken.shape, strict=False)
    alike = (stated.name, stated.dtype, len(stated.shape)) == (
        taken.name, taken.dtype, len(taken.shape),
    ) and all(isinstance(a, str) == isinstance(b, str) and (isinstance(a, str) or a == b)
              for a, b in sizes)  # fmt: skip
    if not alike:
        raise ManifestError(
            f"{name} takes {taken.name} {taken.dtype}{list(taken.shape)}, and its manifest says "
            f"{stated.name} {stated.dtype}{list(stated.shape)}; export it again"
        )


def seal(manifest: Manifest) -> str:
    """Write a manifest as JSON with a hash over the rest, so that damage to it is noticed.

    The hash guards against truncation and flipped bits, not against a forger.
    """
    plain = to_plain(manifest)
    return json.dumps({**plain, "seal": _hash_of(plain)}, indent=2, ensure_ascii=False) + "\n"


def _require_manifest(plain: Any, path: Path) -> None:
    """Refuse another JSON file of this package, which has a kind of its own and no seal."""
    kind = plain.get("kind") if isinstance(plain, dict) and "seal" not in plain else None
    if kind == "ranges":
        graph = path.with_name(f"{path.name.removesuffix('.json').removesuffix('.ranges')}.onnx")
        give = str(graph) if graph.is_file() else "the .onnx file that was written with it"
        raise ManifestError(f"{path} is a ranges file of calibrate, not a manifest; give {give}")
    if kind == "bench":
        raise ManifestError(
            f"{path} is a benchmark of msn-export bench, not a manifest; give an .onnx or .engine "
            "file"
        )


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
        f"written with it beside it, or make both again: {manifest.command or 'export it'}"
    )


def _require_agreement(artifact: Path, manifest: Manifest) -> None:
    """Refuse a manifest that says something else of a graph than the graph's own file does."""
    own, stated = GraphMetadata.of(artifact), manifest.metadata
    if own is None or own.target is None or own == stated:  # None: written before it was whole
        return
    names = [one.name for one in fields(own) if getattr(own, one.name) != getattr(stated, one.name)]
    raise ManifestError(
        f"{manifest_path(artifact)} and {artifact} say different things of its {', '.join(names)}; "
        "one of the two was changed: export it again, or take the manifest away to use the file's"
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
