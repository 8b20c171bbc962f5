"""Diagnosis of two models: the block where they part, and the mistake that explains it.

A block's error is its own where the candidate's block is given the reference's stream: nothing that
earlier blocks did wrong comes in. What the precision costs is measured by the same means: the
reference, put into that precision, takes the candidate's place.

Each suspect is a mistake that people make between training and production. One that makes the
candidate agree is named as the likely cause; none of them changes the verdict.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from msn_export.metrics.evaluate import OutputsOf, Reference, run_reference
from msn_export.metrics.metrics import Comparison
from msn_export.spec import Head, InputFormat

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Tensors = Mapping[str, NDArray[Any]]
    from msn_export.metrics.evaluate import Sample
    from msn_export.metrics.tolerances import Gate
    from msn_export.preprocessing import Preprocessing


FP16_LARGEST = 65504.0  # IEEE 754 binary16
BRANCHES = ("attention", "MLP")  # what a block adds to the stream, as ``graph.inside`` names it


class StreamLike(Protocol):
    """A model that shows tensors it computes on its way, named alike whatever it runs in.

    ``peaks`` gives, by stage, the largest absolute value of any tensor so far and that tensor's
    name; it is empty where only the shown tensors are known.
    """

    name: str

    @property
    def peaks(self) -> Mapping[str, tuple[float, str]]:
        """The largest values so far."""

    def __call__(self, images: NDArray[Any], given: Tensors | None = None, /) -> Tensors:
        """Run a batch in the model's own input type; the shown tensors, [b, ...] each.

        ``given`` takes the place of what the model computes for the stages it names.
        """

    def close(self) -> None:
        """Free what it runs in."""


@dataclass(frozen=True, slots=True)
class TensorDrift:
    """Agreement of one tensor of the candidate with the reference's, over all images.

    ``relative`` is the root mean square of the differences over that of the reference; ``largest``
    the reference's largest absolute value. ``first_token`` says that only [CLS] was compared, for
    one side computes no other.
    """

    name: str
    cosine_min: float
    cosine_median: float
    relative: float
    max_abs: float
    largest: float
    nan: int
    inf: int
    first_token: bool = False


@dataclass(frozen=True, slots=True)
class OwnError:
    """The relative error a stage makes by itself, in the tensor where it is largest for its cost.

    ``cost`` is what the candidate's precision costs there, None where nothing could be measured;
    above ``allowed`` the stage has parted.
    """

    tensor: str
    relative: float
    cost: float | None
    allowed: float

    @property
    def times(self) -> float | None:
        if self.cost is None:
            return None
        return self.relative / self.cost if self.cost > 0 else math.inf if self.relative else 0.0

    @property
    def inside(self) -> bool:
        """Check whether the error is allowed; NaN never is."""
        return self.relative <= self.allowed


@dataclass(frozen=True, slots=True)
class StageDrift:
    """A stage of the stream.

    ``tensor`` is the candidate's running by itself, with all that earlier stages did; ``own`` this
    stage's error alone, None where its input could not be matched. ``peak`` is the largest absolute
    value of any tensor that the stage computes in the reference, ``headroom`` how often it fits
    below fp16's largest number. ``reasons`` say how the stage is another one, whatever its numbers.
    """

    tensor: TensorDrift
    own: OwnError | None
    peak: float
    peak_tensor: str
    reasons: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The stage: ``patch embedding``, ``block 3`` or an output's name."""
        return self.tensor.name

    @property
    def inside(self) -> bool:
        """Check whether the stage does what the reference's does."""
        return not self.reasons and (self.own is None or self.own.inside)

    @property
    def headroom(self) -> float:
        return FP16_LARGEST / self.peak if self.peak else math.inf


