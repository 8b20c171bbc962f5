"""A gate fails closed: what is no number is inside no tolerance, and every failure is told."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from msn_export.check.compare import Agreement, Comparison
from msn_export.check.gate import GATES, Gate, coarsest, gate_of, in_words
from msn_export.errors import SpecError, ToleranceError
from msn_export.spec import Dtype

GOOD = Agreement(
    images=4, max_abs=1e-6, mean_abs=1e-7, cosine_min=1.0, cosine_p1=1.0, cosine_median=1.0,
    norm_ratio_min=1.0, norm_ratio_max=1.0, reference_rms=1.0, relative=1e-7, nan=0, inf=0,
    rounding=1.2, neighbours=1.0, classes=1.0,
)  # fmt: skip
STRICT = Gate(
    max_abs=1e-4, cosine_min=0.999999, cosine_p1=0.999, rounding=3.0, neighbours=0.9, classes=0.9
)


def agreement(**changes: Any) -> Agreement:
    return replace(GOOD, **changes)


# --- the gates ------------------------------------------------------------------------------------


def test_the_gates_are_the_documented_ones() -> None:
    fp32 = GATES[Dtype.FP32]
    assert (fp32.max_abs, fp32.cosine_min, fp32.rounding) == (1e-4, 0.999999, 3.0)
    assert GATES[Dtype.FP16].cosine_p1 == GATES[Dtype.BF16].cosine_p1 == 0.999
    assert GATES[Dtype.INT8].cosine_p1 == GATES[Dtype.FP8].cosine_p1 == 0.99
    assert GATES.keys() == set(Dtype)


def test_every_gate_says_why_and_can_be_read() -> None:
    for gate in GATES.values():
        assert gate.reason
        assert gate.numbers
    assert str(GATES[Dtype.FP16]) == "first-percentile cosine at least 0.999"
    assert in_words({"of a later version": 0.5}) == "of a later version 0.5"


@pytest.mark.parametrize("gate", [*GATES.values(), STRICT], ids=repr)
def test_perfect_agreement_passes_every_gate(gate) -> None:
    assert gate.failures(GOOD) == []
    gate.require(GOOD, "it")


def test_numbers_can_be_replaced_and_the_reason_says_so() -> None:
    gate = gate_of(Dtype.FP16, {"cosine": 0.9, "max_abs": 0.5})
    assert (gate.cosine_p1, gate.max_abs) == (0.9, 0.5)
    assert gate.reason == "cosine_p1, max_abs as asked for, not this gate's own"
    assert gate_of(Dtype.FP32, {"cosine": 0.9}).cosine_min == 0.9
    assert gate_of(Dtype.FP16) is GATES[Dtype.FP16]


def test_two_dtypes_share_the_gate_of_the_coarser() -> None:
    assert coarsest(Dtype.FP32, Dtype.FP16) is Dtype.FP16
    assert coarsest(Dtype.BF16, Dtype.FP16) is Dtype.BF16
    assert coarsest(Dtype.FP32) is Dtype.FP32


# --- what it lets through and what it does not ----------------------------------------------------


LIMITS = [
    (Gate(max_abs=1e-4), {"max_abs": 1e-4}, []),
    (Gate(max_abs=1e-4), {"max_abs": 1.01e-4}, ["max_abs 1.01e-04, allowed 1.0e-04"]),
    (Gate(max_abs=1e-4), {"max_abs": 9e-4, "reference_rms": 10.0}, []),
    (Gate(max_abs=1e-4), {"max_abs": 2e-4, "reference_rms": 0.1}, ["max_abs 2.00e-04, allowed"]),
    (Gate(cosine_min=0.9), {"cosine_min": 0.9}, []),
    (Gate(cosine_min=0.9), {"cosine_min": 0.8999}, ["cosine_min 0.899900, at least 0.9 needed"]),
    (Gate(cosine_p1=0.9), {"cosine_p1": 0.5}, ["cosine_p1 0.500000, at least 0.9 needed"]),
    (Gate(cosine_p1=0.9), {"cosine_min": 0.1}, []),
    (Gate(), {"max_abs": 1e9, "cosine_min": -1.0}, []),
    (Gate(), {"nan": 2, "inf": 1}, ["2 NaN and 1 infinite values"]),
    (Gate(rounding=3.0), {"rounding": 3.0}, []),
    (Gate(rounding=3.0), {"rounding": 5.4, "relative": 1e-7},
     ["relative error 1.0e-07 is 5.4 times the reference's own rounding, 3 allowed"]),
    (Gate(neighbours=0.9), {"neighbours": 0.5},
     ["50.0% of nearest neighbours agree, at least 90.0% needed"]),
    (Gate(classes=0.9), {"classes": 0.5}, ["50.0% of classes agree, at least 90.0% needed"]),
    # what was not measured is not asked
    (STRICT, {"rounding": None, "neighbours": None, "classes": None}, []),
]  # fmt: skip


@pytest.mark.parametrize(("gate", "figures", "messages"), LIMITS)
def test_a_limit_is_inside_and_what_is_past_it_is_told(gate, figures, messages) -> None:
    found = gate.failures(agreement(**figures))
    assert len(found) == len(messages)
    for one, message in zip(found, messages, strict=True):
        assert one.startswith(message)


@pytest.mark.parametrize(
    "name", ["max_abs", "cosine_min", "cosine_p1", "rounding", "neighbours", "classes"]
)
def test_nan_is_inside_no_tolerance(name) -> None:
    assert len(STRICT.failures(agreement(**{name: math.nan}))) == 1


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("gate", [Gate(), Gate(max_abs=1.0), *GATES.values()], ids=repr)
def test_one_such_value_among_many_fails_every_gate(gate, side, number) -> None:
    # an infinite reference would scale max_abs to infinity, and allow everything
    pair = [np.ones((4, 8)) for _ in range(2)]
    pair[side][2, 3] = number
    comparison = Comparison()
    comparison.add(*pair)
    assert gate.failures(comparison.agreement())


def test_the_message_has_every_figure_that_fails() -> None:
    with pytest.raises(ToleranceError) as raised:
        GATES[Dtype.FP32].require(agreement(max_abs=0.5, cosine_min=0.25), "the fp32 graph")
    message = str(raised.value)
    assert message.startswith("the fp32 graph does not agree with its reference: max_abs 5.00e-01")
    assert "cosine_min 0.250000, at least 0.999999 needed" in message


def test_a_reference_of_zeros_agrees_with_nothing() -> None:
    comparison = Comparison()
    comparison.add(np.zeros((2, 4)), np.zeros((2, 4)))
    assert GATES[Dtype.FP16].failures(comparison.agreement())


def test_a_number_that_is_asked_for_is_written_down_whole_or_not() -> None:
    gate = gate_of(Dtype.FP16, {"max_abs": 1, "classes": 1})
    assert gate.numbers["max_abs"] == gate.numbers["classes"] == 1
    assert "reason" not in gate.numbers


def test_a_number_that_no_gate_has_is_refused() -> None:
    with pytest.raises(SpecError) as raised:
        gate_of(Dtype.FP16, {"cosin": 0.9})
    assert str(raised.value) == (
        "a gate has no 'cosin'; it has cosine, max_abs, cosine_min, cosine_p1, rounding, "
        "neighbours, classes"
    )
