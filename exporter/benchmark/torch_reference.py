"""The PyTorch model that an artifact came from, found again by what its manifest says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from msn_export.errors import CheckpointError, SpecError
from msn_export.graph.torch_reference import Heads
from msn_export.models.checkpoint import load_checkpoint
from msn_export.models.named import AS_IT_SAYS, Choices
from msn_export.models.vit import VitMsn
from msn_export.spec import Head, ImageSize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from msn_export.models.vit import AttentionKind


def open_reference(
    checkpoint: str,
    *,
    attention: AttentionKind,
    outputs: Sequence[str],
    size: ImageSize,
    sha256: str | None,
    choices: Choices = AS_IT_SAYS,
) -> Heads:
    """Load a checkpoint as the model whose outputs an artifact has.

    Args:
        checkpoint: as ``msn-export onnx`` takes it.
        attention: written out, or fused.
        outputs: of the artifact; those that no head of ours is called are left out.
        size: of the images; the position embedding is interpolated to it.
        sha256: that of the weights, where a manifest says it.
        choices: what the checkpoint does not say itself, or holds several of.
    """
    loaded = load_checkpoint(checkpoint, choices)
    if sha256 is not None and loaded.sha256 != sha256:
        raise CheckpointError(
            f"checkpoint {checkpoint} has other weights ({loaded.sha256[:12]}…) than the artifact "
            f"was made from ({sha256[:12]}…); name the right one with --checkpoint, or what holds "
            "its weights with --weights"
        )
    heads = [head for head in Head if head.output in outputs]
    if not heads:
        raise SpecError(
            f"the artifact's outputs ({', '.join(outputs)}) are none of "
            f"{', '.join(head.output for head in Head)}: there is nothing to compare"
        )
    model = loaded.model
    # not compare.checkpoint.sized: that brings onnxruntime, and this process is being weighed
    if (size.height, size.width) != model.config.image_size:
        model = model.for_image_size((size.height, size.width))
    return Heads(_with(attention, model), heads).eval()


def _with(attention: AttentionKind, model: VitMsn) -> VitMsn:
    """Give the model with another form of attention; weights are shared."""
    if attention == model.attention:
        return model
    with torch.device("meta"):
        other = VitMsn(model.config, attention=attention)
    other.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return other.eval()