@dataclass(slots=True)
class TensorComparison:
    """Gathers one tensor's figures, batch after batch."""

    name: str
    comparison: Comparison = field(default_factory=Comparison)
    largest: float = 0.0
    first_token: bool = False

    def add(self, reference: NDArray[Any], candidate: NDArray[Any]) -> None:
        """Compare a batch; where one side has the [CLS] token alone, only that."""
        if reference.shape != candidate.shape and first_tokens(reference, candidate):
            self.first_token = True
            reference, candidate = reference[:, :1], candidate[:, :1]
        self.comparison.add(reference, candidate)
        self.largest = float(np.maximum(self.largest, np.abs(reference).max()))

    @property
    def compared(self) -> bool:
        return bool(self.comparison.cosines)

    def drift(self) -> TensorDrift:
        agreement = self.comparison.agreement()
        return TensorDrift(
            self.name,
            cosine_min=agreement.cosine_min,
            cosine_median=agreement.cosine_median,
            relative=agreement.relative,
            max_abs=agreement.max_abs,
            largest=self.largest,
            nan=agreement.nan,
            inf=agreement.inf,
            first_token=self.first_token,
        )


class Gathered(dict[str, TensorComparison]):
    """Comparisons by tensor, batch after batch; a tensor of another shape is left out."""

    def add(self, reference: Tensors, candidate: Tensors, names: Iterable[str]) -> None:
        """Compare the tensors called ``names`` that both have, in one shape or at [CLS]."""
        for name in names:
            if name in reference and name in candidate:
                want, have = reference[name], candidate[name]
                if want.shape == have.shape or first_tokens(want, have):
                    self.setdefault(name, TensorComparison(name)).add(want, have)

    def relative(self) -> dict[str, float]:
        return {name: comparison.drift().relative for name, comparison in self.items()}


def first_tokens(reference: NDArray[Any], candidate: NDArray[Any]) -> bool:
    """Check whether two tensors [b, n, dim] differ in that one holds the first token alone."""
    left, right = reference.shape, candidate.shape
    return len(left) == len(right) == 3 and left[::2] == right[::2] and 1 in {left[1], right[1]}


def marks(tensors: Tensors, stages: Sequence[str], before: Tensors) -> dict[str, NDArray[Any]]:
    """Give the tensors that a stage's own error is measured in, by name.

    Of a block: what it adds to the stream, and attention's and the MLP's results, which half
    precision has not yet rounded to the stream's size. Of the patch embedding and of outputs: the
    tensor itself.

    Args:
        tensors: what a model shows.
        stages: in order, blocks each behind the stage it reads.
        before: the stream that the blocks were given: the reference's, or the model's own.
    """
    found: dict[str, NDArray[Any]] = {}
    for index, stage in enumerate(stages):
        if stage not in tensors:
            continue
        output = np.asarray(tensors[stage], np.float64)
        if is_block(stage) and index and stages[index - 1] in before:
            read = np.asarray(before[stages[index - 1]], np.float64)
            # a last block that computes [CLS] alone still reads all tokens
            found[stage] = (
                output - read[:, : output.shape[1]] if output.ndim == read.ndim else output
            )
        else:
            found[stage] = output
        for branch in BRANCHES:
            name = f"{stage} {branch}"
            if name in tensors:
                found[name] = tensors[name]
    return found


def is_block(stage: str) -> bool:
    return stage.startswith("block ")


def own_errors(
    errors: Mapping[str, float],
    costs: Mapping[str, float] | None,
    stages: Iterable[str],
    *,
    times: float,
    tolerance: float | None = None,
) -> dict[str, OwnError]:
    """Judge each stage by the tensor whose error is the most beside its cost.

    Args:
        errors: the relative errors of ``marks``.
        costs: what the precision costs each; None where it could not be measured: then the median
            of the other blocks' errors takes its place, where there are two or more.
        stages: what to judge.
        times: how often its cost an error may be.
        tolerance: the largest error allowed instead, of a stage's result.
    """
    found = {}
    for stage in stages:
        named = [name for name in (stage, *(f"{stage} {b}" for b in BRANCHES)) if name in errors]
        if not named:
            continue
        candidates = []
        for name in named:
            cost = _others(errors, name) if costs is None else costs.get(name)
            allowed = math.inf if cost is None else times * cost
            candidates.append(OwnError(name, errors[name], cost, allowed))
        if tolerance is not None:
            found[stage] = OwnError(stage, errors[stage], candidates[0].cost, tolerance)
        else:
            found[stage] = max(candidates, key=_weight)
    return found


