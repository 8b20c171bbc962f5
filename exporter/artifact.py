"""An ONNX file as a command takes it: the graph, its manifest, and what both say of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from msn_export import images
from msn_export import manifest as manifests
from msn_export.errors import GraphError, SpecError
from msn_export.graph import io
from msn_export.graph.opset import require_plain_operators, tidy, understand
from msn_export.graph.precision import graph_dtype
from msn_export.manifest import Manifest
from msn_export.metrics.evaluate import max_batch_in_memory
from msn_export.preprocessing import Exif, Preprocessing, preset
from msn_export.processor_config import choose
from msn_export.spec import BatchRange, Dtype, ImageSize, InputFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from msn_export.manifest import Manifest
    from msn_export.preprocessing import Exif, Preprocessing
    from msn_export.spec import TensorSpec


DYNAMIC = BatchRange()  # what a foreign graph with a dynamic batch is taken for


@dataclass(frozen=True, slots=True)
class GraphFile:
    """A graph that was read and understood; ``manifest`` is None where another tool wrote it.

    ``opset`` is the file's; the graph of another tool was raised to 23.
    """

    path: Path
    model: ir.Model
    manifest: Manifest | None
    input_format: InputFormat
    dtype: Dtype
    size: ImageSize
    preprocessing: Preprocessing
    batch: BatchRange
    notes: tuple[str, ...]
    opset: int

    @property
    def fixed(self) -> int | None:
        """The one batch size the graph takes, or None where the batch is dynamic."""
        shape = self.model.graph.inputs[0].shape
        return shape[0] if shape is not None and isinstance(shape[0], int) else None


def read_source(path: Path, preprocess: str | None = None, exif: Exif | None = None) -> GraphFile:
    """Read an ONNX file; one that another tool wrote is accepted if it is a ViT we understand.

    Args:
        path: of the file.
        preprocess: a preset or JSON file, instead of what the manifest says.
        exif: instead of what the manifest says.
    """
    model, manifest, told = read_graph(path)
    with named(path):
        require_plain_operators(model)
        input_format, size, channels, batch = image_input(model, path)
        require_comparable(model)
        notes: tuple[str, ...] = ()
        opset = model.graph.opset_imports[""]
        if manifest is None:
            model, done = tidy(model)
            notes = (f"{path.name} has no manifest; {done}", *told)
        else:
            batch = batch or next(iter(manifest.profiles), None)
        dtype = manifest.dtype if manifest is not None else graph_dtype(model)
    known = manifest.preprocessing if manifest is not None else None
    made = choose(
        known,
        size,
        channels,
        preprocess=preprocess,
        exif=exif,
        inside=input_format is InputFormat.UINT8,
    )
    return GraphFile(
        path=path,
        model=model,
        manifest=manifest,
        input_format=input_format,
        dtype=dtype,
        size=size,
        preprocessing=made,
        batch=batch or DYNAMIC,
        notes=(*notes, *made.notes),
        opset=opset,
    )


def read_graph(path: Path) -> tuple[ir.Model, Manifest | None, tuple[str, ...]]:
    """Read an ONNX file as every command does.

    Returns:
        The graph, of another tool with its image size and shapes written out; its manifest; notes
        on what was decided for a graph of another tool.
    """
    model = io.load(path)
    manifest = manifests.read(path)
    with named(path):
        return model, manifest, understand(model) if manifest is None else ()


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with its graph."""
    try:
        yield
    except GraphError as error:
        if str(error).startswith(str(path)):
            raise
        raise GraphError(f"{path}: {error}") from error


_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def require_comparable(model: ir.Model) -> None:
    """Refuse outputs that no check can judge: those of integers, and of one axis."""
    for value in model.graph.outputs:
        axes = None if value.shape is None else len(value.shape)
        if (value.dtype in _FLOATS or value.dtype is None) and (axes is None or axes > 1):
            continue
        dtype = "untyped" if value.dtype is None else value.dtype.name.lower()
        raise GraphError(
            f"output {value.name!r} is {dtype}{value.shape or ''}; a check compares floats of two "
            "axes or more, such as [b, classes] or [b, n, dim]; export the scores before argmax "
            "or squeeze"
        )


def image_input(
    model: ir.Model, path: Path
) -> tuple[InputFormat, ImageSize, int, BatchRange | None]:
    """Find the image input; None as batch range means dynamic."""
    weights = model.graph.initializers
    inputs = [value for value in model.graph.inputs if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs) or "none"
        raise GraphError(f"{path} takes {names}; expected one image input")
    value = inputs[0]
    shape = list(value.shape) if value.shape is not None else []
    described = f"{path}: input {value.name!r} is {value.dtype}{value.shape or ''}"
    input_format = _STEMS.get(value.dtype) if value.dtype is not None else None
    if input_format is None or len(shape) != 4:
        raise GraphError(
            f"{described}; expected float32 or float16 [b, c, h, w] or uint8 [b, h, w, c] images"
        )
    _require_layout(shape, input_format, described)
    channels, height, width = (
        (shape[3], *shape[1:3]) if input_format is InputFormat.UINT8 else shape[1:]
    )
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
    return input_format, ImageSize(height, width), channels, fixed


