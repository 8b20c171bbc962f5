"""Ranges from images or a file, and the choice of how a graph is quantised."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.artifact import GraphFile, max_batch_of
from msn_export.calibration import ranges as ranges_file
from msn_export.calibration.images import Pictures
from msn_export.calibration.job import AUTO, OFF, CalibrateJob
from msn_export.calibration.plan import Plan, corrections
from msn_export.calibration.ranges import (
    Histogram,
    ImagesRecord,
    Ranges,
    SmoothingRecord,
    TensorRange,
    Watch,
    channel_maxima,
    histograms,
    require_finite,
)
from msn_export.calibration.smoothquant import factors, find_smoothing_sites, fold
from msn_export.errors import GraphError
from msn_export.graph.opset import raise_opset
from msn_export.manifest import sha256_of
from msn_export.metrics.evaluate import Sample
from msn_export.metrics.metrics import Comparison
from msn_export.metrics.tolerances import Gate
from msn_export.mixed_precision import MEASURED, choose_fp32_islands
from msn_export.progress import Progress
from msn_export.spec import Dtype, Observer

# Strengths that --smooth auto tries beside none; SmoothQuant's own default is 0.5 (arXiv
# 2211.10438, section 5.1).
STRENGTHS = (0.25, 0.5, 0.75)
# How much less error than without it a strength must leave to be taken. By the choice of the images
# alone one leaves 0.91 to 1.19 of the error; where int8 needs it 0.05 to 0.07
# (docs/quantization.md, planted outliers).
GAIN = 0.1
# Images that a choice is measured on: each costs a run of the whole graph.
PROBED = 16


@dataclass(frozen=True, slots=True)
class SensitivitySample:
    """A few calibration images [b, ...] in the graph's own input type, and its outputs for them."""

    images: NDArray[Any]
    names: tuple[str, ...]
    reference: Mapping[str, NDArray[np.float32]]
    stage: Path

    @classmethod
    def of(
        cls, model: ir.Model, images: NDArray[Any], names: Sequence[str], stage: Path
    ) -> "SensitivitySample":
        reference = _outputs(model, images, stage)
        require_finite(model, reference, names, lambda at: images[at : at + 1], stage)
        return cls(images, tuple(names), reference, stage)

    def batches(self, size: int) -> Iterator[tuple[NDArray[Any], Sequence[str]]]:
        for start in range(0, len(self.images), size):
            yield self.images[start : start + size], self.names[start : start + size]

    def error(self, model: ir.Model) -> float:
        """Relative error (L2) of a candidate over all images, of its worst output."""
        outputs = _outputs(model, self.images, self.stage)
        errors = []
        for name, want in self.reference.items():
            difference = np.square(outputs[name].astype(np.float64) - want).sum()
            errors.append(float(np.sqrt(difference / np.square(want, dtype=np.float64).sum())))
        return float(np.nan_to_num(np.max(errors), nan=np.inf))

    def failures(self, model: ir.Model, gate: Gate) -> list[str]:
        outputs = _outputs(model, self.images, self.stage)
        failures = []
        for name, want in self.reference.items():
            comparison = Comparison()
            comparison.add(want, outputs[name])
            failures += [f"output {name!r}: {why}" for why in gate.failures(comparison.agreement())]
        return failures


