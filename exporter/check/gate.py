"""The numbers an artifact must reach, all in one place; docs/tolerances.md says where from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from msn_export.errors import SpecError, ToleranceError
from msn_export.spec import Dtype

if TYPE_CHECKING:
    from msn_export.check.compare import Agreement

# A value is kept in fp32 when the images bring it above the largest fp16 number divided by this:
# other images than the measured ones may reach higher.
HEADROOM = 4.0

# The relative error of a block's output from which ``drift`` calls two artifacts parted. In fp32
# against a checkpoint, whose rounding can be measured, it is a multiple of that instead: ROUNDING.
DRIFT = {
    Dtype.FP32: 4e-6,
    Dtype.FP16: 5e-3,
    Dtype.BF16: 4e-2,
    Dtype.INT8: 0.1,
    Dtype.FP8: 0.2,
}
ROUNDING = 3.0

# Where nothing is past that, ``drift`` suspects the first block that adds more than this many times
# the error that any stage before it added.
JUMP = 4.0

_WORDS = {
    "max_abs": "max_abs (times the reference's RMS above 1) at most",
    "cosine_min": "cosine of every image at least",
    "cosine_p1": "first-percentile cosine at least",
    "rounding": "relative error in multiples of the reference's own rounding at most",
    "neighbours": "share of images with the same nearest neighbour at least",
    "classes": "share of images of the same class at least",
}


@dataclass(frozen=True, slots=True)
class Gate:
    """What must hold of an agreement; None asks nothing.

    ``max_abs`` is for a reference whose root mean square is 1 or less, as the final LayerNorm's
    output is before its gain; a larger reference scales it. ``rounding`` is asked where the
    reference's own rounding is known, ``neighbours`` and ``classes`` where they were measured.
    """

    max_abs: float | None = None
    cosine_min: float | None = None
    cosine_p1: float | None = None
    rounding: float | None = None
    neighbours: float | None = None
    classes: float | None = None
    reason: str = ""

    @property
    def numbers(self) -> dict[str, float]:
        """What is asked, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        del named["reason"]
        return {name: value for name, value in named.items() if value is not None}

    def __str__(self) -> str:
        return in_words(self.numbers)

    def failures(self, agreement: Agreement) -> list[str]:
        """Say what does not hold; each comparison is written so that NaN fails it."""
        found = []
        if agreement.nan or agreement.inf:
            found.append(f"{agreement.nan} NaN and {agreement.inf} infinite values")
        if self.max_abs is not None:
            allowed = self.max_abs * max(1.0, agreement.reference_rms)
            if not agreement.max_abs <= allowed:
                found.append(f"max_abs {agreement.max_abs:.2e}, allowed {allowed:.1e}")
        for name in ("cosine_min", "cosine_p1"):
            least = getattr(self, name)
            if least is not None and not getattr(agreement, name) >= least:
                found.append(f"{name} {getattr(agreement, name):.6f}, at least {least} needed")
        asked, times = self.rounding, agreement.rounding
        # says nothing new where a coarser figure failed
        if asked is not None and times is not None and not (found or times <= asked):
            found.append(
                f"relative error {agreement.relative:.1e} is {times:.1f} times the reference's "
                f"own rounding, {asked:g} allowed"
            )
        for name, what in (("neighbours", "nearest neighbours"), ("classes", "classes")):
            least, share = getattr(self, name), getattr(agreement, name)
            if least is not None and share is not None and not share >= least:
                found.append(f"{share:.1%} of {what} agree, at least {least:.1%} needed")
        return found

    def require(self, agreement: Agreement, what: str) -> None:
        """Pass or raise.

        Raises:
            ToleranceError: something does not hold; the message has every figure that fails.
        """
        failures = self.failures(agreement)
        if failures:
            raise ToleranceError(
                f"{what} does not agree with its reference: " + "; ".join(failures)
            )


def in_words(numbers: Mapping[str, float]) -> str:
    """Say what a gate's numbers ask; those of a manifest may be of another version."""
    return ", ".join(f"{_WORDS.get(name, name)} {value:g}" for name, value in numbers.items())


GATES: Mapping[Dtype, Gate] = {
    Dtype.FP32: Gate(
        max_abs=1e-4,
        cosine_min=0.999999,
        rounding=ROUNDING,
        reason="two fp32 runs differ by the order of their additions alone",
    ),
    Dtype.FP16: Gate(
        cosine_p1=0.999,
        reason="10 bits of mantissa move an embedding by far less; below this a value overflowed "
        "or the graph differs",
    ),
    Dtype.BF16: Gate(
        cosine_p1=0.999,
        reason="7 bits of mantissa leave 0.9999 on vit-msn-small; below this the graph differs",
    ),
    # msn-export calibrate --gate-cosine; trt compares a quantised graph with itself as written
    Dtype.INT8: Gate(
        cosine_p1=0.99,
        reason="eight bits cost an embedding a few thousandths; --gate-cosine asks for more",
    ),
    Dtype.FP8: Gate(
        cosine_p1=0.99,
        reason="three bits of mantissa cost an embedding a few thousandths; --gate-cosine asks "
        "for more",
    ),
}


def gate_of(dtype: Dtype, numbers: Mapping[str, float] | None = None) -> Gate:
    """Give the gate of a dtype with some numbers replaced, which its reason then says.

    ``cosine`` replaces the one cosine the gate asks for: every image's, or the first percentile.

    Raises:
        SpecError: there is no number of that name.
    """
    gate = GATES[dtype]
    if not numbers:
        return gate
    figure = "cosine_p1" if gate.cosine_min is None else "cosine_min"
    known = ("cosine", *(field.name for field in fields(Gate) if field.name != "reason"))
    for name in numbers.keys() - set(known):
        raise SpecError(f"a gate has no {name!r}; it has {', '.join(known)}")
    named = {figure if name == "cosine" else name: value for name, value in numbers.items()}
    return replace(gate, **named, reason=f"{', '.join(named)} as asked for, not this gate's own")


_ROUGHNESS = tuple(GATES)  # the finest first


def coarsest(*dtypes: Dtype) -> Dtype:
    """Choose the dtype whose gate two artifacts share: that of the one that rounds more."""
    return max(dtypes, key=_ROUGHNESS.index)
