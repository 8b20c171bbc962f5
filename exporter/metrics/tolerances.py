"""The limits an artifact is held to, all in one place; docs/tolerances.md says where from.

A limit is measured where it can be: the reference is put into the candidate's precision and run on
the same images, and its error is what the precision costs there (msn_export.baseline). The numbers
below are for what has no such baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from msn_export.errors import SpecError, ToleranceError
from msn_export.metrics.metrics import Agreement, Errors
from msn_export.spec import Dtype

# A candidate may err this many times what its precision costs the reference. A fault of twice the
# clean error leaves sqrt(1 + 4) = 2.2 times it.
MARGIN = 1.5

# The same where the baseline rounds at other places than the candidate: an engine, and a graph of
# our own typing, which is held to a rounding that is written out apart from it. Two such fp16
# graphs differ by 0.5 to 1, bf16 ones by 0.9 to 1.5 (docs/tolerances.md).
ROUNDED_MARGIN = 2.5

# How many times the error of the reference with ranges of the check's own images an 8-bit candidate
# may err over all images together. Sound candidates reach 1.3, one 1.47; 1.84 where fewer than
# ENOUGH images were calibrated on.
RANGES_MARGIN = 1.5
FEW_RANGES_MARGIN = 2.0
ENOUGH = 24

# Single tokens vary more than anything else: the worst of thousands may err this many times the
# baseline's worst. Where attention is sharp, two sound fp16 graphs differ by 3.
TOKEN_MARGIN = 4.0

# The error of an embedding relative to how far different images are apart. A candidate that
# ignores its image has 1 or more, whatever mean all embeddings share.
CENTRED = 0.9

# A value is kept in fp32 when the images bring it above the largest fp16 number divided by this:
# other images than the measured ones may reach higher.
HEADROOM = 4.0

# What ``onnx`` allows an fp32 graph, in multiples of the checkpoint's own rounding: it is the graph
# that a baseline would be. Measured on 16 models, up to 2.6, and where the graph takes bytes, whose
# normalisation rounds inside it, up to 5.5 (docs/tolerances.md).
ROUNDING = 4.0
BYTES_ROUNDING = 8.0

# How often what its precision costs a block's own error may be before ``drift`` calls it parted. An
# engine's kernels round elsewhere than a graph's operators, and its blocks read its own stream.
DRIFT = 2.0
DRIFT_OF_ENGINES = 6.0

_WORDS = {
    "max_abs": "max_abs (times the reference's RMS above 1) at most",
    "cosine_min": "cosine of every image at least",
    "cosine_p1": "first-percentile cosine at least",
    "cls_cosine": "cosine of [CLS] at least",
    "relative": "relative error at most",
    "image": "relative error of every image at most",
    "norm_ratio": "norm ratio within 1 and plus or minus",
    "neighbours": "share of images with the same nearest neighbour at least",
    "classes": "share of images of the same class at least",
}
# What a measured limit bounds too: a user's number takes its place
_REPLACING = frozenset({"max_abs", "cosine_min", "cosine_p1", "relative"})
_FIGURES = {
    "relative": "relative error",
    "image": "relative error of the worst image",
    "cls": "relative error of [CLS]",
    "cls_image": "relative error of [CLS] of the worst image",
    "token": "99th percentile of single tokens' relative errors",
    "worst_token": "relative error of the worst token",
}


@dataclass(frozen=True, slots=True)
class Gate:
    """Conditions on an agreement; None asks nothing.

    ``max_abs`` is for a reference whose root mean square is 1 or less, as the final LayerNorm's
    output is before its gain; a larger reference scales it. ``relative`` is asked of all images
    together and of their [CLS], ``image`` of the worst image; None: the same as ``relative``.
    ``norm_ratio`` is the largest distance from 1.
    ``neighbours``, ``classes`` and ``cls_cosine`` are asked where they were measured.
    ``asked`` names the numbers that a user chose.
    """

    max_abs: float | None = None
    cosine_min: float | None = None
    cosine_p1: float | None = None
    cls_cosine: float | None = None
    relative: float | None = None
    image: float | None = None
    norm_ratio: float | None = None
    neighbours: float | None = None
    classes: float | None = None
    reason: str = ""
    asked: tuple[str, ...] = ()

    @property
    def is_measured(self) -> bool:
        """Check whether a measured limit is asked; a user's number for the same replaces it."""
        return not set(self.asked) & _REPLACING

    @property
    def numbers(self) -> dict[str, float]:
        named = {name: getattr(self, name) for name in _WORDS}
        return {name: value for name, value in named.items() if value is not None}

    def __str__(self) -> str:
        return in_words(self.numbers)

    def failures(self, agreement: Agreement, limit: Limit | None = None) -> list[str]:
        """Name each figure that is past its limit, with the limit; NaN is inside none.

        ``limit`` is a measured one; without it the gate's own numbers are asked.
        """
        if agreement.nan or agreement.inf:  # every other figure is NaN then, or infinite
            return [f"{agreement.nan} NaN and {agreement.inf} infinite values"]
        measured = limit is not None and self.is_measured
        found = limit.failures(agreement) if limit is not None and measured else []
        asked = self.asked if measured or not self.is_measured else tuple(_WORDS)
        found += replace(Gate(), **{name: getattr(self, name) for name in asked})._failing(
            agreement
        )
        if agreement.centred is not None and not agreement.centred <= CENTRED:
            found.append(
                f"error {agreement.centred:.2g} times the distance between different images, "
                f"{CENTRED:g} allowed: it does not tell them apart"
            )
        return found

    def _failing(self, agreement: Agreement) -> list[str]:
        found = []
        if self.max_abs is not None:
            allowed = self.max_abs * max(1.0, agreement.reference_rms)
            if not agreement.max_abs <= allowed:
                found.append(f"max_abs {agreement.max_abs:.2e}, {allowed:.1e} allowed")
        for name in ("cosine_min", "cosine_p1", "cls_cosine"):
            least, cosine = getattr(self, name), getattr(agreement, name)
            if least is not None and cosine is not None and not cosine >= least:
                found.append(f"{name} {cosine:.6f}, at least {least} needed")
        image = self.relative if self.image is None else self.image
        if self.relative is not None or image is not None:
            together = math.inf if self.relative is None else self.relative
            worst = math.inf if image is None else image
            found += _past(agreement.errors, Errors(together, worst, together, worst))
        if self.norm_ratio is not None:
            for ratio in (agreement.norm_ratio_min, agreement.norm_ratio_max):
                if not abs(ratio - 1) <= self.norm_ratio:
                    found.append(
                        f"norm {ratio:.4g} times the reference's, "
                        f"{1 - self.norm_ratio:.4g} to {1 + self.norm_ratio:.4g} allowed"
                    )
        for name, what in (("neighbours", "nearest neighbours"), ("classes", "classes")):
            least, share = getattr(self, name), getattr(agreement, name)
            if least is not None and share is not None and not share >= least:
                found.append(f"{share:.1%} of {what} agree, at least {least:.1%} needed")
        return found

    def require(self, agreement: Agreement, what: str, limit: Limit | None = None) -> None:
        failures = self.failures(agreement, limit)
        if failures:
            raise ToleranceError(
                f"{what} does not agree with its reference: " + "; ".join(failures)
            )


