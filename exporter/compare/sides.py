"""Two sides of a comparison: checkpoint, ONNX file or engine, opened alike; and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from msn_export.artifact import Artifact, ImageInput, is_checkpoint, named
from msn_export.errors import CheckpointError, RunnerError, SpecError, ToleranceError
from msn_export.graph import io
from msn_export.graph.classifier import fitted_classifier
from msn_export.graph.summary import differences, lost_epsilons, structure_of_module
from msn_export.host import NoDriver, find_driver
from msn_export.manifest import CheckRecord
from msn_export.metrics.diagnose import label_faults
from msn_export.metrics.evaluate import Evaluation, OutputsOf, max_batch_in_memory
from msn_export.metrics.tolerances import Gate
from msn_export.mixed_precision import cpu_runner
from msn_export.models.checkpoint import AS_IT_SAYS, Choices
from msn_export.models.config import LinearClassifier, VitConfig, readout_in
from msn_export.preprocessing import Exif, Preprocessing, assumed
from msn_export.processor_config import choose, from_processor_config, size_in
from msn_export.runtime import opening
from msn_export.runtime.engine import verify_engine_file
from msn_export.schema import Result
from msn_export.spec import Dtype, Head, ImageSize, InputFormat

if TYPE_CHECKING:
    from msn_export.models.checkpoint import Checkpoint


class OpenSide(OutputsOf, Protocol):
    """A runner that holds something until it is closed."""

    def close(self) -> None: ...


class CheckpointArtifact(Artifact):
    """A checkpoint, read for images of ``size``: it takes any batch and gives any head it has.

    ``other`` is the other side: the patches that it computes, the blocks that its heads hold, and
    a classifier that was fitted on this checkpoint, are this side's, too.
    """

    def __init__(
        self, name: str, choices: Choices, size: ImageSize | None, other: Artifact | None = None
    ) -> None:
        from msn_export.graph.torch_reference import readable_heads
        from msn_export.models.checkpoint import load_checkpoint

        read = load_checkpoint(name, choices)
        differs = size_difference(read) if size is None else None
        checkpoint = sized(read, size)
        manifest = other.manifest if other is not None else None
        if other is not None and manifest is not None and manifest.fit is not None:
            checkpoint = with_classifier(checkpoint, fitted_classifier(other.path, manifest))
            note = f"the checkpoint's classifier is the one that was fitted for {other.path.name}"
            checkpoint = replace(checkpoint, notes=(*checkpoint.notes, note))
        if manifest is not None and manifest.config is not None:
            readout = readout_in(manifest.config, f"manifest of {manifest.output}")
            checkpoint = with_config(checkpoint, replace(checkpoint.config, **readout))
        config, model = checkpoint.config, checkpoint.model
        super().__init__(Path(name))
        self.name, self.kind = checkpoint.source, "checkpoint"
        self.manifest, self.graph, self.module = None, None, model
        self.image_input = ImageInput(
            InputFormat.FLOAT, ImageSize(*config.image_size), config.channels, None
        )
        self.dtype = Dtype.FP32
        self.preprocessing = preprocessing_of(checkpoint)
        self.max_batch = max_batch_in_memory(
            config.sequence, config.dim, config.mlp_dim, config.heads
        )
        self.outputs = tuple(head.output for head in readable_heads(model))
        self.labels = config.labels
        self.structure = structure_of_module(model)
        self.notes = (
            *checkpoint.notes,
            *self.preprocessing.notes,
            *([f"{differs}; the model's is taken"] if differs is not None else []),
        )


def open_artifact(
    name: str,
    *,
    choices: Choices = AS_IT_SAYS,
    size: ImageSize | None = None,
    other: Artifact | None = None,
) -> Artifact:
    """Open what is to be compared: a file by its ending, else a checkpoint.

    Args:
        name: as the user gave it.
        choices: what a checkpoint does not say itself, or holds several of.
        size: the image size a checkpoint is to be read for; a file has its own.
        other: what a checkpoint is compared with.
    """
    if is_checkpoint(name):
        return CheckpointArtifact(name, choices, size, other)
    return require_comparable(Artifact.open(Path(name)))


def require_comparable(side: Artifact) -> Artifact:
    """Require one image input, and outputs that can be compared."""
    _ = side.image_input
    if side.kind == "onnx":
        with named(side.path):
            side.require_comparable()
            if side.graph is not None and side.manifest is None:
                io.infer_shapes(side.graph)
    return side


def open_side(side: Artifact, outputs: tuple[str, ...], stage: Path) -> OpenSide:
    """Open a side for running, with a folder for what it has to write."""
    if side.module is not None:
        from msn_export.graph.torch_reference import TorchRunner

        return TorchRunner(side.module, heads_of(outputs))
    if side.kind == "onnx":
        return cpu_runner(side.path, side.dtype, stage)
    return open_engine(side.path)


def heads_of(outputs: tuple[str, ...]) -> list[Head]:
    """Give the heads of outputs, in their order."""
    return [head for output in outputs for head in Head if head.output == output]


def open_engine(path: Path) -> OpenSide:
    driver = find_driver()
    if isinstance(driver, NoDriver):
        raise RunnerError(
            f"{path} cannot run here: {driver.reason}; run this command on the machine that has "
            "its GPU, or compare the graph it was built from"
        )
    return opening.open_engine(verify_engine_file(path, trust=False), eager_kernels=True)


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
        """The preprocessing of both sides: the reference's own where it has one.

        Else the candidate's, else hf; ``notes`` say which was assumed.
        """
        own = self.reference.preprocessing or self.candidate.preprocessing
        return own or assumed(self.reference.size, self.reference.channels)

    @property
    def max_batch(self) -> int:
        """The images that memory affords both at once."""
        return min(self.reference.max_batch, self.candidate.max_batch)


def open_pair(
    reference: str,
    candidate: str,
    choices: Choices = AS_IT_SAYS,
    files: Mapping[str, Artifact] = MappingProxyType({}),
) -> Pair:
    """Open both sides, but those of ``files``; a checkpoint is read for the other's image size."""
    if choices and not any(map(is_checkpoint, (reference, candidate))):
        raise SpecError(
            "--variant, --weights and --labels are for a checkpoint, and neither side is one"
        )
    opened: dict[str, Artifact] = {}
    size, beside = None, None
    for name in sorted(dict.fromkeys((reference, candidate)), key=is_checkpoint):
        opened[name] = (
            require_comparable(files[name])
            if name in files
            else open_artifact(name, choices=choices, size=size, other=beside)
        )
        size, beside = size or opened[name].size, beside or opened[name]
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
    stated, own = None, checkpoint.processor
    if choice in {None, "auto"} and own is not None:
        stated = from_processor_config(own.fields, size, channels, file=own.file)
    return choose(stated, size, channels, preprocess=choice, exif=exif)


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


