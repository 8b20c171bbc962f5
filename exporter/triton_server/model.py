"""An artifact as Triton serves it, and which Triton Inference Server container serves it.

An engine loads only in the TensorRT that built it, so it needs the container that ships that one.

Sources, one row a container ``nvcr.io/nvidia/tritonserver:XX.YY-py3``:

* TensorRT: docs.nvidia.com/deeplearning/triton-inference-server/release-notes/rel-26-04.html, table
  "NVIDIA Triton Inference Server Container Versions" (newest rows from rel-26-05.html). A row is
  None where that table is silent (25.07, 26.06 on) or contradicts another page of NVIDIA's (24.12:
  10.6 there, 10.7 in the compatibility matrix). The ``-trtllm-python-py3`` images ship others.
* onnxruntime: triton-inference-server/server, docs/introduction/compatibility.md, table
  "ONNX Runtime Versions".
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import onnx_ir as ir

from msn_export import manifest as manifests
from msn_export.engine_header import read_header
from msn_export.errors import ManifestError, SpecError
from msn_export.graph import io
from msn_export.graph.precision import graph_dtype
from msn_export.graph.simplify import fix_image_size
from msn_export.graph.summary import tensor_specs
from msn_export.host import require_memory
from msn_export.input_files import ENGINE, GRAPH, require_regular
from msn_export.manifest import Described, Manifest
from msn_export.onnx_header import UNSEALED, GraphMetadata
from msn_export.preprocessing import Preprocessing
from msn_export.spec import BatchRange, ImageSize, InputFormat, Targets, TensorSpec
from msn_export.version_table import Client, Row, numbers, row_by_opset

LOGITS = "logits"


class Platform(StrEnum):
    """Triton's word for a kind of model; its backend and its file's name follow from it."""

    ONNX = "onnxruntime_onnx"
    PLAN = "tensorrt_plan"

    @property
    def backend(self) -> str:
        return "onnxruntime" if self is Platform.ONNX else "tensorrt"

    @property
    def filename(self) -> str:
        """Name of the file in a version's folder unless the configuration names another."""
        return "model.onnx" if self is Platform.ONNX else "model.plan"


