"""Contenders of a benchmark: what takes part, and what its process is asked to open."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export import manifest as manifests
from msn_export.errors import BenchError, GraphError
from msn_export.input_files import artifact_kind, require_regular
from msn_export.manifest import Described, sha256_of
from msn_export.models.checkpoint import AS_IT_SAYS, Choices
from msn_export.models.config import Pooling, readout_in
from msn_export.onnx_header import GraphMetadata
from msn_export.runtime.opening import OPENVINO
from msn_export.schema import to_plain
from msn_export.spec import Dtype, ImageSize

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from msn_export.manifest import CheckpointRecord, Manifest
    from msn_export.models.vit import AttentionKind


INPUTS = 4  # different batches that calls go through in turn: one alone would stay in the caches

# PyTorch contenders: the form of attention, and whether torch.compile gets the model
TORCH: dict[str, tuple[AttentionKind, bool]] = {
    "eager": ("eager", False),
    "sdpa": ("sdpa", False),
    "compile": ("sdpa", True),
}


@dataclass(frozen=True, slots=True)
class ContenderSpec(Described):
    """A contender that is to be timed; ``opening`` is what its process is asked to open."""

    name: str
    kind: str
    opening: dict[str, Any]
    file: Path | None = None
    manifest: Manifest | None = None
    sha256: str | None = None
    dtype: str | None = None
    metadata: GraphMetadata | None = None

    @property
    def checkpoint(self) -> CheckpointRecord | None:
        return self.manifest.checkpoint if self.manifest is not None else None


@dataclass(frozen=True, slots=True)
class Placement:
    """Options of all contenders: ``device`` None is the CPU, ``resident`` times no copies."""

    threads: int
    device: int | None = None
    providers: tuple[str, ...] = ()
    trust: bool = False
    resident: bool = False
    cuda_graphs: bool = True
    precision: str | None = None

    @property
    def torch_device(self) -> str:
        return "cpu" if self.device is None else f"cuda:{self.device}"


def artifacts(paths: Sequence[Path], placement: Placement) -> list[ContenderSpec]:
    """Enter files under their names, or their paths where names are alike, with their runtime."""
    names = Counter(path.name for path in paths)
    found = [
        artifact(
            path,
            placement,
            (path.name if names[path.name] == 1 else str(path))
            + (_mark(placement) if path.suffix == ".onnx" else ""),
        )
        for path in paths
    ]
    twice = [name for name, count in Counter(entry.name for entry in found).items() if count > 1]
    if twice:
        raise GraphError(f"{twice[0]} is given twice; name each artifact once")
    return found


def _mark(placement: Placement) -> str:
    """Mark graphs that run in OpenVINO, with what fp32 is computed in where that is not fp32."""
    if OPENVINO not in placement.providers:
        return ""
    precision = placement.precision or Dtype.FP32
    return " (ov)" if precision == Dtype.FP32 else f" (ov {precision})"


_IN_ONNXRUNTIME = " (ort)"  # the mark of a graph that runs in OpenVINO beside it


def artifact(path: Path, placement: Placement, name: str) -> ContenderSpec:
    require_regular(path, artifact_kind(path))
    manifest = manifests.read(path)
    kind = "onnx" if path.suffix == ".onnx" else "engine"
    metadata = GraphMetadata.of(path) if manifest is None and kind == "onnx" else None
    return ContenderSpec(
        name,
        kind,
        {"kind": kind, "path": str(path), "placement": to_plain(placement)},
        file=path,
        manifest=manifest,
        sha256=manifest.sha256 if manifest is not None else sha256_of(path),
        dtype=str(manifest.dtype) if manifest is not None else None,
        metadata=metadata,
    )


def source_graphs(
    entries: Sequence[ContenderSpec], placement: Placement
) -> Iterator[ContenderSpec]:
    """Enter what ``--against onnxruntime`` runs.

    That is the graphs that engines were compiled from, and those that run in OpenVINO.
    """
    if OPENVINO in placement.providers:
        here = replace(placement, providers=("cpu",), precision=None)
        for entry in entries:
            if entry.kind == "onnx" and entry.file is not None:
                name = entry.name.removesuffix(_mark(placement))
                yield artifact(entry.file, here, f"{name}{_IN_ONNXRUNTIME}")
        return
    engines = [entry for entry in entries if entry.kind == "engine"]
    if not engines:
        raise BenchError("onnxruntime: every artifact here is an .onnx file and runs in it already")
    for entry in engines:
        source = entry.manifest.source if entry.manifest is not None else None
        if entry.file is None or source is None:
            raise BenchError(
                f"onnxruntime: {entry.name} has no manifest that names its graph; give the .onnx "
                "file as one more artifact"
            )
        path = entry.file.parent / Path(source.file).name
        if not path.is_file() or sha256_of(path) != source.sha256:
            raise BenchError(
                f"onnxruntime: the graph of {entry.name}, {source.file}, is not beside it; give "
                "the .onnx file as one more artifact"
            )
        if path.name not in {other.name for other in entries}:
            yield artifact(path, placement, path.name)


@dataclass(frozen=True, slots=True)
class Origin:
    """The checkpoint that PyTorch contenders load, and the artifacts' outputs and image size.

    ``kept``, ``blocks`` and ``normalize`` are those of ``VitConfig``, as the first
    artifact with a checkpoint has them. ``classifier`` is a file with the rows [classes, width] of
    a classifier that was fitted on it, which reads ``pooling`` of the last ``pooled_blocks``.
    """

    checkpoint: str
    sha256: str | None
    outputs: tuple[str, ...]
    size: ImageSize
    choices: Choices = AS_IT_SAYS
    kept: tuple[int, ...] = ()
    blocks: int = 1
    normalize: bool = False
    classifier: str | None = None
    pooling: Pooling = "features"
    pooled_blocks: int = 1


def origin_of(
    entries: Sequence[ContenderSpec],
    checkpoint: str | None,
    outputs: tuple[str, ...],
    size: ImageSize,
    choices: Choices = AS_IT_SAYS,
    folder: Path | None = None,
) -> Origin:
    """Find the checkpoint: the one that was named, or the first artifact's own.

    It is read as the manifest says it was, unless ``choices`` say otherwise. A classifier that was
    fitted on it is written into ``folder``.
    """
    of = next((entry for entry in entries if entry.checkpoint is not None), None)
    if of is not None and of.checkpoint is not None:
        record = of.checkpoint
        choices = choices or Choices(record.variant, record.weights)
        config = of.manifest.config if of.manifest is not None else None
        readout = readout_in(config or {}, f"manifest of {of.name}")
        found = Origin(
            checkpoint or record.source, record.sha256, outputs, size, choices, **readout
        )
        return replace(found, **fitted(of, folder))
    if checkpoint is None:
        raise BenchError("no manifest names a checkpoint; name it with --checkpoint")
    return Origin(checkpoint, None, outputs, size, choices)


def fitted(entry: ContenderSpec, folder: Path | None) -> dict[str, Any]:
    """Write a classifier that was fitted into a folder; give what ``Origin`` says of it."""
    manifest = entry.manifest
    if manifest is None or manifest.fit is None or entry.file is None or folder is None:
        return {}
    from msn_export.graph.classifier import fitted_classifier  # onnx, which bench alone needs not

    try:
        found = fitted_classifier(entry.file, manifest)
    except GraphError as error:
        raise BenchError(str(error)) from error
    path = folder / "classifier.npy"
    np.save(path, found.weight)
    return {
        "classifier": str(path), "pooling": found.pooling, "pooled_blocks": found.blocks,
    }  # fmt: skip


def torch_dtype(entry: ContenderSpec, placement: Placement) -> Dtype:
    """Choose what PyTorch computes in beside an artifact: fp32 on the CPU, on a GPU its dtype.

    Half precision beside 8 bits: the PyTorch reference has no quantised form.
    """
    if placement.device is None or entry.dtype is None:
        return Dtype.FP32
    dtype = Dtype(entry.dtype)
    return Dtype.FP16 if dtype.is_quantised else dtype


def torch_entry(kind: str, origin: Origin, placement: Placement, dtype: Dtype) -> ContenderSpec:
    opening = {
        "kind": kind,
        "origin": to_plain(origin),
        "dtype": str(dtype),
        "placement": to_plain(placement),
    }
    return ContenderSpec(kind, kind, opening, sha256=origin.sha256, dtype=str(dtype))
