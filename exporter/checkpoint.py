"""A checkpoint as a command takes it: for an image size, with its preprocessing."""

from dataclasses import replace
from pathlib import Path

from msn_export import preprocessing
from msn_export.artifact import Artifact
from msn_export.check.sample import affordable_batch
from msn_export.graph.reference import TorchRunner, readable_heads
from msn_export.graph.structure import structure_of_module
from msn_export.models.checkpoints import Checkpoint, load_checkpoint
from msn_export.spec import BatchRange, Dtype, ImageSize, InputKind


def preprocessing_of(checkpoint: Checkpoint, choice: str) -> preprocessing.Preprocessing:
    """Choose the preprocessing: ``auto`` follows the checkpoint's own file where it has one."""
    size = ImageSize(*checkpoint.config.image_size)
    channels = checkpoint.config.channels
    if choice == "auto" and checkpoint.processor is not None:
        return preprocessing.from_processor_config(checkpoint.processor, size, channels)
    return preprocessing.preset("hf" if choice == "auto" else choice, size, channels)


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


def checkpoint_artifact(name: str, variant: str | None, size: ImageSize | None) -> Artifact:
    """Describe a checkpoint as one side of a comparison; any batch, any head it has.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be used.
    """
    checkpoint = sized(load_checkpoint(name, variant=variant), size)
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
        stem=InputKind.FLOAT,
        size=ImageSize(*config.image_size),
        channels=config.channels,
        preprocessing=preprocessing_of(checkpoint, "auto") if checkpoint.processor else None,
        batch=BatchRange(),
        room=affordable_batch(config.tokens, config.dim, config.mlp_dim, config.heads),
        outputs=tuple(heads),
        start=start,
        exact=exact,
        labels=config.labels,
        structure=structure_of_module(model),
        module=model,
        notes=checkpoint.notes,
    )
