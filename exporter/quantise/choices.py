"""Choose how a graph is quantised, by what each choice costs its embedding on a few images."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.calibration.collect import Watch, channel_maxima, histograms, require_finite
from msn_export.calibration.observers import Observer
from msn_export.calibration.plan import Plan
from msn_export.calibration.ranges import SmoothingRecord
from msn_export.calibration.smooth import factors, find_seams, fold
from msn_export.check.compare import Comparison
from msn_export.check.gate import Gate
from msn_export.errors import GraphError
from msn_export.progress import Progress

# Strengths that --smooth auto tries beside none; SmoothQuant's own default is 0.5 (arXiv
# 2211.10438, section 5.1).
STRENGTHS = (0.25, 0.5, 0.75)
# How much less error than without it a strength must leave to be taken. Without outliers, the share
# of the error that a strength leaves has a mean of 1 and a deviation of 0.05 from one 16 images to
# the next, 0.91 at the lowest; where outliers were planted int8 leaves 0.05
# (docs/quantization.md, trained digits).
GAIN = 0.1
# Images that a choice is measured on: each costs a run of the whole graph.
PROBED = 16


@dataclass(frozen=True, slots=True)
class Probe:
    """A few calibration images [b, ...] in the graph's own input type, and its outputs for them."""

    images: NDArray[Any]
    names: tuple[str, ...]
    reference: Mapping[str, NDArray[np.float32]]
    stage: Path

    @classmethod
    def of(
        cls, model: ir.Model, images: NDArray[Any], names: Sequence[str], stage: Path
    ) -> "Probe":
        """Run the fp32 graph.

        Raises:
            GraphError: a value is not finite; the tensor and the image are named.
        """
        reference = _outputs(model, images, stage)
        require_finite(model, reference, names, lambda at: images[at : at + 1], stage)
        return cls(images, tuple(names), reference, stage)

    def batches(self, size: int) -> Iterator[tuple[NDArray[Any], Sequence[str]]]:
        """Deal the images out again."""
        for start in range(0, len(self.images), size):
            yield self.images[start : start + size], self.names[start : start + size]

    def watch(self, model: ir.Model, names: Sequence[str]) -> Watch:
        """Open a session that shows some values of a graph."""
        return Watch(model, names, self.stage)

    def error(self, model: ir.Model) -> float:
        """Measure a candidate's relative error (L2) over all images, of its worst output."""
        outputs = _outputs(model, self.images, self.stage)
        errors = []
        for name, want in self.reference.items():
            difference = np.square(outputs[name].astype(np.float64) - want).sum()
            errors.append(float(np.sqrt(difference / np.square(want, dtype=np.float64).sum())))
        return float(np.nan_to_num(np.max(errors), nan=np.inf))

    def passes(self, model: ir.Model, gate: Gate) -> bool:
        """Whether a candidate reaches ``gate`` on these images."""
        outputs = _outputs(model, self.images, self.stage)
        for name, want in self.reference.items():
            comparison = Comparison()
            comparison.add(want, outputs[name])
            if gate.failures(comparison.agreement()):
                return False
        return True


def _outputs(model: ir.Model, images: NDArray[Any], stage: Path) -> dict[str, NDArray[np.float32]]:
    watch = Watch(model, [value.name or "" for value in model.graph.outputs], stage)
    parts = [watch(images[at : at + watch.batch]) for at in range(0, len(images), watch.batch)]
    return {name: np.concatenate([part[name] for part in parts]) for name in watch.names}


def smooth(
    plan: Plan, strength: float | None, probe: Probe, observer: Observer
) -> tuple[Plan, SmoothingRecord]:
    """Smooth a plan's graph; ``strength`` None takes the best of ``STRENGTHS``, or none.

    None where the best leaves no ``GAIN`` less error: what is no better needs no changed weights.

    Raises:
        GraphError: a value is not finite.
    """
    seams = find_seams(plan.model, plan.projections)
    watch = probe.watch(plan.model, [seam.name for seam in seams])
    maxima = channel_maxima(watch, probe.batches(watch.batch)) if seams else {}
    tried = {"off": (plan, SmoothingRecord())}
    for choice in STRENGTHS if strength is None else (strength,):
        exponents = {
            seam.name: tuple(
                int(power)
                for power in np.log2(factors(plan.model, seam, maxima[seam.name], choice))
            )
            for seam in seams
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
    """Smooth a plan's graph as a record says.

    Raises:
        GraphError: the record is of another graph.
    """
    if not record.exponents:
        return plan
    model = plan.model.clone()
    seams = {seam.name: seam for seam in find_seams(model, plan.projections)}
    for name, exponents in record.exponents.items():
        if name not in seams:
            raise GraphError(f"{name!r} cannot be smoothed here; leave --ranges out")
        fold(model, seams[name], np.exp2(np.asarray(exponents, np.float32)))
    return replace(plan, model=model)


def _on(probe: Probe, plan: Plan, observer: Observer) -> ir.Model:
    """Quantise all of a plan, its ranges taken from the probe's images alone."""
    watch = probe.watch(plan.model, list(plan.watched))
    seen = histograms(watch, probe.batches(watch.batch))
    return plan.measured(seen, observer).quantised()


@dataclass(frozen=True, slots=True)
class Choice:
    """Blocks that stay as they are, and each block's error where that had to be measured."""

    kept: tuple[int, ...]
    drift: Mapping[int, float]


EVERYTHING = Choice((), {})


def choices(plan: Plan, probe: Probe, gate: Gate, progress: Progress) -> Iterator[Choice]:
    """Give the choices that reach ``gate`` on the probe's images, the fewest blocks kept first.

    Only when quantising everything does not reach it are the blocks measured, one quantised at a
    time; they are kept in the order of the error that each brings alone. At least one block is
    quantised.
    """
    if probe.passes(plan.quantised(), gate):
        yield EVERYTHING
    drift = {}
    blocks = range(plan.depth)
    for block in blocks:
        progress.advance(block, plan.depth, f"block {block}")
        drift[block] = probe.error(plan.quantised([other for other in blocks if other != block]))
    order = sorted(blocks, key=lambda block: -drift[block])
    for count in range(1, plan.depth):
        kept = tuple(sorted(order[:count]))
        if probe.passes(plan.quantised(kept), gate):
            yield Choice(kept, drift)