def with_config(checkpoint: Checkpoint, config: VitConfig) -> Checkpoint:
    """Give a checkpoint with other patches and heads; weights are shared."""
    if config == checkpoint.config:
        return checkpoint
    return replace(checkpoint, model=checkpoint.model.with_config(config), config=config)


def with_classifier(checkpoint: Checkpoint, classifier: LinearClassifier) -> Checkpoint:
    """Give a checkpoint with a classifier in its own's place; the other weights are shared."""
    try:
        model = checkpoint.model.with_classifier(classifier)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {checkpoint.source}: {error}") from error
    notes, own = checkpoint.notes, len(checkpoint.config.labels)
    if own:
        notes = (*notes, f"the checkpoint's own classifier ({own} classes) is not used")
    return replace(checkpoint, model=model, config=model.config, notes=notes)


def require_one_size(checkpoint: Checkpoint) -> None:
    """Require that the checkpoint's own files agree on the size of its images.

    They do not where a model was fine-tuned at another size and one file is of before. transformers
    refuses such a pair when it runs, for it does not know which is meant either.
    """
    if (difference := size_difference(checkpoint)) is not None:
        raise SpecError(f"{difference}; choose one with --image-size")


def size_difference(checkpoint: Checkpoint) -> str | None:
    """Describe how the sizes of the model and of its processor differ; None where they do not."""
    own, size = checkpoint.processor, ImageSize(*checkpoint.config.image_size)
    wanted = size_in(own.fields) if own is not None else None
    if own is None or wanted in {None, size}:
        return None
    return (
        f"{checkpoint.source}: {own.file} makes images of {wanted} and the model's configuration "
        f"says {size}"
    )


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison, for the record."""

    name: str
    kind: str
    dtype: Dtype
    preprocessing: Preprocessing


@dataclass(frozen=True, slots=True, repr=False)
class Validation(Result):
    """The verdict, the figures behind it, and why.

    ``check`` gave both sides the same pixels; ``own``, where preprocessing differs, gave each what
    its own makes of the same pictures, and so does ``check.accuracy``. ``reasons`` is empty when
    ``passed``.
    """

    reference: Side
    candidate: Side
    passed: bool
    check: CheckRecord
    own: CheckRecord | None
    gate: Gate
    gate_name: Dtype
    reasons: tuple[str, ...]
    cause: str | None
    notes: tuple[str, ...]


def decide(
    pair: Pair,
    name: Dtype,
    same: Evaluation,
    mine: Evaluation | None,
    notes: Sequence[str],
    *,
    numbers_only: bool = False,
) -> Validation:
    """Decide whether a candidate is what its reference is, and say why not.

    Args:
        pair: what was compared.
        name: whose gate it was.
        same: the candidate on the reference's pixels; its accuracy as it is fed in production.
        mine: the candidate on the same pictures as it is fed in production, where that differs.
        notes: what else is to be said of the runs.
        numbers_only: contradictions between the graphs, and outputs that only one of them has, are
            notes, not reasons.
    """
    model, fed = same.disagreements, mine.disagreements if mine is not None else ()
    reasons, notes = list(model), [*pair.notes, *notes]
    if mine is not None:
        shown = (
            f"with the same pixels cosine {_least(same)}, each with its own preprocessing "
            f"{_least(mine)}"
        )
        if fed and model:
            reasons.append(f"the preprocessing differs too: {shown}")
        elif fed:
            reasons.append(f"a preprocessing mismatch, the model itself agrees: {shown}")
        else:
            reasons = []
            notes.append(
                f"the preprocessing differs and the verdict is that of both together: {shown}"
            )
    reasons += [*same.dependences, *same.losses]
    reasons += label_faults(pair.reference.labels, pair.candidate.labels)
    structures = pair.reference.structure, pair.candidate.structure
    notes += lost_epsilons(*structures)
    contradictions = [*differences(*structures), *pair.alone]
    if numbers_only:
        notes += contradictions
    else:
        reasons += contradictions
    return Validation(
        reference=_side(pair.reference, same.reference.sample.preprocessing),
        candidate=_side(pair.candidate, (mine or same).reference.sample.preprocessing),
        passed=not reasons,
        check=same.check,
        own=mine.check if mine is not None else None,
        gate=same.gate,
        gate_name=name,
        reasons=tuple(reasons),
        cause=None,
        notes=tuple(dict.fromkeys(notes)),
    )


def _least(found: Evaluation) -> str:
    return f"{np.min([agreement.cosine_min for agreement in found.outputs.values()]):.6f}"


def _side(artifact: Artifact, used: Preprocessing) -> Side:
    return Side(artifact.name, artifact.kind, artifact.dtype, used)