@dataclass(frozen=True, slots=True)
class Limit:
    """The largest errors allowed in one output on these images, as they were measured.

    ``others`` is for those images whose reference is not in fp64 where others' is.
    """

    errors: Errors
    others: Errors | None = None

    @classmethod
    def of(
        cls,
        baseline: Errors,
        rounding: Errors | None = None,
        margin: float = MARGIN,
        others: Errors | None = None,
    ) -> Limit:
        """Allow ``margin`` times the baseline's errors, and never less than the rounding.

        ``rounding`` are errors of the reference's own fp32 arithmetic, where fp64 says them, and
        ``others`` the baseline's on the images that are not in fp64.
        """
        errors = _times(baseline, margin, TOKEN_MARGIN)
        if rounding is None:
            return cls(errors)
        # a reference in fp32 has errors of its own, which add to the candidate's
        allowed = errors.plus(_times(rounding, margin, TOKEN_MARGIN))
        if others is not None:  # some images round worse than those that are in fp64
            allowed = allowed.at_least(_times(others, margin, TOKEN_MARGIN))
        return cls(errors.at_least(rounding), allowed)

    @classmethod
    def of_rounding(cls, rounding: Errors, times: float) -> Limit:
        """Allow a multiple of the reference's own fp32 rounding, where there is no baseline."""
        own = TOKEN_MARGIN / MARGIN
        errors = _times(rounding, times, times * own)
        return cls(errors, _times(rounding, 1 + times, (1 + times) * own))

    def at_most(self, relative: float) -> Limit:
        """Allow no larger error over all images together than ``relative``."""
        return replace(
            self, errors=replace(self.errors, relative=min(self.errors.relative, relative))
        )

    def failures(self, agreement: Agreement) -> list[str]:
        found = _past(agreement.errors, self.errors)
        if agreement.others is not None and self.others is not None:
            past = _past(agreement.others, self.others)
            found += [f"images without fp64: {each}" for each in past]
        return found