def _weight(own: OwnError) -> float:
    """Order errors; what is no number comes first."""
    weight = own.relative if own.times is None else own.times
    return math.inf if math.isnan(weight) else weight


def _others(errors: Mapping[str, float], name: str) -> float | None:
    """The median error of the same tensor in the other blocks."""
    words = name.split()
    if not is_block(name):
        return None
    others = [
        error
        for other, error in errors.items()
        if other != name and is_block(other) and other.split()[2:] == words[2:]
    ]
    return statistics.median(others) if len(others) > 1 else None


def stages_of(
    gathered: Mapping[str, TensorComparison],
    peaks: Mapping[str, tuple[float, str]],
    own: Mapping[str, OwnError],
    reasons: Mapping[str, tuple[str, ...]],
    names: Iterable[str],
) -> tuple[StageDrift, ...]:
    """Put the stages in order; one that could not be compared has no numbers, only reasons."""
    stages: list[StageDrift] = []
    for name in names:
        why = tuple(reasons.get(name, ()))
        if name in gathered:
            tensor = gathered[name].drift()
        elif why:
            tensor = TensorDrift(name, math.nan, math.nan, math.nan, math.nan, math.nan, 0, 0)
        else:
            continue
        peak, peak_tensor = peaks.get(name, (tensor.largest, name))
        peak = float(np.maximum(peak, tensor.largest)) if name in gathered else peak
        stages.append(StageDrift(tensor, own.get(name), peak, peak_tensor, why))
    return tuple(stages)


def first_past(stages: Iterable[StageDrift]) -> StageDrift | None:
    """Find the first stage that does not do what the reference's does."""
    return next((stage for stage in stages if not stage.inside), None)


def most_of(stages: Iterable[StageDrift]) -> StageDrift | None:
    """Find the block whose own error is the most beside its cost."""
    blocks = [stage for stage in stages if is_block(stage.name) and stage.own is not None]
    return max(blocks, key=lambda stage: _weight(stage.own), default=None)  # type: ignore[arg-type]


_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers writes where nobody named the classes


def label_faults(reference: Sequence[str], candidate: Sequence[str]) -> list[str]:
    """List contradictions of class names; classes without names contradict nothing."""
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
    few = reference.sample.first(IMAGES)
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
    preprocessing = sample.preprocessing
    # with the statistics of each channel (planes reversed after normalising), and without
    for normalised in (
        preprocessing,
        replace(preprocessing, mean=preprocessing.mean[::-1], std=preprocessing.std[::-1]),
    ):
        yield (
            "the candidate agrees when it is given BGR: it was made for channels in that order",
            partial(_reversed, statistics=normalised),
        )
    if input_format is InputFormat.UINT8:
        return  # its normalisation is inside the graph
    none, half = (0.0,) * preprocessing.channels, (0.5,) * preprocessing.channels
    one = (1.0,) * preprocessing.channels
    for what, scale, mean, std in (
        ("pixels from 0 to 255, not normalised", 1.0, none, one),
        ("pixels from 0 to 1, not normalised", 1 / 255, none, one),
        ("pixels from -1 to 1", 1 / 255, half, half),
    ):
        other = replace(preprocessing, scale=scale, mean=mean, std=std)
        if other != preprocessing:
            yield (
                f"the candidate agrees when it is given {what}: it was made for those",
                partial(replace, preprocessing=other),
            )


def _reversed(sample: Sample, statistics: Preprocessing) -> Sample:
    pixels = np.ascontiguousarray(sample.pixels[..., ::-1])
    return replace(sample, pixels=pixels, preprocessing=statistics)