@dataclass(frozen=True, slots=True)
class ServedArtifact(Described):
    """A file that is served; ``inputs`` and ``outputs`` are empty where they are not known.

    ``built_with`` names the TensorRT of an engine as (flavour, version), ``weights`` the files
    beside an ONNX file that hold its weights. ``notes`` say what had to be decided. ``row`` is the
    row of the version table that a graph is in, None where no row is like it.
    """

    path: Path
    platform: Platform
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[BatchRange, ...] = ()
    manifest: Manifest | None = None
    weights: tuple[Path, ...] = ()
    built_with: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()
    metadata: GraphMetadata | None = None
    row: Row | None = None

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size it takes; None where there is a range.

        A plan's batch is fixed by its profiles, whatever its graph says; an ONNX file's by its
        input's shape.
        """
        sizes = {spec.shape[0] for spec in self.inputs if spec.shape}
        fixed = [size for size in sizes if isinstance(size, int)]
        if fixed:
            return fixed[0]
        ranges = set(self.profiles) if self.platform is Platform.PLAN else set()
        only = next(iter(ranges)) if len(ranges) == 1 else None
        return only.max if only is not None and only.is_static else None

    @property
    def targets(self) -> Targets:
        """The GPU generations an engine was built for, where its manifest says so."""
        engine = self.manifest.engine if self.manifest else None
        return engine.targets if engine else Targets()

    @property
    def version_compatible(self) -> bool:
        """True for an engine that carries the lean runtime that later TensorRTs load it with."""
        engine = self.manifest.engine if self.manifest else None
        return bool(engine and engine.options.get("version_compatible"))

    @property
    def preprocessing(self) -> Preprocessing | None:
        return self.stated.preprocessing if self.stated else None

    @property
    def image(self) -> tuple[ImageSize, int] | None:
        """The size and channels of the images it takes; None where its one input is none of them.

        Bytes are [b, h, w, c], floats [b, c, h, w], as a graph of any tool has them.
        """
        if len(self.inputs) != 1 or len(self.inputs[0].shape) != 4:
            return None
        sizes = [size for size in self.inputs[0].shape[1:] if isinstance(size, int)]
        if len(sizes) != 3:
            return None
        bytes_in = self.inputs[0].dtype == InputFormat.UINT8
        height, width, channels = sizes if bytes_in else (*sizes[1:], sizes[0])
        return ImageSize(height, width), channels

    def uncovered(self, limit: int) -> int | None:
        return first_uncovered(self.profiles, limit)


def first_uncovered(profiles: Iterable[BatchRange], limit: int) -> int | None:
    """Find the smallest batch of 1 to ``limit`` that none of some profiles takes."""
    reached = 0
    for profile in sorted(profiles, key=lambda profile: profile.min):
        if profile.min > reached + 1:
            break
        reached = max(reached, profile.max)
    return reached + 1 if reached < limit else None


def read_artifact(path: Path, platform: Platform | None = None) -> ServedArtifact:
    """Read an artifact; one whose manifest describes another file is refused.

    ``platform`` None goes by the file's ending.
    """
    if platform is None:
        platform = Platform.ONNX if path.suffix == ".onnx" else Platform.PLAN
    require_regular(path, GRAPH if platform is Platform.ONNX else ENGINE)
    manifest = manifests.read(path)
    if platform is Platform.ONNX:
        return _read_onnx(path, manifest)
    header = read_header(path)
    if manifest is None:
        return ServedArtifact(path, platform, (), (), built_with=(header.backend, header.version))
    engine = manifest.engine
    if engine is None or engine.backend != header.backend:
        raise ManifestError(
            f"{path} is an engine of {header.backend} {header.version} and its manifest describes "
            f"{'a graph' if engine is None else engine.backend}; build the engine again"
        )
    return ServedArtifact(
        path,
        platform,
        manifest.inputs,
        manifest.outputs,
        manifest.profiles,
        manifest,
        built_with=(engine.backend, engine.version),
    )


def _read_onnx(path: Path, manifest: Manifest | None) -> ServedArtifact:
    model = io.load(path)
    metadata = GraphMetadata.of(path) if manifest is None else None
    size = None if manifest is not None else fix_image_size(model)
    weights = model.graph.initializers
    inputs = [value for value in model.graph.inputs if value.name not in weights]
    for spec in tensor_specs(inputs):
        batch = spec.shape[0] if spec.shape else 1
        if isinstance(batch, int):  # a sample of it is made
            require_memory(str(path), batch, spec.shape[1:], 4)
    served = ServedArtifact(
        path,
        Platform.ONNX,
        tensor_specs(inputs),
        tensor_specs(list(model.graph.outputs)),
        manifest.profiles if manifest else (),
        manifest,
        () if manifest else _weight_files(path),  # our own graphs have no weights beside them
        notes=tuple(_notes(path.name, size, metadata)),
        metadata=metadata,
        row=_row(model, manifest or metadata),
    )
    if metadata is not None and served.image is not None:
        metadata.require_fit(*served.image, path.name)
    return served


def _row(model: ir.Model, stated: Manifest | GraphMetadata | None) -> Row | None:
    if stated is not None:
        return stated.row
    return row_by_opset(model.graph.opset_imports.get("", 0), graph_dtype(model))


def _notes(name: str, size: ImageSize | None, metadata: GraphMetadata | None) -> Iterator[str]:
    if metadata is not None:
        yield f"{name}: {UNSEALED}"
    if size is not None:
        yield (
            f"{name}: its image size was dynamic, and is {size} as its position embedding has it"
        )


def _weight_files(path: Path) -> tuple[Path, ...]:
    """List the files with a graph's weights, which ``io.load`` has found beside it."""
    values = ir.load(path).graph.initializers.values()
    tensors = [value.const_value for value in values]
    places = {t.location: None for t in tensors if isinstance(t, ir.ExternalTensor)}
    return tuple(path.parent / str(place) for place in places)


