"""The story of ``msn-export drift``: block by block, where two artifacts part."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msn_export.check.compare import Agreement
from msn_export.check.drift import (
    StageDrift,
    TensorComparison,
    TensorDrift,
    compare_streams,
    first_past,
    stages_of,
)
from msn_export.check.gate import DRIFT, GATES, ROUNDING, coarsest
from msn_export.check.sample import Sample, batches, draw
from msn_export.check.verify import Reference, Verified
from msn_export.errors import GraphError
from msn_export.manifest import CheckRecord
from msn_export.preprocessing import preset
from msn_export.progress import Progress
from msn_export.proof.artifact import Artifact
from msn_export.proof.pair import Pair, open_pair
from msn_export.proof.streams import open_stream, what_is_shown
from msn_export.spec import Dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIMIT = 16  # pictures: the stages of a ViT-S are 4 MB each, and one look needs no percentile
AT_ONCE = 4
JUMP = 4.0


@dataclass(frozen=True, slots=True)
class DriftJob:
    """What ``msn-export drift`` was asked for; ``tolerance`` None is measured or the dtype's."""

    reference: str
    candidate: str
    images: Path | None = None
    limit: int = LIMIT
    batch: int = AT_ONCE
    preprocess: str | None = None
    variant: str | None = None
    tolerance: float | None = None


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
        added = [stage.added for stage in self.stages if stage.name.startswith("block ")]
        median, most = statistics.median(added), max(added)
        times = f", {most / median:.1f} times the median block" if median > 0 else ""
        return f"No stage is past what is allowed; {self.suspect} adds the most error{times}."


def run_drift(job: DriftJob, progress: Progress) -> Drift:
    """Compare two artifacts block by block on the same pictures.

    Raises:
        MsnExportError: they cannot be compared block by block.
    """
    with tempfile.TemporaryDirectory(prefix="msn-export-") as folder:
        with progress.step("read both sides"):
            pair = open_pair(job.reference, job.candidate, variant=job.variant)
        reference = _marked(pair.reference, Path(folder) / "reference", progress)
        candidate = _marked(pair.candidate, Path(folder) / "candidate", progress)
        return _compare(job, replace(pair, reference=reference, candidate=candidate), progress)


def _marked(side: Artifact, folder: Path, progress: Progress) -> Artifact:
    """Build an engine once more with its blocks shown; anything else shows them as it is."""
    if side.kind != "engine":
        return side
    assert side.manifest is not None  # no engine is described without one
    side.start((), folder)  # refused here, before minutes of compiling, if it cannot run
    from msn_export.proof.marked import build_marked

    folder.mkdir()
    return replace(side, marked=build_marked(Path(side.name), side.manifest, folder, progress))


def _compare(job: DriftJob, pair: Pair, progress: Progress) -> Drift:
    stages = _common_stages(pair)
    with progress.step("read images"):
        made = pair.preprocessing
        if job.preprocess is not None:
            made = preset(job.preprocess, pair.reference.size, pair.reference.channels)
        sample = draw(job.images, made, room=pair.room, limit=job.limit)
    with progress.step("compare block by block"):
        gathered, peaks, ran_on = _look(job, pair, sample, stages)
    dtype = coarsest(pair.reference.dtype, pair.candidate.dtype)
    with progress.step("measure the reference's own rounding"):
        allowed = _allowed(job, pair, sample, stages, dtype)
    measured = stages_of(gathered, peaks, allowed)
    parted = first_past(measured)
    suspect = _suspect(measured, parted)
    inside: tuple[TensorDrift, ...] = ()
    if suspect is not None and pair.reference.kind != "engine" != pair.candidate.kind:
        with progress.step(f"look into {suspect}"):
            inside = _inside(job, pair, sample, suspect)
    return Drift(
        pair.reference.name,
        pair.candidate.name,
        dtype,
        measured,
        parted.name if parted else None,
        suspect,
        inside,
        _check(pair, sample, gathered, dtype, ran_on, _at_once(job, pair, sample)),
        (*pair.notes, *(f"skipped: {broken}" for broken in sample.broken)),
    )