_STEMS = {
    ir.DataType.FLOAT: InputFormat.FLOAT,
    ir.DataType.FLOAT16: InputFormat.HALF,
    ir.DataType.UINT8: InputFormat.UINT8,
}


def _require_layout(shape: list[Any], input_format: InputFormat, described: str) -> None:
    """Tell planes from interleaved channels where the sizes leave no doubt."""
    counts = {1, 3, 4}
    first, last = shape[1] in counts, shape[3] in counts
    if first is last:
        return
    if input_format is InputFormat.UINT8 and first:
        raise GraphError(
            f"{described}, which is uint8 [b, c, h, w]; uint8 images are taken as [b, h, w, c]: "
            "export it again with the Transpose inside, or with a float32 [b, c, h, w] input"
        )
    if input_format is not InputFormat.UINT8 and last:
        raise GraphError(
            f"{described}, which is float [b, h, w, c]; float images are taken as [b, c, h, w]: "
            "export it again for that layout, or with a uint8 [b, h, w, c] input"
        )


def max_batch_of(model: ir.Model) -> int:
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
            return max_batch_in_memory(tokens, dim, 4 * dim, heads)
    return _room_of_patches(model)


def _room_of_patches(model: ir.Model) -> int:
    """Estimate it where attention has no known shape: from the patch convolution [b, dim, r, c]."""
    for node in model.graph:
        shape = node.outputs[0].shape if node.op_type == "Conv" else None
        sizes = [size for size in shape or () if isinstance(size, int)][-3:]
        if len(sizes) == 3:
            dim, tokens = sizes[0], sizes[1] * sizes[2] + 1
            return max_batch_in_memory(tokens, dim, 4 * dim, max(1, dim // 64))
    return 1


_DTYPES = {"float": np.float32, "float16": np.float16, "uint8": np.uint8}  # as ONNX spells them


@dataclass(frozen=True, slots=True)
class Feed:
    """How an artifact is fed; ``fixed`` is a size that the artifact itself leaves open."""

    kind: InputFormat
    dtype: str
    preprocessing: Preprocessing
    fixed: ImageSize | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What users must know of it."""
        size = f"its image size was dynamic, and is {self.fixed} as its position embedding has it"
        return (*self.preprocessing.notes, *([] if self.fixed is None else [size]))

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Turn decoded pictures [b, h, w, c] into the artifact's input."""
        if self.kind is InputFormat.UINT8:
            return pixels
        return images.normalize(pixels, self.preprocessing).astype(_DTYPES[self.dtype], copy=False)


def feed_of(
    name: str,
    inputs: Sequence[TensorSpec],
    manifest: Manifest | None,
    *,
    preprocess: str | None = None,
    exif: Exif | None = None,
    size: ImageSize | Path | None = None,
) -> Feed:
    """Find out how an artifact is fed.

    Args:
        name: of the artifact, for messages.
        inputs: what its runner says it takes.
        manifest: where its preprocessing stands; without one, ``hf`` is assumed and noted.
        preprocess: a preset or JSON file that is to be used instead.
        exif: instead of what the manifest says.
        size: of a graph that leaves height and width open, or its file: its position embedding
            may tell.
    """
    if len(inputs) != 1:
        names = ", ".join(repr(spec.name) for spec in inputs) or "nothing"
        raise GraphError(f"{name} takes {names}; expected one image input")
    spec = inputs[0]
    described = f"{name}: input {spec.name!r} is {spec.dtype}{list(spec.shape)}"
    if spec.dtype not in _DTYPES or len(spec.shape) != 4:
        raise GraphError(f"{described}; expected float [b, c, h, w] or uint8 [b, h, w, c] images")
    kind = InputFormat.UINT8 if spec.dtype == "uint8" else InputFormat.FLOAT
    _, *rest = spec.shape
    channels, *sides = (rest[2], *rest[:2]) if kind is InputFormat.UINT8 else rest
    known = manifest.preprocessing if manifest is not None else None
    given = size if isinstance(size, ImageSize) else known.size if known else None
    fixed = None
    if given is None and isinstance(size, Path) and not _are_fixed(sides):
        given = fixed = _size_in(size)
    found = _size(described, sides, given)
    count = channels if isinstance(channels, int) else 3
    inside = kind is InputFormat.UINT8
    made = choose(known, found, count, preprocess=preprocess, exif=exif, inside=inside)
    return Feed(kind, spec.dtype, made, fixed)


def _size_in(file: Path) -> ImageSize | None:
    """Read the image size off a graph's position embedding, where onnx is installed."""
    if file.suffix != ".onnx":
        return None
    try:
        from msn_export.graph import io
        from msn_export.graph.simplify import fix_image_size
    except ImportError:
        return None
    return fix_image_size(io.load(file))


def _are_fixed(sides: Sequence[int | str]) -> bool:
    return all(isinstance(side, int) for side in sides)


def _size(described: str, sides: Sequence[int | str], given: ImageSize | None) -> ImageSize:
    height, width = sides
    if isinstance(height, int) and isinstance(width, int):
        fixed = ImageSize(height, width)
        if given is not None and given != fixed:
            raise SpecError(f"{described}; images of {given} do not fit")
        return fixed
    if given is None:
        raise SpecError(f"{described}; it leaves height and width open, --image-size says them")
    return given
