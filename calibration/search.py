"""Ranges from images or a file, and the choice of how a graph is quantised."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.artifact import GraphFile, max_batch_of
from msn_export.calibration import ranges as ranges_file
from msn_export.calibration.images import Decoded, Pictures
from msn_export.calibration.job import AUTO, OFF, CalibrateJob
from msn_export.calibration.plan import Plan, corrections
from msn_export.calibration.ranges import (
    Histogram,
    ImagesRecord,
    Ranges,
    Seen,
    SmoothingRecord,
    TensorRange,
    Watch,
    histograms,
    require_finite,
)
from msn_export.calibration.smoothing import ActivationSample, replay, smooth
from msn_export.errors import GraphError
from msn_export.graph.opset import raise_opset
from msn_export.graph.precision import choose, floats_of
from msn_export.manifest import sha256_of
from msn_export.metrics.evaluate import Sample
from msn_export.metrics.metrics import Comparison
from msn_export.metrics.tolerances import HEADROOM, Gate
from msn_export.mixed_precision import MEASURED, choose_fp32_islands
from msn_export.progress import Progress
from msn_export.spec import Dtype

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
        cls,
        model: ir.Model,
        images: NDArray[Any],
        names: Sequence[str],
        stage: Path,
        watch: Watch | None = None,
        receive: Callable[[Seen], None] | None = None,
    ) -> "SensitivitySample":
        """Run the fp32 graph; a ``watch`` may see more than its outputs, for ``receive``."""
        outputs = _output_names(model)
        watch = watch or Watch(model, outputs, stage)
        parts = []
        for at in range(0, len(images), watch.batch):
            few, labels = images[at : at + watch.batch], names[at : at + watch.batch]
            seen = watch(few)
            require_finite(model, seen, labels, partial(_only, few), stage)
            if receive is not None:
                receive(seen)
            parts.append({name: seen[name] for name in outputs})
        reference = {name: np.concatenate([part[name] for part in parts]) for name in outputs}
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


def _output_names(model: ir.Model) -> list[str]:
    return [value.name or "" for value in model.graph.outputs]


def _only(images: NDArray[Any], index: int) -> NDArray[Any]:
    return images[index : index + 1]


def _outputs(model: ir.Model, images: NDArray[Any], stage: Path) -> dict[str, NDArray[np.float32]]:
    watch = Watch(model, _output_names(model), stage)
    parts = [watch(images[at : at + watch.batch]) for at in range(0, len(images), watch.batch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in watch.names}


@dataclass(frozen=True, slots=True)
class FirstRun:
    """One run of a plan's graph on the first images.

    ``maxima``: the largest absolute value of each float of the graph, where asked for.
    """

    probe: SensitivitySample
    histograms: dict[str, Histogram]
    activations: ActivationSample
    maxima: Mapping[str, float]

    @classmethod
    def of(
        cls, plan: Plan, images: NDArray[Any], names: Sequence[str], stage: Path, *, maxima: bool
    ) -> "FirstRun":
        found = {name: Histogram() for name in plan.watched}
        activations = ActivationSample.of(plan)
        wanted = [*activations.names, *plan.watched, *_output_names(plan.model)]
        watch = Watch(plan.model, wanted, stage, maxima=maxima)

        def receive(seen: Seen) -> None:
            activations.add(seen)
            for name, histogram in found.items():
                histogram.add(seen[name])

        probe = SensitivitySample.of(plan.model, images, names, stage, watch, receive)
        return cls(probe, found, activations, watch.maxima)


@dataclass(frozen=True, slots=True)
class Exclusion:
    """Blocks that stay as they are, and each block's error where that had to be measured."""

    kept: tuple[int, ...]
    drift: Mapping[int, float]


EVERYTHING = Exclusion((), {})


