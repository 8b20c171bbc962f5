"""A checkpoint as a command takes it: for an image size, with its preprocessing."""

from dataclasses import replace

from msn_export import preprocessing
from msn_export.models.checkpoints import Checkpoint
from msn_export.spec import ImageSize


def preprocessing_of(checkpoint: Checkpoint, choice: str) -> preprocessing.Preprocessing:
    """Choose the preprocessing: ``auto`` follows the checkpoint's own file where it has one."""
    size = ImageSize(*checkpoint.config.image_size)
    channels = checkpoint.config.channels
    if choice == "auto" and checkpoint.processor is not None:
        return preprocessing.from_processor_config(checkpoint.processor, size, channels)
    return preprocessing.preset("hf" if choice == "auto" else choice, size, channels)


def assumed(checkpoint: Checkpoint, choice: str) -> tuple[str, ...]:
    """Say that the preprocessing is assumed where neither user nor checkpoint names one."""
    if choice != "auto" or checkpoint.processor is not None:
        return ()
    return (f"{checkpoint.source} has no preprocessor_config.json: preprocessing hf assumed",)


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
