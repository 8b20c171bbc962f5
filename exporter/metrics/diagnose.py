"""When a candidate does not agree: is it the images it was given, or the order of its classes?

Each suspect is a mistake that people make between training and production. One that makes the
candidate agree is named as the likely cause; none of them changes the verdict.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.metrics.evaluate import OutputsOf, Reference, run_reference
from msn_export.metrics.metrics import Comparison
from msn_export.spec import Head, InputFormat

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from msn_export.metrics.samples import Sample
    from msn_export.metrics.tolerances import Gate
    from msn_export.preprocessing import Preprocessing


_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers writes where nobody named the classes


def label_faults(reference: Sequence[str], candidate: Sequence[str]) -> list[str]:
    """Say where class names contradict each other; classes without names contradict nothing."""
    if not _named(reference) or not _named(candidate) or tuple(reference) == tuple(candidate):
        return []
    if len(reference) != len(candidate):
        return [f"the reference names {len(reference)} classes, the candidate {len(candidate)}"]
    if list(candidate[1:]) == list(reference[:-1]):
        return ["the candidate's class names are the reference's shifted by +1"]
    if list(candidate[:-1]) == list(reference[1:]):
        return ["the candidate's class names are the reference's shifted by -1"]
    wrong = [i for i, pair in enumerate(zip(reference, candidate, strict=True)) if len({*pair}) > 1]
    first = wrong[0]
    return [
        f"{len(wrong)} class names differ: class {first} is {candidate[first]!r}, the reference's "
        f"{reference[first]!r}"
    ]


def _named(labels: Sequence[str]) -> bool:
    return bool(labels) and not all(_UNNAMED.fullmatch(label) for label in labels)


IMAGES = 4  # enough to tell: a wrong suspect misses the gate by orders of magnitude


def diagnose(
    runner: OutputsOf,
    reference: Reference,
    input_format: InputFormat,
    gate: Gate,
    *,
    fixed: int | None = None,
) -> str | None:
    """Name the mistake that explains a disagreement, as a sentence; None if none of them does.

    One explains it where undoing it makes every output of every picture agree. NaN and infinite
    values have no such cause.
    """
    few = _first(reference)
    have = run_reference(runner, few.sample, input_format, fixed=fixed).outputs
    if not all(np.isfinite(output).all() for output in have.values()):
        return None
    if _agrees(gate, few, have):
        return None  # it is the others that disagree: on these any mistake would be an alibi
    for shift in (1, -1) if Head.LOGITS.output in few.outputs else ():
        if _agrees(gate, few, _shifted(have, shift)):
            got = run_reference(runner, reference.sample, input_format, fixed=fixed).outputs
            if _agrees(gate, reference, _shifted(got, shift)):
                return f"the candidate's classes are the reference's shifted by {shift:+d}"
    for cause, change in _other_pixels(reference.sample, input_format):
        if all(
            _agrees(
                gate,
                some,
                run_reference(runner, change(some.sample), input_format, fixed=fixed).outputs,
            )
            for some in (few, reference)
        ):
            return cause
    return None


def _first(reference: Reference) -> Reference:
    sample = reference.sample
    few = replace(sample, pixels=sample.pixels[:IMAGES], names=sample.names[:IMAGES])
    kept = {name: output[:IMAGES] for name, output in reference.outputs.items()}
    exact = {name: output[:IMAGES] for name, output in reference.exact.items()}
    return replace(reference, sample=few, outputs=kept, exact=exact)


def _agrees(gate: Gate, reference: Reference, have: Mapping[str, NDArray[Any]]) -> bool:
    images = range(len(reference.sample))
    for name in reference.outputs:
        comparison = Comparison()
        wanted, exact = reference.rows(name, images)
        comparison.add(wanted, have[name], exact)
        if gate.failures(comparison.agreement(), reference.limit(name)):
            return False
    return True


def _shifted(have: Mapping[str, NDArray[Any]], shift: int) -> dict[str, NDArray[Any]]:
    name = Head.LOGITS.output
    return {**have, name: np.roll(have[name], -shift, axis=-1)}


def _other_pixels(
    sample: Sample, input_format: InputFormat
) -> Iterator[tuple[str, Callable[[Sample], Sample]]]:
    """Give other ways to make the pixels, each with the sentence that names it."""
    made = sample.preprocessing
    # with the statistics of each channel (planes reversed after normalising), and without
    for statistics in (made, replace(made, mean=made.mean[::-1], std=made.std[::-1])):
        yield (
            "the candidate agrees when it is given BGR: it was made for channels in that order",
            partial(_reversed, statistics=statistics),
        )
    if input_format is InputFormat.UINT8:
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
                partial(replace, preprocessing=other),
            )


def _reversed(sample: Sample, statistics: Preprocessing) -> Sample:
    pixels = np.ascontiguousarray(sample.pixels[..., ::-1])
    return replace(sample, pixels=pixels, preprocessing=statistics)
