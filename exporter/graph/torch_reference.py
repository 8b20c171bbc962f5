"""Run the PyTorch reference: what every artifact is compared with."""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from msn_export.errors import GraphError
from msn_export.graph.blocks import ENTRY, TENSORS
from msn_export.models.config import READS
from msn_export.models.vit import Hidden, VitMsn
from msn_export.spec import Head

# b batch, n tokens, dim hidden size


def read_head(model: VitMsn, head: Head, hidden: Hidden) -> Tensor:
    """Read a head off what the model computed.

    ``mean`` averages the patch tokens without [CLS]: facebookresearch/msn src/deit.py,
    ``forward_return_n_last_blocks(return_patch_avgpool=True)``.
    """
    match head:
        case Head.TOKENS:
            return hidden.tokens
        case Head.MEAN:
            return hidden.tokens[:, 1:].mean(dim=1)
        case Head.CLS:
            return hidden.tokens[:, 0]
        case Head.LOGITS:
            return model.classify(hidden)


def require_readable(model: VitMsn, heads: Sequence[Head]) -> None:
    """Require that a model has what ``heads`` read."""
    if Head.LOGITS in heads and model.classifier is None:
        raise GraphError("head logits needs a classifier, this checkpoint has none; use cls")
    rest = [head for head in heads if head is not Head.LOGITS]
    if rest and model.norm is None:
        raise GraphError(
            f"head {rest[0]} needs the final LayerNorm, which this checkpoint lacks (its "
            f"classifier reads {READS[model.config.pooling]}); use logits, or the pre-trained "
            "checkpoint"
        )


def readable_heads(model: VitMsn) -> tuple[Head, ...]:
    """List the heads that can be read off a model."""
    held = {True: model.classifier is not None, False: model.norm is not None}
    return tuple(head for head in Head if held[head is Head.LOGITS])


class TorchRunner:
    """The reference in fp32 on the CPU, outputs by name as the graph has them.

    ``exact`` runs a copy in fp64, against which the rounding of fp32 shows.
    """

    def __init__(self, model: VitMsn, heads: Sequence[Head], *, exact: bool = False) -> None:
        require_readable(model, heads)
        self.model = copy.deepcopy(model).double() if exact else model
        self.heads = tuple(heads)
        self.dtype = torch.float64 if exact else torch.float32
        self.name = f"torch {torch.__version__}, cpu, {'fp64' if exact else 'fp32'}"

    def __call__(self, pixel_values: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Run normalised planes [b, c, h, w]."""
        with torch.inference_mode():
            hidden = self.model.hidden(torch.from_numpy(pixel_values).to(self.dtype))
            return {head.output: read_head(self.model, head, hidden).numpy() for head in self.heads}

    def close(self) -> None:
        """Do nothing: the model is the checkpoint's."""


def shaken(model: VitMsn, seed: int) -> VitMsn:
    """Copy a model with every weight moved within half of its last bit, as fp32 rounds it."""
    generator = torch.Generator().manual_seed(seed)
    moved = copy.deepcopy(model).requires_grad_(requires_grad=False)
    for weight in moved.parameters():
        drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
        weight.copy_(weight.double() * (1 + (2 * drawn - 1) * 2.0**-24))
    return moved


class Heads(nn.Module):
    """A model with what is read off it: images [b, c, h, w] to one tensor a head."""

    def __init__(self, model: VitMsn, heads: Sequence[Head]) -> None:
        super().__init__()
        require_readable(model, heads)
        self.model, self.heads = model, tuple(heads)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Run, and read every head."""
        hidden = self.model.hidden(pixel_values)
        return tuple(read_head(self.model, head, hidden) for head in self.heads)


class TorchStream:
    """The reference with tensors of its blocks shown, by hooks.

    Stages are ``patch embedding``, ``block N`` and the outputs; ``names`` chooses what comes out.
    With every batch ``peaks`` grows: the largest absolute value by stage, and which tensor has it.
    A stage that is given takes the place of what the model computes: what follows reads that.
    """

    def __init__(
        self, model: VitMsn, heads: Sequence[Head], names: Collection[str], *, exact: bool = False
    ) -> None:
        self.runner = TorchRunner(model, heads, exact=exact)
        self.name = self.runner.name
        self.names = frozenset(names)
        self.peaks: dict[str, tuple[float, str]] = {}
        self._seen: dict[str, NDArray[Any]] = {}

    def __call__(
        self,
        pixel_values: NDArray[np.float32],
        given: Mapping[str, NDArray[Any]] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run normalised planes [b, c, h, w]; the hooks are gone afterwards."""
        self._seen = {}
        handles = [*self._watch(), *self._replace(given or {})]
        try:
            outputs = self.runner(pixel_values)
        finally:
            for handle in handles:
                handle.remove()
        return self._seen | outputs

    def close(self) -> None:
        """Do nothing: the model is the checkpoint's."""

    def _watch(self) -> Iterator[RemovableHandle]:
        blocks = cast("Sequence[nn.Module]", self.runner.model.blocks)
        yield self._on(blocks[0], ENTRY, (ENTRY,), given=True)
        for number, block in enumerate(blocks):
            stage = f"block {number}"
            for place in TENSORS:
                module = block.get_submodule(place.path)
                yield self._on(module, stage, place.names(number), given=place.given)
            yield self._on(block, stage, (stage,), given=False)

    def _replace(self, given: Mapping[str, NDArray[Any]]) -> Iterator[RemovableHandle]:
        """Hand on what is given for a stage in place of what was computed, and noted, there."""
        blocks = cast("Sequence[nn.Module]", self.runner.model.blocks)
        tensors = {
            stage: torch.from_numpy(np.ascontiguousarray(array)).to(self.runner.dtype)
            for stage, array in given.items()
        }
        if ENTRY in tensors:
            yield blocks[0].register_forward_pre_hook(lambda *_: (tensors[ENTRY],))
        for number, block in enumerate(blocks):
            if f"block {number}" in tensors:
                yield block.register_forward_hook(
                    lambda *_, stage=f"block {number}": tensors[stage]
                )

    def _on(
        self, module: nn.Module, stage: str, names: tuple[str, ...], *, given: bool
    ) -> RemovableHandle:
        if given:
            return module.register_forward_pre_hook(
                lambda _module, read: self._note(read[0], stage, names)
            )
        return module.register_forward_hook(
            lambda _module, _read, made: self._note(made, stage, names)
        )

    def _note(self, tensor: Tensor, stage: str, names: tuple[str, ...]) -> None:
        peak = float(tensor.abs().max())
        if stage not in self.peaks or not peak <= self.peaks[stage][0]:
            self.peaks[stage] = (peak, names[0])
        self._seen |= {name: tensor.numpy() for name in names if name in self.names}
