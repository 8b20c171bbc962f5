"""The story of ``msn-export validate``: two artifacts, the same images, one verdict."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from msn_export.check.gate import Gate, coarsest, gate_of
from msn_export.check.sample import Sample, batch_sizes, draw, with_ragged
from msn_export.check.suspects import find_cause
from msn_export.check.verify import (
    Reference,
    Runner,
    Verified,
    measure_rounding,
    run_reference,
    verify,
)
from msn_export.errors import ImageError
from msn_export.job import Count, Job
from msn_export.models.named import Choices
from msn_export.preprocessing import Exif, Preprocessing
from msn_export.processor_config import choose
from msn_export.progress import SILENT, Progress
from msn_export.proof.pair import Pair, open_pair
from msn_export.proof.validation import Measured, Validation, judge
from msn_export.spec import BatchRange, Dtype

LIMIT = 64  # pictures: enough for a first percentile, seconds of a ViT-S on two cores


@dataclass(frozen=True, slots=True)
class ValidateJob(Job):
    """What ``msn-export validate`` was asked for.

    ``preprocess`` says how the candidate is fed in production, where that is not what its manifest
    says; ``exif`` is for both sides. ``gate`` None is that of the coarser dtype; ``numbers``
    replace some of the gate's.
    """

    reference: str | Path
    candidate: str | Path
    images: Path | None = None
    limit: Count = LIMIT
    batch: BatchRange | None = None
    preprocess: str | None = None
    exif: Exif | None = None
    variant: str | None = None
    weights: str | None = None
    labels: Path | None = None
    gate: Dtype | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    numbers_only: bool = False


def run_validate(job: ValidateJob, progress: Progress = SILENT) -> Validation:
    """Compare two artifacts on the same pictures.

    Raises:
        MsnExportError: they cannot be compared at all; a comparison that fails is no error but a
            ``Validation`` that did not pass.
    """
    return validate_in_full(job, progress)[0]


def validate_in_full(job: ValidateJob, progress: Progress) -> tuple[Validation, Verified]:
    """Compare two artifacts; give also what was compared: outputs, vectors, pictures.

    Raises:
        MsnExportError: as ``run_validate``.
    """
    choices = Choices(job.variant, job.weights, job.labels)
    with progress.step("read both sides"):
        pair = open_pair(str(job.reference), str(job.candidate), choices)
        made, own = _preprocessings(job, pair)
    name = job.gate or coarsest(pair.reference.dtype, pair.candidate.dtype)
    gate = gate_of(name, job.numbers)
    with progress.step("read images"):
        sample = draw(job.images, made, room=pair.room, limit=job.limit)
    with tempfile.TemporaryDirectory(prefix="msn-export-") as folder, ExitStack() as opened:
        # first, for what cannot run here is refused before the reference took its time
        runner = opened.enter_context(closing(pair.candidate.start(pair.outputs, Path(folder))))
        with progress.step(f"run {pair.reference.name}"):
            reference = run_pair_reference(pair, sample, Path(folder), rounding=name is Dtype.FP32)
        with progress.step(f"run {pair.candidate.name}"):
            measured = _measure(job, pair, reference, runner, gate, own)
    told = judge(pair, measured, gate, name, own, numbers_only=job.numbers_only)
    return told, measured.same


def run_pair_reference(pair: Pair, sample: Sample, stage: Path, *, rounding: bool) -> Reference:
    """Run the reference once; with ``rounding`` also in fp64, where it can be."""
    side = pair.reference
    with closing(side.start(pair.outputs, stage)) as runner:
        runner.name = f"{side.name} in {runner.name}"
        reference = run_reference(runner, sample, side.stem, fixed=side.fixed_batch)
    kept = {name: reference.outputs[name] for name in pair.outputs}
    reference = replace(reference, outputs=kept)
    if rounding and side.exact is not None:
        return measure_rounding(reference, side.exact(pair.outputs))
    return reference


def _preprocessings(job: ValidateJob, pair: Pair) -> tuple[Preprocessing, Preprocessing | None]:
    """Say what both sides are given, and what the candidate is in production if that differs."""
    side = pair.candidate
    made = choose(pair.preprocessing, side.size, side.channels, exif=job.exif)
    if job.preprocess is None and side.preprocessing is None:
        return made, None
    own = choose(
        side.preprocessing, side.size, side.channels, preprocess=job.preprocess, exif=job.exif
    )
    return made, None if own.makes_the_same_as(made) else own


def _measure(
    job: ValidateJob,
    pair: Pair,
    reference: Reference,
    runner: Runner,
    gate: Gate,
    own: Preprocessing | None,
) -> Measured:
    side = pair.candidate
    batch = job.batch or side.batch
    # an engine's batch is in the GPU's memory: this machine's sets no limit to its smallest
    room = max(batch.min, pair.room) if side.kind == "engine" else pair.room
    sizes = with_ragged(batch_sizes(batch, room), len(reference.sample))
    notes = list(reference.sample.notes)
    if room < batch.max:
        notes.append(f"batches up to {sizes[-1]} of {batch.max}: memory affords no more")
    same = verify(runner, reference, side.stem, sizes)
    cause = None
    if same.failures(gate):
        cause = find_cause(runner, reference, side.stem, gate, fixed=side.fixed_batch)
    if own is None:
        return Measured(same, None, cause, tuple(notes))
    if job.images is None:
        notes.append("resizing was not compared, noise needs none: give --images")
    fed = draw(job.images, own, room=reference.sample.room, limit=job.limit)
    shared = _on_shared(reference, fed)
    if len(shared.sample) < len(reference.sample):
        notes.append(f"{len(shared.sample)} pictures can be read with both preprocessings")
    return Measured(same, verify(runner, shared, side.stem, sizes), cause, tuple(notes))


def _on_shared(reference: Reference, fed: Sample) -> Reference:
    """Feed the pictures that both preprocessings could read: another may refuse another one.

    Raises:
        ImageError: there is none.
    """
    names = reference.sample.names
    at = {name: index for index, name in enumerate(fed.names)}
    kept = [index for index, name in enumerate(names) if name in at]
    if not kept:
        raise ImageError(f"no picture of {fed.source} can be read with both preprocessings")
    chosen = [at[names[index]] for index in kept]
    sample = replace(
        fed, pixels=fed.pixels[chosen], names=tuple(fed.names[index] for index in chosen)
    )
    outputs = {name: values[kept] for name, values in reference.outputs.items()}
    return replace(reference, sample=sample, outputs=outputs)