def _times(errors: Errors, factor: float, of_worst_token: float) -> Errors:
    worst = errors.worst_token
    return replace(
        errors.times(factor), worst_token=None if worst is None else worst * of_worst_token
    )


def _past(have: Errors, allowed: Errors) -> list[str]:
    return [
        f"{what} {getattr(have, name):.2e}, {getattr(allowed, name):.1e} allowed"
        for name, what in _FIGURES.items()
        if getattr(have, name) is not None
        and getattr(allowed, name) is not None
        and not getattr(have, name) <= getattr(allowed, name)
    ]


def in_words(numbers: Mapping[str, float]) -> str:
    """Put a gate's numbers in words; those of a manifest may be of another version."""
    return ", ".join(f"{_WORDS.get(name, name)} {value:g}" for name, value in numbers.items())


def _quality(cosine: float, reason: str) -> Gate:
    """Ask for a cosine and for what it allows a vector of the same length to err.

    Two vectors of length 1 and cosine c are sqrt(2 - 2 c) apart.
    """
    apart = math.sqrt(max(0.0, 2 - 2 * cosine))
    return Gate(
        cosine_p1=cosine,
        relative=apart,
        image=min(2 * apart, LARGEST_ERROR),
        norm_ratio=min(apart, LARGEST_NORM_CHANGE),
        reason=reason,
    )


# However low a cosine is asked for: a norm that is half or twice the reference's is another scale.
LARGEST_NORM_CHANGE = 0.4
LARGEST_ERROR = 0.9  # of one image: a wholly wrong one has 1 or more

GATES: Mapping[Dtype, Gate] = {
    Dtype.FP32: Gate(
        max_abs=1e-4,
        cosine_min=0.999999,
        relative=2e-5,
        reason="two fp32 runs differ by the order of their additions alone",
    ),
    Dtype.FP16: Gate(
        cosine_p1=0.999,
        relative=2e-2,
        norm_ratio=2e-2,
        reason="10 bits of mantissa move an embedding by far less; past this a value overflowed "
        "or the graph differs",
    ),
    Dtype.BF16: Gate(
        cosine_p1=0.999,
        relative=5e-2,
        norm_ratio=5e-2,
        reason="7 bits of mantissa cost vit-msn-small about 1 %; past this the graph differs",
    ),
    Dtype.INT8: _quality(
        0.99, "eight bits cost an embedding a few percent; --gate-cosine asks for more"
    ),
    Dtype.FP8: _quality(
        0.99, "three bits of mantissa cost an embedding a few percent; --gate-cosine asks for more"
    ),
}


def quality_gate(dtype: Dtype, cosine: float | None) -> Gate:
    """Give the gate of ``calibrate``: the dtype's own, or that of another cosine."""
    if cosine is None:
        return GATES[dtype]
    return _quality(cosine, "the cosine is as asked for, not this gate's own")


def gate_of(dtype: Dtype, numbers: Mapping[str, float] | None = None) -> Gate:
    """Give the gate of a dtype with the numbers asked for, which its reason then says.

    ``cosine`` is every image's in fp32 and else the first percentile's. A number for what a
    measured limit bounds stands in place of it, and can be wider; the others are asked beside it.
    """
    gate = GATES[dtype]
    if not numbers:
        return gate
    names = ("cosine", *_WORDS)
    for name in numbers.keys() - set(names):
        raise SpecError(f"a gate has no {name!r}; it has {', '.join(names)}")
    figure = "cosine_p1" if gate.cosine_min is None else "cosine_min"
    named = {figure if name == "cosine" else name: value for name, value in numbers.items()}
    base = Gate() if _REPLACING & named.keys() else gate
    reason = f"{', '.join(named)} as asked for, not this gate's own"
    return replace(base, **named, reason=reason, asked=tuple(named))


_ROUGHNESS = tuple(GATES)  # the finest first


def coarsest(*dtypes: Dtype) -> Dtype:
    """Choose the dtype whose gate two artifacts share: that of the one that rounds more."""
    return max(dtypes, key=_ROUGHNESS.index)
