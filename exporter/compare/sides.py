"""A reference and a candidate: a checkpoint, an ONNX file or an engine, described alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import onnx_ir as ir

from msn_export import manifest as manifests
from msn_export.artifact import (
    DYNAMIC,
    image_input,
    max_batch_of,
    named,
    read_graph,
    require_comparable,
)
from msn_export.errors import EngineFileError, GraphError, RunnerError, SpecError, ToleranceError
from msn_export.graph import io
from msn_export.graph.opset import raised_where_possible
from msn_export.graph.precision import graph_dtype
from msn_export.graph.summary import Structure, structure_of, structure_of_module
from msn_export.host import NoDriver, find_driver
from msn_export.metrics.evaluate import OutputsOf, max_batch_in_memory
from msn_export.mixed_precision import cpu_runner
from msn_export.models.checkpoint import AS_IT_SAYS, Choices
from msn_export.preprocessing import Exif, Preprocessing, assumed
from msn_export.processor_config import choose, from_processor_config, size_in
from msn_export.runtime import opening
from msn_export.runtime.opening import verify_engine_file
from msn_export.runtime.runner import combine
from msn_export.spec import BatchRange, Dtype, ImageSize, InputFormat

if TYPE_CHECKING:
    from msn_export.graph.torch_reference import TorchRunner
    from msn_export.manifest import Manifest
    from msn_export.models.checkpoint import Checkpoint


ENGINES = frozenset({".engine", ".plan", ".trt"})


class OpenSide(OutputsOf, Protocol):
    """A runner that holds something until it is closed."""

    def close(self) -> None:
        """Free it."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """What is known of an artifact before it runs.

    ``preprocessing`` is None where the artifact does not say. ``start`` opens it for some of its
    outputs, with a folder for what it has to write; ``exact``, where it is not None, opens the same
    function in fp64. ``graph`` is None for an engine, ``module`` for all but a checkpoint, and
    ``marked`` for all but an engine that was built once more with its stages as outputs.
    """

    name: str
    kind: Literal["checkpoint", "onnx", "engine"]
    dtype: Dtype
    input_format: InputFormat
    size: ImageSize
    channels: int
    preprocessing: Preprocessing | None
    batch: BatchRange
    max_batch: int
    outputs: tuple[str, ...]
    start: Callable[[tuple[str, ...], Path], OpenSide]
    exact: Callable[[tuple[str, ...]], OpenSide] | None = None
    labels: tuple[str, ...] = ()
    structure: Structure = field(default_factory=dict)
    manifest: Manifest | None = None
    graph: ir.Model | None = None
    module: Any = None
    notes: tuple[str, ...] = ()
    marked: Path | None = None

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size it takes, if there is only one."""
        return self.batch.max if self.batch.is_static else None


def open_artifact(
    name: str, *, choices: Choices = AS_IT_SAYS, size: ImageSize | None = None
) -> Artifact:
    """Describe what ``name`` names: a file by its ending, else a checkpoint.

    Args:
        name: as the user gave it.
        choices: what a checkpoint does not say itself, or holds several of.
        size: the image size a checkpoint is to be read for; a file has its own.
    """
    path = Path(name)
    if path.suffix == ".onnx":
        return _of_graph(path)
    if path.suffix in ENGINES:
        return _of_engine(path)

    return checkpoint_artifact(name, choices, size)


def is_checkpoint(name: str) -> bool:
    """Tell a checkpoint from a file that was exported."""
    return Path(name).suffix not in {".onnx", *ENGINES}


def _of_graph(path: Path) -> Artifact:
    model, manifest, told = read_graph(path)
    with named(path):
        input_format, size, channels, batch = image_input(model, path)
        require_comparable(model)
        if manifest is None:
            model = raised_where_possible(model)
        io.infer_shapes(model)
        dtype = manifest.dtype if manifest is not None else graph_dtype(model)
    structure: Structure = {}
    try:
        structure = structure_of(model)
    except GraphError as error:
        told = (*told, f"its epsilons, activations and additions were not compared: {error}")

    def start(_outputs: tuple[str, ...], stage: Path) -> OpenSide:
        return cpu_runner(path, dtype, stage)

    return Artifact(
        name=str(path),
        kind="onnx",
        dtype=dtype,
        input_format=input_format,
        size=size,
        channels=channels,
        preprocessing=manifest.preprocessing if manifest is not None else None,
        batch=batch or (manifest.profiles[0] if manifest and manifest.profiles else DYNAMIC),
        max_batch=_room(manifest) or max_batch_of(model),
        outputs=tuple(value.name or "" for value in model.graph.outputs),
        start=start,
        labels=manifest.labels if manifest is not None else (),
        structure=structure,
        manifest=manifest,
        graph=model,
        notes=tuple(f"{path.name}: {note}" for note in told),
    )


