"""When a candidate does not agree: is it the images it was given, or the order of its classes?

Each suspect is a mistake that people make between training and production. One that makes the
candidate agree is named as the likely cause; none of them changes the verdict.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.check.compare import Comparison
from msn_export.check.verify import Reference, Runner, run_reference
from msn_export.spec import Head, InputKind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from msn_export.check.gate import Gate
    from msn_export.check.sample import Sample

IMAGES = 4  # enough to tell: a wrong suspect misses the gate by orders of magnitude


def find_cause(
    runner: Runner, reference: Reference, stem: InputKind, gate: Gate, *, fixed: int | None = None
) -> str | None:
    """Name the mistake that explains a disagreement, as a sentence; None if none of them does."""
    kept = {name: output[:IMAGES] for name, output in reference.outputs.items()}
    few = Reference(kept, _first(reference.sample), reference.name)
    have = run_reference(runner, few.sample, stem, fixed=fixed).outputs
    if all(_agrees(gate, few.outputs[name], have[name]) for name in few.outputs):
        return None  # it is the others that disagree: on these any mistake would be an alibi
    cause = _shifted(few, have, gate)
    if cause is not None:
        return cause
    for cause, sample in _other_pixels(few.sample, stem):
        got = run_reference(runner, sample, stem, fixed=fixed).outputs
        if all(_agrees(gate, few.outputs[name], got[name]) for name in few.outputs):
            return cause
    return None


def _first(sample: Sample) -> Sample:
    return replace(sample, pixels=sample.pixels[:IMAGES], names=sample.names[:IMAGES])


def _agrees(gate: Gate, reference: np.ndarray, candidate: np.ndarray) -> bool:
    comparison = Comparison()
    comparison.add(reference, candidate)
    return not gate.failures(comparison.agreement())


def _shifted(few: Reference, have: Mapping[str, NDArray[Any]], gate: Gate) -> str | None:
    name = Head.LOGITS.output
    for shift in (1, -1) if name in few.outputs else ():
        if _agrees(gate, few.outputs[name], np.roll(have[name], -shift, axis=-1)):
            return f"the candidate's classes are the reference's shifted by {shift:+d}"
    return None


def _other_pixels(sample: Sample, stem: InputKind) -> Iterator[tuple[str, Sample]]:
    made = sample.preprocessing
    reversed_pixels = np.ascontiguousarray(sample.pixels[..., ::-1])
    # with the statistics of each channel (planes reversed after normalising), and without
    for statistics in (made, replace(made, mean=made.mean[::-1], std=made.std[::-1])):
        yield (
            "the candidate agrees when it is given BGR: it was made for channels in that order",
            replace(sample, pixels=reversed_pixels, preprocessing=statistics),
        )
    if stem is InputKind.UINT8:
        return  # its normalisation is inside the graph
    none, half = (0.0,) * made.channels, (0.5,) * made.channels
    one = (1.0,) * made.channels
    for what, scale, mean, std in (
        ("pixels from 0 to 255, not normalised", 1.0, none, one),
        ("pixels from 0 to 1, not normalised", 1 / 255, none, one),
        ("pixels from -1 to 1", 1 / 255, half, half),
    ):
        other = replace(made, scale=scale, mean=mean, std=std)
        if other != made:
            yield (
                f"the candidate agrees when it is given {what}: it was made for those",
                replace(sample, preprocessing=other),
            )
