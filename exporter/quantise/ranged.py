"""Take a graph's ranges from images, or from a file, and all else that quantising it needs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from msn_export.calibration import ranges as ranges_file
from msn_export.calibration.bias import corrections
from msn_export.calibration.collect import Watch, histograms
from msn_export.calibration.observers import Histogram
from msn_export.calibration.pictures import Pictures
from msn_export.calibration.plan import Plan
from msn_export.calibration.ranges import ImagesRecord, Ranges, SmoothingRecord, TensorRange
from msn_export.check.sample import Sample
from msn_export.errors import GraphError
from msn_export.graph.lower import raise_opset
from msn_export.islands import MEASURED, decide
from msn_export.progress import Progress
from msn_export.quantise.choices import PROBED, Probe, replay, smooth
from msn_export.quantise.job import AUTO, OFF, CalibrateJob
from msn_export.sidecar import sha256_of
from msn_export.source import Source, room_of
from msn_export.spec import Dtype


@dataclass(frozen=True, slots=True)
class Ranged:
    """A plan with all it takes.

    ``islands`` stay fp32, each with its largest absolute value; ``overflowing`` are projections
    that stay unquantised because they write one.
    """

    plan: Plan
    ranges: Ranges
    probe: Probe
    islands: dict[str, float]
    overflowing: tuple[str, ...]


def known_ranges(job: CalibrateJob, source: Source) -> Ranges | None:
    """Read the ranges that were given.

    Raises:
        ManifestError: the file is none.
        GraphError: they are another graph's, or were taken after another smoothing.
    """
    if job.ranges is None:
        return None
    known = ranges_file.read(job.ranges)
    known.require(sha256_of(source.path), source.preprocessing, job.ranges)
    taken = OFF if known.smoothing.strength is None else known.smoothing.strength
    if job.smooth not in {None, taken}:
        raise GraphError(
            f"--smooth {job.smooth}: --ranges {job.ranges} were taken after --smooth {taken}; "
            "leave one of the two out"
        )
    return known


def take_ranges(
    job: CalibrateJob,
    source: Source,
    pictures: Pictures,
    known: Ranges | None,
    stage: Path,
    progress: Progress,
) -> Ranged:
    """Find what to quantise and measure its ranges, smoothing, corrections and islands.

    Raises:
        GraphError: the graph is no ViT, or a value is not finite; the tensor is named.
    """
    plan = Plan.of(
        raise_opset(source.model), job.scheme, attention=job.quantize_attention, extra=job.extra
    )
    if job.rest is Dtype.FP32:
        plan.unquantised()  # refuses now what it would refuse after the ranges were taken
    pixels, names = next(pictures.first(PROBED).decode(PROBED))
    sample = Sample(pixels, names, str(job.images), source.preprocessing, room=room_of(plan.model))
    with progress.step("run the fp32 graph on a few images"):
        images = sample.feed(range(len(sample)), source.stem)
        probe = Probe.of(plan.model, images, names, stage)
    if known is not None and job.ranges is not None:
        plan, ranges = replay(plan, known.smoothing), known
        seen = known.histograms(plan.watched, job.ranges)
    else:
        plan, smoothing = _smooth(job, plan, probe, progress)
        seen = _observe(plan, pictures, stage, progress)
        ranges = _ranges(job, source, pictures, smoothing, seen)
    plan = plan.measured(seen, job.observer)
    islands = {}
    if job.rest is not Dtype.FP32:
        with progress.step("measure what overflows"):
            islands = decide(plan.unquantised(), MEASURED, job.rest, sample, source.stem, stage)
    plan, overflowing = _without_islands(plan, islands)
    if job.bias_correction:
        with progress.step("measure biases"):
            plan = _corrected(plan, probe)
    return Ranged(plan, ranges, probe, islands, overflowing)


def _smooth(
    job: CalibrateJob, plan: Plan, probe: Probe, progress: Progress
) -> tuple[Plan, SmoothingRecord]:
    if job.smooth == OFF:
        return plan, SmoothingRecord()
    strength = None if job.smooth in {None, AUTO} else float(job.smooth or 0)
    title = "choose a smoothing" if strength is None else f"smooth at {strength:g}"
    with progress.step(title):
        return smooth(plan, strength, probe, job.observer)


def _observe(
    plan: Plan, pictures: Pictures, stage: Path, progress: Progress
) -> dict[str, Histogram]:
    of = min(pictures.limit, len(pictures.paths))
    with progress.step(f"take ranges on up to {of} images"):
        watch = Watch(plan.model, list(plan.watched), stage)
        return histograms(
            watch,
            pictures.feed(watch.batch),
            lambda count: progress.advance(count, of, f"{count} images"),
        )


def _corrected(plan: Plan, probe: Probe) -> Plan:
    watch = probe.watch(plan.model, [p.x for p in plan.projections])
    errors = corrections(
        plan.model, plan.projections, plan.thresholds, plan.scheme, watch,
        probe.batches(watch.batch),
    )  # fmt: skip
    return replace(plan, corrections=errors)


def _ranges(
    job: CalibrateJob,
    source: Source,
    pictures: Pictures,
    smoothing: SmoothingRecord,
    seen: Mapping[str, Histogram],
) -> Ranges:
    return Ranges(
        graph=sha256_of(source.path),
        images=ImagesRecord(
            source=job.images.name,
            limit=job.limit,
            seed=job.seed,
            sha256=tuple(pictures.seen.values()),
            broken=tuple(path.name for path in pictures.broken),
        ),
        preprocessing=source.preprocessing,
        smoothing=smoothing,
        tensors={name: TensorRange.of(histogram) for name, histogram in seen.items()},
    )


def _without_islands(plan: Plan, islands: Mapping[str, float]) -> tuple[Plan, tuple[str, ...]]:
    """Leave out the projections whose result fp16 cannot hold: they compute in fp32."""
    nodes = {node.name: node for node in plan.model.graph}
    overflowing = {p.node for p in plan.projections if _results(nodes[p.node]) & islands.keys()}
    chosen = tuple(p for p in plan.projections if p.node not in overflowing)
    return replace(plan, projections=chosen), tuple(sorted(overflowing))


def _results(node: ir.Node) -> set[str]:
    """Name a product's result, before and after its bias."""
    value = node.outputs[0]
    after = [use.node.outputs[0] for use in value.uses() if use.node.op_type == "Add"]
    return {v.name or "" for v in (value, *after)}