@dataclass(frozen=True, slots=True)
class Release:
    """One container; a version is None where no source states it."""

    name: str
    tensorrt: str | None
    onnxruntime: str | None

    @property
    def image(self) -> str:
        return f"nvcr.io/nvidia/tritonserver:{self.name}-py3"


RELEASES = tuple(
    Release(*row)
    for row in (
        ("26.07", None, "1.27.0"),
        ("26.06", None, "1.24.4"),
        ("26.05", "10.16.1.11", "1.24.4"),
        ("26.04", "10.16.1.11", "1.24.4"),
        ("26.03", "10.16.0.72", "1.24.2"),
        ("26.02", "10.15.1.29", "1.24.1"),
        ("26.01", "10.14.1.48", "1.23.2"),
        ("25.12", "10.14.1.48", "1.23.2"),
        ("25.11", "10.14.1.48", "1.23.2"),
        ("25.10", "10.13.3.9", "1.23.1"),
        ("25.09", "10.13.3.9", "1.23.0"),
        ("25.08", "10.13.2.6", "1.23.0"),
        ("25.07", None, "1.22.0"),
        ("25.06", "10.11.0.33", "1.22.0"),
        ("25.05", "10.10.0.31", "1.22.0"),
        ("25.04", "10.9.0.34", "1.21.0"),
        ("25.03", "10.9.0.34", "1.21.0"),
        ("25.02", "10.8.0.43", "1.20.1"),
        ("25.01", "10.8.0.43", "1.20.1"),
        ("24.12", None, "1.20.1"),
        ("24.11", "10.6.0.26", "1.19.2"),
        ("24.10", "10.5.0.18", "1.19.2"),
        ("24.09", "10.4.0.26", "1.19.2"),
        ("24.08", "10.3.0.26", "1.18.1"),
        ("24.07", "10.2.0.19", "1.18.1"),
        ("24.06", "10.1.0.27", "1.18.0"),
        ("24.05", "10.0.1.6", "1.18.0"),
        ("24.04", "8.6.3", "1.17.3"),
    )
)


def parse_release(text: str) -> Release:
    """Read a release's name, ``YY.MM``; of one that is not in the table no version is known."""
    if re.fullmatch(r"[0-9]{2}\.(0[1-9]|1[0-2])", text) is None:
        raise SpecError(f"Triton release {text!r} is no release; expected YY.MM, as in 25.10")
    named = (release for release in RELEASES if release.name == text)
    return next(named, Release(text, None, None))


def for_tensorrt(version: str) -> Release:
    """Choose the newest release that ships a TensorRT."""
    found = [release for release in RELEASES if same_tensorrt(release.tensorrt, version)]
    if found:
        return found[0]
    stated = [release for release in RELEASES if release.tensorrt]
    below = [r for r in stated if numbers(r.tensorrt) < numbers(version)]
    above = [r for r in stated if numbers(r.tensorrt) > numbers(version)]
    nearest = [*above[-1:], *below[:1]]
    ships = " and ".join(f"{release.name} ships {release.tensorrt}" for release in nearest)
    raise SpecError(
        f"no Triton release is known to ship TensorRT {version} ({ships}); build the engine with "
        "one of those, or name your release with --release YY.MM"
    )


def takes(release: Release, row: Row | None) -> bool | None:
    """True where a release's onnxruntime takes a row's graphs; None where it is not known."""
    if row is None or release.onnxruntime is None:
        return None
    return row[Client.ONNXRUNTIME].takes(release.onnxruntime)


def same_tensorrt(one: str | None, other: str | None) -> bool:
    """Compare two versions as far as a plan's loadability goes: major, minor and patch."""
    return bool(one and other) and numbers(one)[:3] == numbers(other)[:3]
