"""An artifact as Triton serves it: which backend, which tensors, which batches."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import onnx_ir as ir

from msn_export import manifest as manifests
from msn_export.engine_header import read_header
from msn_export.errors import GraphError, ManifestError
from msn_export.graph import io
from msn_export.graph.simplify import fix_image_size
from msn_export.graph.summary import tensor_specs
from msn_export.manifest import Manifest
from msn_export.preprocessing import Preprocessing
from msn_export.spec import BatchRange, ImageSize, InputFormat, Targets, TensorSpec

LOGITS = "logits"


class Platform(StrEnum):
    """Triton's word for a kind of model; its backend and its file's name follow from it."""

    ONNX = "onnxruntime_onnx"
    PLAN = "tensorrt_plan"

    @property
    def backend(self) -> str:
        """The name of the backend that serves it."""
        return "onnxruntime" if self is Platform.ONNX else "tensorrt"

    @property
    def filename(self) -> str:
        """What the backend opens in a version's folder unless the config names another file."""
        return "model.onnx" if self is Platform.ONNX else "model.plan"


@dataclass(frozen=True, slots=True)
class ServedArtifact:
    """What a file is served as; ``inputs`` and ``outputs`` are empty where it does not tell.

    ``built_with`` names the TensorRT of an engine as (flavour, version), ``weights`` the files
    beside an ONNX file that hold its weights. ``notes`` say what had to be decided.
    """

    path: Path
    platform: Platform
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[BatchRange, ...] = ()
    manifest: Manifest | None = None
    weights: tuple[Path, ...] = ()
    opset: int | None = None
    built_with: tuple[str, str] | None = None
    notes: tuple[str, ...] = ()

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
        """The GPU generations an engine was built for, where its manifest tells."""
        engine = self.manifest.engine if self.manifest else None
        return engine.targets if engine else Targets()

    @property
    def version_compatible(self) -> bool:
        """Whether an engine carries the lean runtime that later TensorRTs load it with."""
        engine = self.manifest.engine if self.manifest else None
        return bool(engine and engine.options.get("version_compatible"))

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes' names, in the order of the logits."""
        return self.manifest.labels if self.manifest else ()

    @property
    def preprocessing(self) -> Preprocessing | None:
        """What its input was prepared with, where its manifest tells."""
        return self.manifest.preprocessing if self.manifest else None

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
        """Find the smallest batch of 1 to ``limit`` that no profile takes."""
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

    Args:
        path: the file.
        platform: what it is to be; None goes by the file's ending.
    """
    if platform is None:
        platform = Platform.ONNX if path.suffix == ".onnx" else Platform.PLAN
    size = path.stat().st_size if path.is_file() else 0
    if platform is Platform.ONNX and size > io.PROTOBUF_LIMIT:
        raise GraphError(f"{path} is {size / 2**30:.0f} GiB; no ONNX file holds 2 or more")
    manifest = manifests.read(path) if size else None
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


def _read_onnx(path: Path, manifest: manifests.Manifest | None) -> ServedArtifact:
    model = io.load(path)
    size = None if manifest is not None else fix_image_size(model)
    weights = model.graph.initializers
    inputs = [value for value in model.graph.inputs if value.name not in weights]
    return ServedArtifact(
        path,
        Platform.ONNX,
        tensor_specs(inputs),
        tensor_specs(list(model.graph.outputs)),
        manifest.profiles if manifest else (),
        manifest,
        () if manifest else _weight_files(path),  # our own graphs have no weights beside them
        model.graph.opset_imports.get("", 0),
        notes=()
        if size is None
        else (
            f"{path.name}: its image size was dynamic, and is {size} as its position embedding has "
            "it",
        ),
    )


def _weight_files(path: Path) -> tuple[Path, ...]:
    """List the files with a graph's weights, which ``io.load`` has found beside it."""
    values = ir.load(path).graph.initializers.values()
    tensors = [value.const_value for value in values]
    places = {t.location: None for t in tensors if isinstance(t, ir.ExternalTensor)}
    return tuple(path.parent / str(place) for place in places)
