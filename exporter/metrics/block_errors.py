"""Where two models part: each block's own error, beside what the candidate's precision costs there.

A block's error is its own where the candidate's block is given the reference's stream: nothing that
earlier blocks did wrong comes in. What the precision costs is measured by the same means: the
reference, put into that precision, takes the candidate's place.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from msn_export.metrics.metrics import Comparison

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Tensors = Mapping[str, NDArray[Any]]


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
    """How one tensor of the candidate agrees with the reference's, over all images.

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
        """The error in multiples of its cost."""
        if self.cost is None:
            return None
        return self.relative / self.cost if self.cost > 0 else math.inf if self.relative else 0.0

    @property
    def inside(self) -> bool:
        """Whether the error is allowed; NaN never is."""
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
        """Whether the stage does what the reference's does."""
        return not self.reasons and (self.own is None or self.own.inside)

    @property
    def headroom(self) -> float:
        """65504 over the peak."""
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
        """Whether anything was added."""
        return bool(self.comparison.cosines)

    def drift(self) -> TensorDrift:
        """Sum up."""
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
        """Give each tensor's relative error."""
        return {name: comparison.drift().relative for name, comparison in self.items()}


def first_tokens(reference: NDArray[Any], candidate: NDArray[Any]) -> bool:
    """Whether two tensors [b, n, dim] differ in that one holds the first token alone."""
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
        made = np.asarray(tensors[stage], np.float64)
        if is_block(stage) and index and stages[index - 1] in before:
            read = np.asarray(before[stages[index - 1]], np.float64)
            # a last block that computes [CLS] alone still reads all tokens
            found[stage] = made - read[:, : made.shape[1]] if made.ndim == read.ndim else made
        else:
            found[stage] = made
        for branch in BRANCHES:
            name = f"{stage} {branch}"
            if name in tensors:
                found[name] = tensors[name]
    return found


def is_block(stage: str) -> bool:
    """Whether a stage is a block."""
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
        judged = []
        for name in named:
            cost = _others(errors, name) if costs is None else costs.get(name)
            allowed = math.inf if cost is None else times * cost
            judged.append(OwnError(name, errors[name], cost, allowed))
        if tolerance is not None:
            found[stage] = OwnError(stage, errors[stage], judged[0].cost, tolerance)
        else:
            found[stage] = max(judged, key=_weight)
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
