"""Where two models part: the residual stream compared after each block, on the same images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from msn_export.check.compare import Comparison
from msn_export.errors import ToleranceError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FP16_LARGEST = 65504.0  # IEEE 754 binary16


class Stream(Protocol):
    """A model that shows tensors it computes on its way, named alike whatever it runs in.

    ``peaks`` gives, by stage, the largest absolute value of any tensor so far and that tensor's
    name; it is empty where only the shown tensors are known.
    """

    name: str

    @property
    def peaks(self) -> Mapping[str, tuple[float, str]]:
        """The largest values so far."""

    def __call__(self, images: NDArray[Any], /) -> Mapping[str, NDArray[Any]]:
        """Run a batch in the model's own input type; the shown tensors, [b, ...] each."""

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
class StageDrift:
    """A stage of the stream.

    ``added`` is what its relative error has beyond the stage before, ``allowed`` what it may be;
    ``peak`` is the largest absolute value of any tensor that the stage computes in the reference,
    ``headroom`` how often it fits below fp16's largest number.
    """

    tensor: TensorDrift
    added: float
    allowed: float
    peak: float
    peak_tensor: str

    @property
    def name(self) -> str:
        """The stage: ``patch embedding``, ``block 3`` or an output's name."""
        return self.tensor.name

    @property
    def inside(self) -> bool:
        """Whether the relative error is allowed; NaN never is."""
        return self.tensor.relative <= self.allowed

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
        """Compare a batch; where one side has the [CLS] token alone, only that.

        Raises:
            ToleranceError: the shapes differ otherwise.
        """
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
        """Sum up.

        Raises:
            ToleranceError: nothing was added.
        """
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


def first_tokens(reference: NDArray[Any], candidate: NDArray[Any]) -> bool:
    """Whether two tensors [b, n, dim] differ in that one holds the first token alone."""
    left, right = reference.shape, candidate.shape
    return len(left) == len(right) == 3 and left[::2] == right[::2] and 1 in {left[1], right[1]}


def compare_streams(
    reference: Stream,
    candidate: Stream,
    batches: Iterable[tuple[NDArray[Any], NDArray[Any]]],
    names: Iterable[str],
    *,
    strict: bool = True,
) -> dict[str, TensorComparison]:
    """Run both over batches and compare the tensors called ``names``.

    Args:
        reference: the one that is right.
        candidate: the one that is asked about.
        batches: the same images for each, in its own input type.
        names: shown by both.
        strict: False leaves out tensors that have another shape in each.

    Raises:
        ToleranceError: a tensor has another shape in each.
    """
    gathered = {name: TensorComparison(name) for name in names}
    for left, right in batches:
        want, have = reference(left), candidate(right)
        for name, comparison in gathered.items():
            try:
                comparison.add(want[name], have[name])
            except ToleranceError as error:
                if strict:
                    raise ToleranceError(f"{name}: {error}") from error
    return {name: comparison for name, comparison in gathered.items() if comparison.compared}


def stages_of(
    gathered: Mapping[str, TensorComparison],
    peaks: Mapping[str, tuple[float, str]],
    allowed: Mapping[str, float],
) -> tuple[StageDrift, ...]:
    """Put the compared stages in order, with what each adds to the error of the one before."""
    stages: list[StageDrift] = []
    before = 0.0
    for name, comparison in gathered.items():
        tensor = comparison.drift()
        peak, peak_tensor = peaks.get(name, (tensor.largest, name))
        square = tensor.relative**2 - before**2
        added = math.sqrt(square) if square > 0 else 0.0 if square <= 0 else math.nan
        peak = float(np.maximum(peak, tensor.largest))  # max() drops a NaN
        stages.append(StageDrift(tensor, added, allowed[name], peak, peak_tensor))
        before = tensor.relative
    return tuple(stages)


def first_past(stages: Iterable[StageDrift]) -> StageDrift | None:
    """Find the first stage whose relative error is not allowed."""
    return next((stage for stage in stages if not stage.inside), None)