def _outputs(model: ir.Model, images: NDArray[Any], stage: Path) -> dict[str, NDArray[np.float32]]:
    watch = Watch(model, [value.name or "" for value in model.graph.outputs], stage)
    parts = [watch(images[at : at + watch.batch]) for at in range(0, len(images), watch.batch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in watch.names}


def smooth(
    plan: Plan, strength: float | None, probe: SensitivitySample, observer: Observer
) -> tuple[Plan, SmoothingRecord]:
    """Smooth a plan's graph; ``strength`` None takes the best of ``STRENGTHS``, or none.

    None where the best leaves no ``GAIN`` less error: what is no better needs no changed weights.
    """
    sites = find_smoothing_sites(plan.model, plan.projections)
    watch = Watch(plan.model, [site.name for site in sites], probe.stage)
    maxima = channel_maxima(watch, probe.batches(watch.batch)) if sites else {}
    tried = {"off": (plan, SmoothingRecord())}
    for choice in STRENGTHS if strength is None else (strength,):
        exponents = {
            site.name: tuple(
                int(power)
                for power in np.log2(factors(plan.model, site, maxima[site.name], choice))
            )
            for site in sites
        }
        record = SmoothingRecord(choice, exponents)
        tried[f"{choice:g}"] = (replay(plan, record), record)
    if strength is not None:
        return tried[f"{strength:g}"]
    errors = {name: probe.error(_on(probe, plan, observer)) for name, (plan, _) in tried.items()}
    best = min(errors, key=lambda name: errors[name])
    gained = errors[best] < (1 - GAIN) * errors["off"]
    chosen, record = tried[best if gained else "off"]
    return chosen, replace(record, errors=errors)


def replay(plan: Plan, record: SmoothingRecord) -> Plan:
    if not record.exponents:
        return plan
    model = plan.model.clone()
    sites = {site.name: site for site in find_smoothing_sites(model, plan.projections)}
    for name, exponents in record.exponents.items():
        if name not in sites:
            raise GraphError(f"{name!r} cannot be smoothed here; leave --ranges out")
        fold(model, sites[name], np.exp2(np.asarray(exponents, np.float32)))
    return replace(plan, model=model)


def _on(probe: SensitivitySample, plan: Plan, observer: Observer) -> ir.Model:
    """Quantise all of a plan, its ranges taken from the probe's images alone."""
    watch = Watch(plan.model, list(plan.watched), probe.stage)
    seen = histograms(watch, probe.batches(watch.batch))
    return plan.measured(seen, observer).quantised()


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Blocks that stay as they are, and each block's error where that had to be measured."""

    kept: tuple[int, ...]
    drift: Mapping[int, float]


EVERYTHING = Exclusion((), {})


def exclusions(
    plan: Plan, probe: SensitivitySample, gate: Gate, progress: Progress
) -> Iterator[Exclusion]:
    """Yield the exclusions that reach ``gate`` on the probe's images, the fewest blocks kept first.

    Only when quantising everything does not reach it are the blocks measured, one quantised at a
    time; they are kept in the order of the error that each brings alone. At least one block is
    quantised.
    """
    if not probe.failures(plan.quantised(), gate):
        yield EVERYTHING
    drift = {}
    blocks = range(plan.depth)
    for block in blocks:
        progress.advance(block, plan.depth, f"block {block}")
        drift[block] = probe.error(plan.quantised([other for other in blocks if other != block]))
    order = sorted(blocks, key=lambda block: -drift[block])
    for count in range(1, plan.depth):
        kept = tuple(sorted(order[:count]))
        if not probe.failures(plan.quantised(kept), gate):
            yield Exclusion(kept, drift)


@dataclass(frozen=True, slots=True)
class CollectedRanges:
    """A plan with its ranges and islands.

    ``islands`` stay fp32, each with its largest absolute value; ``overflowing`` are projections
    that stay unquantised because they write one.
    """

    plan: Plan
    ranges: Ranges
    probe: SensitivitySample
    islands: dict[str, float]
    overflowing: tuple[str, ...]


def given_ranges(job: CalibrateJob, source: GraphFile) -> Ranges | None:
    if job.ranges is None:
        return None
    given = ranges_file.read(job.ranges)
    given.require(sha256_of(source.path), source.preprocessing, job.ranges)
    taken = OFF if given.smoothing.strength is None else given.smoothing.strength
    if job.smooth not in {None, taken}:
        raise GraphError(
            f"--smooth {job.smooth}: --ranges {job.ranges} were taken after --smooth {taken}; "
            "leave one of the two out"
        )
    return given


def collect_ranges(
    job: CalibrateJob,
    source: GraphFile,
    pictures: Pictures,
    given: Ranges | None,
    stage: Path,
    progress: Progress,
) -> CollectedRanges:
    plan = Plan.of(
        raise_opset(source.graph), job.scheme, attention=job.quantize_attention, extra=job.extra
    )
    if job.rest is Dtype.FP32:
        plan.unquantised()  # refuses now what it would refuse after the ranges were taken
    pixels, names = next(pictures.first(PROBED).decode(PROBED))
    sample = Sample(
        pixels, names, str(job.images), source.preprocessing, max_batch=max_batch_of(plan.model)
    )
    with progress.step("run the fp32 graph on a few images"):
        images = sample.preprocess(range(len(sample)), source.input_format)
        probe = SensitivitySample.of(plan.model, images, names, stage)
    if given is not None and job.ranges is not None:
        plan, ranges = replay(plan, given.smoothing), given
        seen = given.histograms(plan.watched, job.ranges)
    else:
        plan, smoothing = _smooth(job, plan, probe, progress)
        seen = _observe(plan, pictures, stage, progress)
        ranges = _ranges(job, source, pictures, smoothing, seen)
    plan = plan.measured(seen, job.observer)
    islands = {}
    if job.rest is not Dtype.FP32:
        with progress.step("measure what overflows"):
            islands = choose_fp32_islands(
                plan.unquantised(), MEASURED, job.rest, sample, source.input_format, stage
            )
    plan, overflowing = _without_islands(plan, islands)
    if job.bias_correction:
        with progress.step("measure biases"):
            plan = _corrected(plan, probe)
    return CollectedRanges(plan, ranges, probe, islands, overflowing)


def _smooth(
    job: CalibrateJob, plan: Plan, probe: SensitivitySample, progress: Progress
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
            pictures.batches(watch.batch),
            lambda count: progress.advance(count, of, f"{count} images"),
        )


def _corrected(plan: Plan, probe: SensitivitySample) -> Plan:
    watch = Watch(plan.model, [p.x for p in plan.projections], probe.stage)
    errors = corrections(
        plan.model, plan.projections, plan.thresholds, plan.scheme, watch,
        probe.batches(watch.batch),
    )  # fmt: skip
    return replace(plan, corrections=errors)


def _ranges(
    job: CalibrateJob,
    source: GraphFile,
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
    value = node.outputs[0]
    after = [use.node.outputs[0] for use in value.uses() if use.node.op_type == "Add"]
    return {v.name or "" for v in (value, *after)}
