"""A checkpoint as one side of a comparison."""

from pathlib import Path

from msn_export.check.sample import affordable_batch
from msn_export.checkpoint import preprocessing_of, size_difference, sized
from msn_export.graph.reference import TorchRunner, readable_heads
from msn_export.graph.structure import structure_of_module
from msn_export.models.checkpoints import load_checkpoint
from msn_export.models.named import Choices
from msn_export.proof.artifact import Artifact
from msn_export.spec import BatchRange, Dtype, ImageSize, InputKind


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
        stem=InputKind.FLOAT,
        size=ImageSize(*config.image_size),
        channels=config.channels,
        preprocessing=made,
        batch=BatchRange(),
        room=affordable_batch(config.tokens, config.dim, config.mlp_dim, config.heads),
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