def _common_stages(pair: Pair) -> tuple[str, ...]:
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


def _look(
    job: DriftJob, pair: Pair, sample: Sample, names: tuple[str, ...], *, whole: bool = True
) -> tuple[dict[str, TensorComparison], dict[str, tuple[float, str]], str]:
    """Run both sides once over the sample and compare the tensors called ``names``.

    ``whole`` is for stages, which both sides have in one shape, and measures the peaks; inside a
    block a form of attention may lay its tensors out as it likes, and those are left out.
    """
    reference = open_stream(pair.reference, pair.outputs, names, peaks=whole)
    candidate = open_stream(pair.candidate, pair.outputs, names)
    gathered = compare_streams(
        reference, candidate, _batches(job, pair, sample), names, strict=whole
    )
    return gathered, dict(reference.peaks), f"{reference.name} | {candidate.name}"


def _batches(
    job: DriftJob, pair: Pair, sample: Sample
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Deal the pictures, a few at a time; a side with a fixed batch sets the size for both."""
    fixed = pair.reference.fixed_batch or pair.candidate.fixed_batch
    for indices in batches([_at_once(job, pair, sample)], len(sample)):
        kept = indices if fixed else [index for index in indices if index < len(sample)]
        yield (
            sample.feed(kept, pair.reference.stem),
            sample.feed(kept, pair.candidate.stem),
        )


def _allowed(
    job: DriftJob, pair: Pair, sample: Sample, stages: tuple[str, ...], dtype: Dtype
) -> dict[str, float]:
    """Say how large each stage's relative error may be.

    In fp32 against a checkpoint: a multiple of what its own fp32 rounds away, measured in fp64.
    """
    reference = pair.reference
    if job.tolerance is not None or dtype is not Dtype.FP32 or reference.exact is None:
        return dict.fromkeys(stages, DRIFT[dtype] if job.tolerance is None else job.tolerance)
    few = _few(job, sample)
    exact = open_stream(reference, pair.outputs, stages, exact=True)
    rounded = open_stream(reference, pair.outputs, stages)
    fed = ((images, images) for images, _ in _batches(job, pair, few))
    gathered = compare_streams(exact, rounded, fed, stages)
    return {name: ROUNDING * found.drift().relative for name, found in gathered.items()}


def _few(job: DriftJob, sample: Sample) -> Sample:
    return replace(sample, pixels=sample.pixels[: job.batch], names=sample.names[: job.batch])


def _at_once(job: DriftJob, pair: Pair, sample: Sample) -> int:
    fixed = pair.reference.fixed_batch or pair.candidate.fixed_batch
    return fixed or min(job.batch, sample.room)


def _suspect(stages: tuple[StageDrift, ...], parted: StageDrift | None) -> str | None:
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


def _inside(job: DriftJob, pair: Pair, sample: Sample, block: str) -> tuple[TensorDrift, ...]:
    """Compare every tensor of one block that both sides have under some name."""
    left, right = (
        what_is_shown(side, pair.outputs).inside[block] for side in (pair.reference, pair.candidate)
    )
    theirs = {name for names in right for name in names}
    chosen = [next((name for name in names if name in theirs), None) for names in left]
    names = tuple(name for name in chosen if name is not None)
    gathered, _, _ = _look(job, pair, _few(job, sample), names, whole=False)
    return tuple(comparison.drift() for comparison in gathered.values())


def _check(
    pair: Pair,
    sample: Sample,
    gathered: dict[str, TensorComparison],
    dtype: Dtype,
    ran_on: str,
    batch: int,
) -> CheckRecord:
    outputs: dict[str, Agreement] = {
        name: gathered[name].comparison.agreement() for name in pair.outputs
    }
    gate = GATES[dtype]
    reference = Reference({}, sample, pair.reference.name)
    verified = Verified(outputs, (batch,), ran_on, reference)
    return verified.record(gate, passed=not verified.failures(gate))
