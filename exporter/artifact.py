"""Artifacts as commands take them: opened, verified and read once.

Nothing is loaded here before a graph is asked for: what runs an artifact needs neither onnx nor
torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from msn_export import manifest as manifests
from msn_export.errors import (
    EngineFileError,
    GraphError,
    ManifestError,
    MsnExportError,
    SpecError,
    ToleranceError,
)
from msn_export.host import require_memory
from msn_export.input_files import ENGINE, artifact_kind, require_regular
from msn_export.manifest import Described, Manifest, require_input, sha256_of
from msn_export.metrics.evaluate import (
    ALONE,
    OutputsOf,
    Sample,
    compare_alone,
    max_batch_in_memory,
)
from msn_export.metrics.tolerances import GATES
from msn_export.onnx_header import UNSEALED, GraphMetadata
from msn_export.preprocessing import Exif, Preprocessing, preset
from msn_export.processor_config import choose
from msn_export.runtime.batches import combine
from msn_export.spec import ENGINES, BatchRange, Dtype, ImageSize, InputFormat

if TYPE_CHECKING:
    import onnx_ir as ir

    from msn_export.graph.blocks import Stream
    from msn_export.graph.summary import GraphSummary, Structure

DYNAMIC = BatchRange()  # what a foreign graph with a dynamic batch is taken for


class ImageInput(NamedTuple):
    """The one input of a model; ``batch`` None is a dynamic one."""

    format: InputFormat
    size: ImageSize
    channels: int
    batch: BatchRange | None


class Artifact(Described):
    """An ONNX file, an engine or a checkpoint. Each fact is read where it is first asked for.

    ``manifest`` is None where there is none, and where ``distrusted`` says why the one there is not
    believed. ``preprocessing`` is None where nothing says it. ``graph`` is for reading: whoever
    changes it clones it first. ``module`` is a checkpoint's, ``marked`` an engine's that was built
    once more with its stages as outputs.
    """

    kind: Literal["checkpoint", "onnx", "engine"]
    module: Any = None
    marked: Artifact | None = None
    distrusted: str | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path)
        self.kind = "onnx" if path.suffix == ".onnx" else "engine"

    @classmethod
    def open(cls, path: Path, *, is_graph: bool = False) -> Self:
        """Open a file, by its ending or as a graph; its manifest, if any, must describe it."""
        opened = cls(path)
        if is_graph:
            opened.kind = "onnx"
        if opened.kind == "onnx":
            _ = opened.written  # first: of what is no graph no manifest is asked
        else:
            require_regular(path, ENGINE)
        _ = opened.manifest
        return opened

    @classmethod
    def examine(cls, path: Path) -> Self:
        """Open a file whatever its manifest says; believe only one that describes this file."""
        opened = cls(path)
        require_regular(path, artifact_kind(path))
        try:
            _ = opened.manifest
        except ManifestError as error:
            opened.manifest, opened.distrusted = None, str(error)
        return opened

    def release(self) -> None:
        """Give the graph's memory back; whoever asks for it again has it read again."""
        for name in ("written", "_understood", "graph", "_stream"):
            self.__dict__.pop(name, None)

    @cached_property
    def manifest(self) -> Manifest | None:  # type: ignore[override]
        return manifests.read(self.path)

    @cached_property
    def metadata(self) -> GraphMetadata | None:  # type: ignore[override]
        """The part of a manifest that a graph's own file holds, where there is no other."""
        if self.manifest is not None or self.kind != "onnx":
            return None
        return GraphMetadata.of(self.path)

    @cached_property
    def sha256(self) -> str:
        return self.manifest.sha256 if self.manifest is not None else sha256_of(self.path)

    @cached_property
    def written(self) -> ir.Model:
        """The graph as it is in the file."""
        from msn_export.graph import io

        return io.load(self.path)

    @cached_property
    def summary(self) -> GraphSummary:
        from msn_export.graph.summary import GraphSummary

        with named(self.path):
            return GraphSummary.of(self.written)

    @cached_property
    def _understood(self) -> tuple[ir.Model, tuple[str, ...]]:
        """The graph, of another tool with its image size and shapes written out; notes on that."""
        from msn_export.graph.opset import understand

        _ = (
            self.summary,
            self.weight_bytes,
        )  # of the file, before anything is written into its graph
        require_input(self.manifest, self.summary.inputs, str(self.path))
        with named(self.path):
            return self.written, understand(self.written) if self.manifest is None else ()

    @cached_property
    def weight_bytes(self) -> int:
        tensors = [weight.const_value for weight in self.written.graph.initializers.values()]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @cached_property
    def graph(self) -> ir.Model | None:
        """Give types and shapes to every value; another tool's graph is in opset 23 if it can be.

        None of an engine and of a checkpoint.
        """
        if self.kind != "onnx":
            return None
        from msn_export.graph import io
        from msn_export.graph.opset import raised_where_possible

        model, _ = self._understood
        with named(self.path):
            if self.manifest is None:
                return raised_where_possible(model)
            io.infer_shapes(model)
        return model

    @cached_property
    def _stream(self) -> Stream | GraphError:
        from msn_export.graph.blocks import find_stream

        if self.graph is None:
            return GraphError(
                f"{self.name}: an engine shows no tensors on its way; compare the graph it was "
                "built from"
            )
        with named(self.path):
            try:
                return find_stream(self.graph)
            except GraphError as error:
                return error

    @property
    def stream(self) -> Stream:
        """The graph's residual stream; a GraphError where there is none."""
        if isinstance(self._stream, GraphError):
            raise self._stream
        return self._stream

    @cached_property
    def structure(self) -> Structure:
        """Constants and order as the graph states them; empty where no stream is found."""
        if self.graph is None or isinstance(self._stream, GraphError):
            return {}
        from msn_export.graph.summary import structure_of

        with named(self.path):
            return structure_of(self.graph, self._stream)

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Decisions taken for a graph, and the reason why something could not be read."""
        if self.kind != "onnx":
            return ()
        found = [*([UNSEALED] if self.metadata is not None else []), *self._understood[1]]
        if isinstance(self._stream, GraphError):
            what = "its epsilons, activations and additions were not compared"
            found.append(f"{what}: {self._stream}")
        elif self.graph is not None:
            from msn_export.graph.summary import unread

            found += unread(self.graph, self._stream)
        return tuple(f"{self.path.name}: {note}" for note in found)

    @cached_property
    def image_input(self) -> ImageInput:
        if self.kind == "onnx":
            with named(self.path):
                found = _image_input(self._understood[0], self.path)
            if found.batch is not None:
                sides = (found.channels, found.size.height, found.size.width)
                item = 1 if found.format is InputFormat.UINT8 else 4
                require_memory(str(self.path), found.batch.min, sides, item)
            return found
        if self.manifest is None or self.manifest.preprocessing is None:
            raise EngineFileError(
                f"{self.path} has no manifest beside it that says what it takes; compare the graph "
                "it was built from, or build it with msn-export trt"
            )
        preprocessing, input_format = (
            self.manifest.preprocessing,
            InputFormat.of(self.manifest.inputs[0].dtype),
        )
        return ImageInput(
            input_format,
            preprocessing.size,
            preprocessing.channels,
            combine(self.manifest.profiles),
        )

    @property
    def input_format(self) -> InputFormat:
        return self.image_input.format

    @property
    def size(self) -> ImageSize:
        return self.image_input.size

    @property
    def channels(self) -> int:
        return self.image_input.channels

    @property
    def batch(self) -> BatchRange:
        """The batches it takes: its own where that is fixed, else its manifest's first."""
        profiles = self.manifest.profiles if self.manifest is not None else ()
        return self.image_input.batch or next(iter(profiles), DYNAMIC)

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size it takes, if there is only one."""
        return self.batch.max if self.batch.is_static else None

    @cached_property
    def max_batch(self) -> int:
        found = _max_batch_of_config(self.manifest)
        return found or (self.batch.max if self.graph is None else max_batch_of(self.graph))

    @cached_property
    def dtype(self) -> Dtype:
        """Its type; of an engine the one whose gate its figures must reach.

        A manifest may say no other type of a graph than the graph's own values have: its checks
        would allow the errors of another precision.
        """
        if self.kind != "onnx" and self.manifest is not None:
            return self.manifest.rounds_as
        from msn_export.graph.precision import graph_dtype, is_typed

        assert self.graph is not None  # no engine is compared without a manifest
        manifest = self.manifest
        with named(self.path):
            found = graph_dtype(self.graph)
            if manifest is None or manifest.dtype is found:
                return found
            if found is Dtype.FP32 and is_typed(self.graph, manifest.dtype, manifest.islands):
                return manifest.dtype
        raise ManifestError(
            f"{manifests.manifest_path(self.path)} says {manifest.dtype}, and {self.path} computes "
            f"in {found}; export it again"
        )

    @cached_property
    def preprocessing(self) -> Preprocessing | None:
        if self.metadata is not None:
            self.metadata.require_fit(self.size, self.channels, self.name)
        return self.stated.preprocessing if self.stated is not None else None

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        manifest = self.manifest if self.kind == "engine" else None
        return tuple(spec.name for spec in (manifest or self.summary).outputs)

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return super().labels

    def require_comparable(self) -> None:
        """Refuse outputs that no check can judge: of integers, of one axis, and without numbers."""
        for spec in self.written.graph.outputs:
            if 0 in (spec.shape or ()):
                raise GraphError(
                    f"output {spec.name!r} has the shape {spec.shape}, which holds no numbers to "
                    "compare; export it again with every size above 0"
                )
            axes = None if spec.shape is None else len(spec.shape)
            if (spec.dtype is None or spec.dtype.name in _FLOATS) and (axes is None or axes > 1):
                continue
            dtype = "untyped" if spec.dtype is None else spec.dtype.name.lower()
            raise GraphError(
                f"output {spec.name!r} is {dtype}{spec.shape or ''}; a check compares floats of "
                "two axes or more, such as [b, classes] or [b, n, dim]; export the scores before "
                "argmax or squeeze"
            )


class GraphFile(Artifact):
    """An ONNX file to rewrite: ``graph`` is the command's own, another tool's is simplified.

    ``preprocessing`` is settled, ``opset`` is the file's: another tool's graph was raised to 23.
    """

    graph: ir.Model
    preprocessing: Preprocessing
    opset: int

    @classmethod
    def read(cls, path: Path, preprocess: str | None = None, exif: Exif | None = None) -> Self:
        """Open a file; one that another tool wrote is accepted if it is a ViT we understand.

        Args:
            path: of the file.
            preprocess: a preset or JSON file, instead of what the manifest says.
            exif: instead of what the manifest says.
        """
        from msn_export.graph.opset import require_plain_operators, tidy

        opened = cls.open(path, is_graph=True)
        model, found = opened._understood
        with named(path):
            require_plain_operators(model)
            taken = opened.image_input
            opened.require_comparable()
            notes: tuple[str, ...] = ()
            if opened.manifest is None:
                model, done = tidy(model)
                unsealed = [f"{path.name}: {UNSEALED}"] if opened.metadata is not None else []
                notes = (f"{path.name} has no manifest; {done}", *unsealed, *found)
        opened.graph, opened.opset = model, opened.summary.opset
        _ = opened.dtype  # before the graph is typed
        inside = taken.format is InputFormat.UINT8
        own = opened.preprocessing
        opened.preprocessing = choose(
            own, taken.size, taken.channels, preprocess=preprocess, exif=exif, inside=inside
        )
        opened.notes = (*notes, *opened.preprocessing.notes)
        return opened

    def require_apart(self, runner: OutputsOf, sample: Sample) -> None:
        """Require that no image's result depends on the others of its batch.

        What is made of the graph is compared with it in the same batches, which does not show it.
        Images run alone and beside others where an operator may join them. No baseline says what
        the graph's precision costs: the limits are its type's fixed numbers.

        Raises:
            ToleranceError: one does; names the first operator that may be why.
        """
        from msn_export.graph.batch import find_mixing

        joins, fixed = find_mixing(self.graph), self.fixed_batch
        sizes = (fixed,) if fixed else (self.batch.min, min(ALONE, self.batch.max))
        if not joins or max(sizes) < 2:
            return
        alone = compare_alone(runner, sample, self.input_format, sizes, self.outputs)
        for name, agreement in alone.items():
            for failure in GATES[self.dtype].failures(agreement):
                raise ToleranceError(
                    f"{self.path}: output {name!r}: an image's result depends on the batch it is "
                    f"in: {failure}; {joins} is not shown to keep images apart"
                )

    def require_golden(self, runner: OutputsOf) -> None:
        """Require the graph, opened as ``runner``, to give the golden result in its manifest.

        What is made of another graph would be judged by a wrong one, and pass. A graph without a
        golden result is taken as it is.

        Raises:
            ToleranceError: it gives another result.
        """
        if self.manifest is None or self.manifest.golden is None:
            return
        from msn_export.runtime.runner import selftest

        found = selftest(runner, runner.name, self.manifest, self.input_format)
        if not found.passed:
            raise ToleranceError(
                f"{self.path} does not give the golden result in its manifest: {found}; export it "
                "again"
            )


def is_checkpoint(name: str) -> bool:
    """Name what is no exported file's a checkpoint's."""
    return Path(name).suffix not in {".onnx", *ENGINES}


def _max_batch_of_config(manifest: Manifest | None) -> int | None:
    """Estimate the batch that memory affords from the configuration a manifest holds."""
    config = manifest.config if manifest is not None else None
    if config is None:
        return None
    try:
        sides = zip(config["image_size"], config["patch_size"], strict=True)
        rows, columns = (int(side) // int(patch) for side, patch in sides)
        sizes = [int(config[name]) for name in ("dim", "mlp_dim", "heads")]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None  # of another version, or changed: only an estimate is lost
    return max_batch_in_memory(rows * columns + 1, *sizes)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with its graph."""
    try:
        yield
    except GraphError as error:
        if str(error).startswith(str(path)):
            raise
        raise GraphError(f"{path}: {error}") from error
    except (MsnExportError, OSError, MemoryError):
        raise
    except Exception as error:  # onnx-ir raises what it likes for attributes of another type
        raise GraphError(
            f"{path} is not a valid graph ({type(error).__name__}: {error}); see what "
            "onnx.checker says of it, and export it again"
        ) from error


