"""What came of comparing two artifacts block by block, and which block to look into."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msn_export.check.drift import StageDrift, TensorDrift
from msn_export.check.gate import JUMP
from msn_export.errors import GraphError
from msn_export.manifest_records import CheckRecord
from msn_export.proof.pair import Pair
from msn_export.proof.streams import what_is_shown
from msn_export.spec import Dtype


@dataclass(frozen=True, slots=True)
class Drift:
    """Every stage compared; ``parted`` is the first whose relative error is not allowed.

    ``suspect`` is the block looked into: the one that parted, else the one that adds the most
    error; ``inside`` are its tensors. ``check`` judges the outputs as ``validate`` does.
    """

    reference: str
    candidate: str
    dtype: Dtype
    stages: tuple[StageDrift, ...]
    parted: str | None
    suspect: str | None
    inside: tuple[TensorDrift, ...]
    check: CheckRecord
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether no stage is past what is allowed."""
        return self.parted is None

    @property
    def sentence(self) -> str:
        """Where they part; if nowhere, which block adds the most error, beside the median one."""
        if self.parted is not None:
            return f"They part at {self.parted}, the first stage whose error is not allowed."
        blocks = [stage for stage in self.stages if stage.name.startswith("block ")]
        most = max(blocks, key=lambda stage: stage.added)
        median = statistics.median(stage.added for stage in blocks)
        times = f", {most.added / median:.1f} times the median block" if median > 0 else ""
        first = (
            f"{self.suspect} is the first to add {JUMP:g} times what any stage before it does, "
            if self.suspect != most.name
            else ""
        )
        return f"No stage is past what is allowed; {first}{most.name} adds the most error{times}."


def common_stages(pair: Pair) -> tuple[str, ...]:
    """List the stages both sides show.

    Raises:
        GraphError: they have other blocks, which nothing can be matched with.
    """
    left, right = (what_is_shown(side, pair.outputs) for side in (pair.reference, pair.candidate))
    if left.stages != right.stages:
        raise GraphError(
            f"{pair.reference.name} has {_span(left.inside)} and {pair.candidate.name} "
            f"{_span(right.inside)}; they cannot be matched"
        )
    return left.stages


def _span(blocks: Mapping[str, Any]) -> str:
    names = list(blocks)
    return f"{len(names)} blocks ({names[0]} to {names[-1]})"


def suspect_of(stages: tuple[StageDrift, ...], parted: StageDrift | None) -> str | None:
    """Choose the block to look into; an embedding or an output has no inside.

    Where nothing is past what is allowed: the first block that adds several times what any stage
    before it added, for later ones magnify what comes in; else the one that adds the most.
    """
    if parted is not None:
        return parted.name if parted.name.startswith("block ") else None
    before = stages[0].added
    blocks = [stage for stage in stages if stage.name.startswith("block ")]
    for stage in blocks:
        if stage.added > JUMP * before:
            return stage.name
        before = max(before, stage.added)
    return max(blocks, key=lambda stage: stage.added).name


def smoothing(pair: Pair) -> tuple[str, ...]:
    """Warn of what differs inside the blocks of a smoothed graph and is right all the same."""
    return tuple(
        f"{side.name} was smoothed: some channels inside a block are scaled and scaled back, so "
        "tensors there differ by more than the block's output does"
        for side in (pair.reference, pair.candidate)
        if side.manifest is not None
        and side.manifest.quantization is not None
        and side.manifest.quantization.smoothing
    )
