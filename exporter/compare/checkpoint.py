"""A checkpoint as a command takes it, and as one side of a comparison."""

from dataclasses import replace
from pathlib import Path

from msn_export.compare.sides import Artifact
from msn_export.errors import SpecError
from msn_export.graph.structure import structure_of_module
from msn_export.graph.torch_reference import TorchRunner, readable_heads
from msn_export.metrics.samples import max_batch_in_memory
from msn_export.models.checkpoint import Checkpoint, load_checkpoint
from msn_export.models.named import Choices
from msn_export.preprocessing import Exif, Preprocessing
from msn_export.processor_config import choose, from_processor_config, size_in
from msn_export.spec import BatchRange, Dtype, ImageSize, InputFormat


def preprocessing_of(
    checkpoint: Checkpoint, choice: str | None = None, exif: Exif | None = None
) -> Preprocessing:
    """Choose the preprocessing: None and ``auto`` follow the checkpoint's own file.

    Where it has none, ``hf`` is assumed.

    Raises:
        MsnExportError: as ``processor_config.choose``.
    """
    size, channels = ImageSize(*checkpoint.config.image_size), checkpoint.config.channels
    known, own = None, checkpoint.processor
    if choice in {None, "auto"} and own is not None:
        known = from_processor_config(own.fields, size, channels, file=own.file)
    return choose(known, size, channels, preprocess=choice, exif=exif)


def sized(checkpoint: Checkpoint, size: ImageSize | None) -> Checkpoint:
    """Give a checkpoint for images of ``size``, its position embedding interpolated.

    Raises:
        CheckpointError: the patch does not divide ``size``.
    """
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

    Raises:
        SpecError: they do not.
        ImageError: the processor's configuration is refused.
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
    """Describe a checkpoint: it takes any batch and gives any head it has.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be used.
    """
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
