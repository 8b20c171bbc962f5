"""An ONNX file as a command takes it: the graph, its manifest, and what both say of the model."""

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from msn_export import manifest as manifests
from msn_export.check.sample import affordable_batch
from msn_export.errors import GraphError, SpecError
from msn_export.graph import io
from msn_export.graph.lower import raise_opset
from msn_export.graph.precision import graph_dtype
from msn_export.graph.simplify import simplify
from msn_export.graph.size import fix_image_size
from msn_export.manifest import Manifest
from msn_export.preprocessing import Exif, Preprocessing, preset
from msn_export.processor_config import choose
from msn_export.spec import BatchRange, Dtype, ImageSize, InputKind

DYNAMIC = BatchRange()  # what a foreign graph with a dynamic batch is taken for


@dataclass(frozen=True, slots=True)
class Source:
    """A graph that was read and understood; ``manifest`` is None where another tool wrote it."""

    path: Path
    model: ir.Model
    manifest: Manifest | None
    stem: InputKind
    dtype: Dtype
    size: ImageSize
    preprocessing: Preprocessing
    batch: BatchRange
    notes: tuple[str, ...]

    @property
    def fixed(self) -> int | None:
        """The one batch size the graph takes, or None where the batch is dynamic."""
        shape = self.model.graph.inputs[0].shape
        return shape[0] if shape is not None and isinstance(shape[0], int) else None


def read_source(path: Path, preprocess: str | None = None, exif: Exif | None = None) -> Source:
    """Read an ONNX file; one that another tool wrote is accepted if it is a ViT we understand.

    Args:
        path: of the file.
        preprocess: a preset or JSON file, instead of what the manifest says.
        exif: instead of what the manifest says.

    Raises:
        GraphError: it is not; the message says what it would have to be.
        ManifestError: it is not the file its manifest describes.
        SpecError: ``preprocess`` is unknown, or not what is inside the graph.
    """
    model = io.load(path)
    manifest = manifests.read(path)
    _require_plain_operators(model, path)
    fixed = fix_image_size(model) if manifest is None else None
    stem, size, channels, batch = image_input(model, path)
    notes: tuple[str, ...] = ()
    if manifest is None:
        ClearMetadataAndDocStringPass()(model)
        model, done = _tidied(model, path)
        notes = _told(path, fixed, done)
    else:
        batch = batch or next(iter(manifest.profiles), None)
    known = manifest.preprocessing if manifest is not None else None
    made = choose(
        known, size, channels, preprocess=preprocess, exif=exif, inside=stem is InputKind.UINT8
    )
    return Source(
        path=path,
        model=model,
        manifest=manifest,
        stem=stem,
        dtype=manifest.dtype if manifest is not None else graph_dtype(model),
        size=size,
        preprocessing=made,
        batch=batch or DYNAMIC,
        notes=(*notes, *filter(None, [made.assumption])),
    )


def _told(path: Path, fixed: ImageSize | None, done: str) -> tuple[str, ...]:
    notes = (f"{path.name} has no manifest; {done}",)
    if fixed is None:
        return notes
    return (*notes, f"its image size was dynamic, and is {fixed} as its position embedding has it")


def _tidied(model: ir.Model, path: Path) -> tuple[ir.Model, str]:
    """Simplify a graph of another tool; a quantised one would lose its Q/DQ on constants."""
    try:
        if graph_dtype(model).is_quantised:
            return raise_opset(model), "left as it was quantised"
    except GraphError as error:
        raise GraphError(f"{path}: {error}") from error
    outcome = simplify(raise_opset(model))
    return outcome.model, f"simplification {outcome.reason}"


def _require_plain_operators(model: ir.Model, path: Path) -> None:
    for node in model.graph:
        if node.domain not in {"", "ai.onnx"}:
            hint = (
                "it was optimised by onnxruntime; export it again without"
                if node.domain == "com.microsoft"
                else "no TensorRT parser reads it; export it again from the checkpoint"
            )
            raise GraphError(
                f"{path}: node {node.name or node.outputs[0].name!r} is "
                f"{node.domain}.{node.op_type}: {hint}"
            )


def image_input(model: ir.Model, path: Path) -> tuple[InputKind, ImageSize, int, BatchRange | None]:
    """Find the image input; None as batch range means dynamic."""
    weights = model.graph.initializers
    inputs = [value for value in model.graph.inputs if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs) or "none"
        raise GraphError(f"{path} takes {names}; expected one image input")
    value = inputs[0]
    shape = list(value.shape) if value.shape is not None else []
    described = f"{path}: input {value.name!r} is {value.dtype}{value.shape or ''}"
    stems = {ir.DataType.FLOAT: InputKind.FLOAT, ir.DataType.UINT8: InputKind.UINT8}
    stem = stems.get(value.dtype) if value.dtype is not None else None
    if stem is None or len(shape) != 4:
        raise GraphError(f"{described}; expected float32 [b, c, h, w] or uint8 [b, h, w, c] images")
    channels, height, width = shape[1:] if stem is InputKind.FLOAT else (shape[3], *shape[1:3])
    if not (isinstance(channels, int) and isinstance(height, int) and isinstance(width, int)):
        raise GraphError(
            f"{described}; height, width and channels must be fixed, batch alone may be dynamic; "
            "export it again for one image size"
        )
    batch = shape[0]
    try:
        preset("hf", ImageSize(height, width), channels)
        fixed = BatchRange(batch, batch, batch) if isinstance(batch, int) else None
    except SpecError as error:
        raise GraphError(f"{described}; {error}") from error
    return stem, ImageSize(height, width), channels, fixed


def room_of(model: ir.Model) -> int:
    """Estimate the batch that memory affords, from any attention core's shape or the patches."""
    for node in model.graph:
        shape = node.inputs[0].shape if node.inputs and node.inputs[0] is not None else None
        if node.op_type not in {"Attention", "Softmax"} or shape is None:
            continue
        sizes = [size if isinstance(size, int) else 0 for size in shape]
        if len(sizes) == 3 and "q_num_heads" in node.attributes:  # [b, n, h * d]
            heads, tokens, dim = node.attributes["q_num_heads"].as_int(), sizes[1], sizes[2]
        elif len(sizes) == 4:  # [b, h, n, d], or scores [b, h, n, n], which hide the head size
            heads, tokens = sizes[1:3]
            dim = heads * (sizes[3] if node.op_type == "Attention" else 64)
        else:
            continue
        if heads and tokens:
            return affordable_batch(tokens, dim, 4 * dim, heads)
    return _room_of_patches(model)


def _room_of_patches(model: ir.Model) -> int:
    """Estimate it where attention has no known shape: from the patch convolution [b, dim, r, c]."""
    for node in model.graph:
        shape = node.outputs[0].shape if node.op_type == "Conv" else None
        sizes = [size for size in shape or () if isinstance(size, int)][-3:]
        if len(sizes) == 3:
            dim, tokens = sizes[0], sizes[1] * sizes[2] + 1
            return affordable_batch(tokens, dim, 4 * dim, max(1, dim // 64))
    return 1