def exclusions(
    plan: Plan, probe: SensitivitySample, gate: Gate, progress: Progress
) -> Iterator[tuple[Exclusion, ir.Model]]:
    """Yield the exclusions that reach ``gate`` on the probe's images, the fewest blocks kept first.

    With each comes the fp32 graph with its Q/DQ. Only when quantising everything does not reach it
    are the blocks measured, one quantised at a time; they are kept in the order of the error that
    each brings alone. At least one block is quantised.
    """
    if not probe.failures(model := plan.quantised(), gate):
        yield EVERYTHING, model
    drift = {}
    blocks = range(plan.depth)
    for block in blocks:
        progress.advance(block, plan.depth, f"block {block}")
        drift[block] = probe.error(plan.quantised([other for other in blocks if other != block]))
    order = sorted(blocks, key=lambda block: -drift[block])
    for count in range(1, plan.depth):
        kept = tuple(sorted(order[:count]))
        if not probe.failures(model := plan.quantised(kept), gate):
            yield Exclusion(kept, drift), model


@dataclass(frozen=True, slots=True)
class CollectedRanges:
    """A plan with its ranges and islands.

    ``unquantised`` is its graph without Q/DQ, fp32, to be typed as the rest is.
    ``islands`` stay fp32, each with its largest absolute value; ``overflowing`` are projections
    that stay unquantised because they write one.
    """

    plan: Plan
    unquantised: ir.Model
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
    # refuses now what it would refuse after the ranges were taken
    unquantised = plan.unquantised() if job.rest is Dtype.FP32 else None
    chunks = (pictures if given is None else pictures.first(PROBED)).decode(PROBED)
    pixels, names = next(chunks)
    sample = Sample(
        pixels, names, str(job.images), source.preprocessing, max_batch=max_batch_of(plan.model)
    )
    images = sample.preprocess(range(len(sample)), source.input_format)
    maxima: Mapping[str, float] = {}
    if given is not None and job.ranges is not None:
        with progress.step("run the fp32 graph on a few images"):
            probe = SensitivitySample.of(plan.model, images, names, stage)
        plan, ranges = replay(plan, given.smoothing), given
        seen = given.histograms(plan.watched, job.ranges)
    else:
        with progress.step("run the fp32 graph on a few images"):
            first = FirstRun.of(plan, images, names, stage, maxima=job.rest is Dtype.FP16)
        probe, seen = first.probe, first.histograms
        plan, smoothing = _smooth(job, plan, first.activations, progress)
        if smoothing.strength is None:
            maxima = first.maxima
        else:
            chunks, seen = chain([(pixels, names)], chunks), {}
        seen = _observe(plan, pictures, chunks, seen, stage, progress)
        ranges = _ranges(job, source, pictures, smoothing, seen)
    plan = plan.measured(seen, job.observer)
    islands: dict[str, float] = {}
    if unquantised is None:
        with progress.step("measure what overflows"):
            unquantised = plan.unquantised()
            floats = floats_of(unquantised)
            if maxima.keys() >= set(floats):
                peaks = {name: maxima[name] for name in floats}
                islands = choose(peaks, job.rest, headroom=HEADROOM)
            else:
                islands = choose_fp32_islands(
                    unquantised, MEASURED, job.rest, sample, source.input_format, stage
                )
    plan, overflowing = _without_islands(plan, islands)
    if job.bias_correction:
        with progress.step("measure biases"):
            plan = _corrected(plan, probe)
    return CollectedRanges(plan, unquantised, ranges, probe, islands, overflowing)


def _smooth(
    job: CalibrateJob, plan: Plan, activations: ActivationSample, progress: Progress
) -> tuple[Plan, SmoothingRecord]:
    if job.smooth == OFF:
        return plan, SmoothingRecord()
    strength = None if job.smooth in {None, AUTO} else float(job.smooth or 0)
    title = "choose a smoothing" if strength is None else f"smooth at {strength:g}"
    with progress.step(title):
        return smooth(plan, strength, activations, job.observer)


def _observe(
    plan: Plan,
    pictures: Pictures,
    decoded: Iterator[Decoded],
    seen: dict[str, Histogram],
    stage: Path,
    progress: Progress,
) -> dict[str, Histogram]:
    """Count the values of the pictures that are left, on in the histograms ``seen``."""
    chunk = next(decoded, None)
    if chunk is None:
        return seen
    of, before = min(pictures.limit, len(pictures.paths)), PROBED if seen else 0
    with progress.step(f"take ranges on up to {of} images"):
        watch = Watch(plan.model, list(plan.watched), stage)
        return histograms(
            watch,
            pictures.batches(watch.batch, chain([chunk], decoded)),
            lambda count: progress.advance(before + count, of, f"{before + count} images"),
            seen or None,
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