def _of_engine(path: Path) -> Artifact:
    """Describe an engine by its manifest; the file itself is not deserialised here."""
    if not path.is_file():
        raise GraphError(f"{path} does not exist; give an .engine file")
    manifest = manifests.read(path)
    if manifest is None or manifest.preprocessing is None:
        raise EngineFileError(
            f"{path} has no manifest beside it that says what it takes; compare the graph it was "
            "built from, or build it with msn-export trt"
        )
    batch = combine(manifest.profiles)

    def start(_outputs: tuple[str, ...], _stage: Path) -> OpenSide:
        return open_engine(path)

    return Artifact(
        name=str(path),
        kind="engine",
        dtype=manifest.rounds_as,
        input_format=InputFormat.of(manifest.inputs[0].dtype),
        size=manifest.preprocessing.size,
        channels=manifest.preprocessing.channels,
        preprocessing=manifest.preprocessing,
        batch=batch,
        max_batch=_room(manifest) or batch.max,
        outputs=tuple(spec.name for spec in manifest.outputs),
        start=start,
        labels=manifest.labels,
        manifest=manifest,
    )


def open_engine(path: Path) -> OpenSide:
    """Open an engine for running."""
    driver = find_driver()
    if isinstance(driver, NoDriver):
        raise RunnerError(
            f"{path} cannot run here: {driver.reason}; run this command on the machine that has "
            "its GPU, or compare the graph it was built from"
        )
    return opening.open_engine(verify_engine_file(path, trust=False), eager_kernels=True)


def _room(manifest: Manifest | None) -> int | None:
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


@dataclass(frozen=True, slots=True)
class Pair:
    """Two artifacts and the outputs both have; ``alone`` names those that only one has."""

    reference: Artifact
    candidate: Artifact
    outputs: tuple[str, ...]
    notes: tuple[str, ...]
    alone: tuple[str, ...] = ()

    @property
    def preprocessing(self) -> Preprocessing:
        """What makes the pixels both sides are given: the reference's own where it says.

        Else the candidate's, else hf; ``notes`` say which was assumed.
        """
        known = self.reference.preprocessing or self.candidate.preprocessing
        return known or assumed(self.reference.size, self.reference.channels)

    @property
    def max_batch(self) -> int:
        """How many images memory affords both at once."""
        return min(self.reference.max_batch, self.candidate.max_batch)


def open_pair(reference: str, candidate: str, choices: Choices = AS_IT_SAYS) -> Pair:
    """Open both sides; a checkpoint is read for the other side's image size."""
    if choices and not any(map(is_checkpoint, (reference, candidate))):
        raise SpecError(
            "--variant, --weights and --labels are for a checkpoint, and neither side is one"
        )
    opened: dict[str, Artifact] = {}
    size = None
    for name in sorted(dict.fromkeys((reference, candidate)), key=is_checkpoint):
        opened[name] = open_artifact(name, choices=choices, size=size)
        size = size or opened[name].size
    left, right = opened[reference], opened[candidate]
    if left.size != right.size:
        raise SpecError(
            f"{left.name} takes images of {left.size} and {right.name} of {right.size}; export "
            "one of them again with the other's --image-size"
        )
    if left.channels != right.channels:
        raise SpecError(
            f"{left.name} takes {left.channels} channels and {right.name} {right.channels}; "
            "they cannot see the same images"
        )
    outputs = tuple(name for name in left.outputs if name in right.outputs)
    if not outputs:
        raise ToleranceError(
            f"nothing to compare: {left.name} has {', '.join(left.outputs)}, {right.name} has "
            f"{', '.join(right.outputs)}; export one of them again with the other's --head"
        )
    notes = [*left.notes, *right.notes, *_assumed(left, right)]
    alone = []
    for side, other in ((left, right), (right, left)):
        names = [name for name in side.outputs if name not in other.outputs]
        if names and side.kind != "checkpoint":  # every head can be read off a checkpoint
            alone.append(f"not compared, only {side.name} has it: {', '.join(names)}")
    return Pair(left, right, outputs, tuple(dict.fromkeys(notes)), tuple(alone))


