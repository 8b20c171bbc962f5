"""Read a file as Triton would serve it: an ONNX graph from itself, an engine from its manifest."""

from pathlib import Path

import onnx_ir as ir

from msn_export import manifest as manifests
from msn_export.engine_header import read_header
from msn_export.errors import GraphError, ManifestError
from msn_export.graph import io
from msn_export.graph.facts import tensor_specs
from msn_export.graph.size import fix_image_size
from msn_export.triton.artifact import Artifact, Platform


def read_artifact(path: Path, platform: Platform | None = None) -> Artifact:
    """Read an artifact; one whose manifest describes another file is refused.

    Args:
        path: the file.
        platform: what it is to be; None goes by the file's ending.

    Raises:
        GraphError: it is no ONNX file, or its weights lie outside its folder.
        EngineFileError: it is no engine, or damaged.
        ManifestError: its manifest is malformed, or describes another file.
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
        return Artifact(path, platform, (), (), built_with=(header.backend, header.version))
    engine = manifest.engine
    if engine is None or engine.backend != header.backend:
        raise ManifestError(
            f"{path} is an engine of {header.backend} {header.version} and its manifest describes "
            f"{'a graph' if engine is None else engine.backend}; build the engine again"
        )
    return Artifact(
        path,
        platform,
        manifest.inputs,
        manifest.outputs,
        manifest.profiles,
        manifest,
        built_with=(engine.backend, engine.version),
    )


def _read_onnx(path: Path, manifest: manifests.Manifest | None) -> Artifact:
    model = io.load(path)
    size = None if manifest is not None else fix_image_size(model)
    weights = model.graph.initializers
    inputs = [value for value in model.graph.inputs if value.name not in weights]
    return Artifact(
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