_FLOATS = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})
_FORMATS = {
    "FLOAT": InputFormat.FLOAT, "FLOAT16": InputFormat.HALF, "UINT8": InputFormat.UINT8,
}  # fmt: skip


def _image_input(model: ir.Model, path: Path) -> ImageInput:
    weights = model.graph.initializers
    inputs = [value for value in model.graph.inputs if value.name not in weights]
    if len(inputs) != 1:
        names = ", ".join(repr(value.name) for value in inputs) or "none"
        raise GraphError(f"{path} takes {names}; expected one image input")
    value = inputs[0]
    shape = list(value.shape) if value.shape is not None else []
    described = f"{path}: input {value.name!r} is {value.dtype}{value.shape or ''}"
    input_format = _FORMATS.get(value.dtype.name) if value.dtype is not None else None
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
    return ImageInput(input_format, ImageSize(height, width), channels, fixed)


def _require_layout(shape: list[Any], input_format: InputFormat, described: str) -> None:
    """Refuse the other layout where the sizes leave no doubt."""
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
    return _max_batch_of_patches(model)


def _max_batch_of_patches(model: ir.Model) -> int:
    """Estimate it where attention has no known shape: from the patch convolution [b, dim, r, c]."""
    for node in model.graph:
        shape = node.outputs[0].shape if node.op_type == "Conv" else None
        sizes = [size for size in shape or () if isinstance(size, int)][-3:]
        if len(sizes) == 3:
            dim, tokens = sizes[0], sizes[1] * sizes[2] + 1
            return max_batch_in_memory(tokens, dim, 4 * dim, max(1, dim // 64))
    return 8  # no transformer: what a reference is run in where memory is no matter