def _assumed(left: Artifact, right: Artifact) -> tuple[str, ...]:
    if left.preprocessing is None and right.preprocessing is None:
        return ()  # whoever takes pictures says what is assumed, unless it was told
    for silent, other in ((left, right), (right, left)):
        if silent.preprocessing is None:
            return (f"{silent.name} does not say its preprocessing: that of {other.name} assumed",)
    return ()


def preprocessing_of(
    checkpoint: Checkpoint, choice: str | None = None, exif: Exif | None = None
) -> Preprocessing:
    """Choose the preprocessing: None and ``auto`` follow the checkpoint's own file.

    Where it has none, ``hf`` is assumed.
    """
    size, channels = ImageSize(*checkpoint.config.image_size), checkpoint.config.channels
    known, own = None, checkpoint.processor
    if choice in {None, "auto"} and own is not None:
        known = from_processor_config(own.fields, size, channels, file=own.file)
    return choose(known, size, channels, preprocess=choice, exif=exif)


def sized(checkpoint: Checkpoint, size: ImageSize | None) -> Checkpoint:
    """Give a checkpoint for images of ``size``, its position embedding interpolated."""
    wanted = (size.height, size.width) if size else checkpoint.config.image_size
    if wanted == checkpoint.config.image_size:
        return checkpoint
    model = checkpoint.model.for_image_size(wanted)
    note = (
        f"position embedding interpolated from {ImageSize(*checkpoint.config.image_size)} to {size}"
    )
    return replace(checkpoint, model=model, config=model.config, notes=(*checkpoint.notes, note))


def require_one_size(checkpoint: Checkpoint) -> None:
    """Require that the checkpoint's own files agree on the size of its images.

    They do not where a model was fine-tuned at another size and one file is of before. transformers
    refuses such a pair when it runs, for it does not know which is meant either.
    """
    if (difference := size_difference(checkpoint)) is not None:
        raise SpecError(f"{difference}; choose one with --image-size")


def size_difference(checkpoint: Checkpoint) -> str | None:
    """Say how the sizes of the model and of its processor differ; None where they do not."""
    own, size = checkpoint.processor, ImageSize(*checkpoint.config.image_size)
    made = size_in(own.fields) if own is not None else None
    if own is None or made in {None, size}:
        return None
    return (
        f"{checkpoint.source}: {own.file} makes images of {made} and the model's configuration "
        f"says {size}"
    )


def checkpoint_artifact(name: str, choices: Choices, size: ImageSize | None) -> Artifact:
    """Describe a checkpoint: it takes any batch and gives any head it has."""
    from msn_export.graph.torch_reference import TorchRunner, readable_heads
    from msn_export.models.checkpoint import load_checkpoint

    read = load_checkpoint(name, choices)
    differs = size_difference(read) if size is None else None
    checkpoint = sized(read, size)
    made = preprocessing_of(checkpoint)
    config, model = checkpoint.config, checkpoint.model
    heads = {head.output: head for head in readable_heads(model)}

    def start(outputs: tuple[str, ...], _stage: Path) -> TorchRunner:
        return TorchRunner(model, [heads[output] for output in outputs])

    def exact(outputs: tuple[str, ...]) -> TorchRunner:
        return TorchRunner(model, [heads[output] for output in outputs], exact=True)

    return Artifact(
        name=checkpoint.source,
        kind="checkpoint",
        dtype=Dtype.FP32,
        input_format=InputFormat.FLOAT,
        size=ImageSize(*config.image_size),
        channels=config.channels,
        preprocessing=made,
        batch=BatchRange(),
        max_batch=max_batch_in_memory(config.tokens, config.dim, config.mlp_dim, config.heads),
        outputs=tuple(heads),
        start=start,
        exact=exact,
        labels=config.labels,
        structure=structure_of_module(model),
        module=model,
        notes=(
            *checkpoint.notes,
            *made.notes,
            *([f"{differs}; the model's is taken"] if differs is not None else []),
        ),
    )
