"""The story of ``msn-export drift``: block by block, where two artifacts part."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msn_export.check.compare import Agreement
from msn_export.check.drift import (
    TensorComparison,
    TensorDrift,
    compare_streams,
    first_past,
    stages_of,
)
from msn_export.check.gate import DRIFT, GATES, ROUNDING, coarsest
from msn_export.check.sample import Sample, batches, draw
from msn_export.check.verify import Reference, Verified
from msn_export.job import Count, Job, Within
from msn_export.manifest_records import CheckRecord
from msn_export.models.named import Choices
from msn_export.preprocessing import Exif
from msn_export.processor_config import choose
from msn_export.progress import SILENT, Progress
from msn_export.proof.artifact import Artifact
from msn_export.proof.drift import Drift, common_stages, smoothing, suspect_of
from msn_export.proof.pair import Pair, open_pair
from msn_export.proof.streams import open_stream, what_is_shown
from msn_export.spec import Dtype

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIMIT = 16  # pictures: the stages of a ViT-S are 4 MB each, and one look needs no percentile
AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class DriftJob(Job):
    """What ``msn-export drift`` was asked for; ``tolerance`` None is measured or the dtype's."""

    reference: str | Path
    candidate: str | Path
    images: Path | None = None
    limit: Count = LIMIT
    batch: Count = AT_ONCE
    preprocess: str | None = None
    exif: Exif | None = None
    variant: str | None = None
    weights: str | None = None
    labels: Path | None = None
    tolerance: Annotated[float, Within(0)] | None = None


def run_drift(job: DriftJob, progress: Progress = SILENT) -> Drift:
    """Compare two artifacts block by block on the same pictures.

    Raises:
        MsnExportError: they cannot be compared block by block.
    """
    choices = Choices(job.variant, job.weights, job.labels)
    with tempfile.TemporaryDirectory(prefix="msn-export-") as folder:
        with progress.step("read both sides"):
            pair = open_pair(str(job.reference), str(job.candidate), choices)
        reference = _marked(pair.reference, Path(folder) / "reference", progress)
        candidate = _marked(pair.candidate, Path(folder) / "candidate", progress)
        return _compare(job, replace(pair, reference=reference, candidate=candidate), progress)


def _marked(side: Artifact, folder: Path, progress: Progress) -> Artifact:
    """Build an engine once more with its blocks shown; anything else shows them as it is."""
    if side.kind != "engine":
        return side
    assert side.manifest is not None  # no engine is described without one
    side.start((), folder).close()  # refused here, before minutes of compiling, if it cannot run
    from msn_export.proof.marked import build_marked

    folder.mkdir()
    return replace(side, marked=build_marked(Path(side.name), side.manifest, folder, progress))


def _compare(job: DriftJob, pair: Pair, progress: Progress) -> Drift:
    stages = common_stages(pair)
    with progress.step("read images"):
        side = pair.reference
        made = choose(
            pair.preprocessing, side.size, side.channels, preprocess=job.preprocess, exif=job.exif
        )
        sample = draw(job.images, made, room=pair.room, limit=job.limit)
    with progress.step("compare block by block"):
        gathered, peaks, ran_on = _look(job, pair, sample, stages)
    dtype = coarsest(pair.reference.dtype, pair.candidate.dtype)
    with progress.step("measure the reference's own rounding"):
        allowed = _allowed(job, pair, sample, stages, dtype)
    measured = stages_of(gathered, peaks, allowed)
    parted = first_past(measured)
    suspect = suspect_of(measured, parted)
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
        tuple(dict.fromkeys((*pair.notes, *smoothing(pair), *sample.notes))),
    )


def _look(
    job: DriftJob, pair: Pair, sample: Sample, names: tuple[str, ...], *, whole: bool = True
) -> tuple[dict[str, TensorComparison], dict[str, tuple[float, str]], str]:
    """Run both sides once over the sample and compare the tensors called ``names``.

    ``whole`` is for stages, which both sides have in one shape, and measures the peaks; inside a
    block a form of attention may lay its tensors out as it likes, and those are left out.
    """
    with (
        closing(open_stream(pair.reference, pair.outputs, names, peaks=whole)) as reference,
        closing(open_stream(pair.candidate, pair.outputs, names)) as candidate,
    ):
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
