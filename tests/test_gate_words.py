"""A gate asks numbers of an agreement; what is no number reaches none of them."""

from dataclasses import replace

import numpy as np
import pytest

from msn_export.check.compare import Agreement, Comparison, worst_of
from msn_export.check.gate import GATES, Gate, coarsest, gate_of, in_words
from msn_export.errors import ToleranceError
from msn_export.spec import Dtype

GOOD = Agreement(
    images=4, max_abs=1e-6, mean_abs=1e-7, cosine_min=1.0, cosine_p1=1.0, cosine_median=1.0,
    norm_ratio_min=1.0, norm_ratio_max=1.0, reference_rms=1.0, relative=1e-7, nan=0, inf=0,
    rounding=1.2, neighbours=1.0, classes=1.0,
)  # fmt: skip
STRICT = Gate(
    max_abs=1e-4, cosine_min=0.999999, cosine_p1=0.999, rounding=3.0, neighbours=0.9, classes=0.9
)


def test_what_agrees_passes() -> None:
    assert STRICT.failures(GOOD) == []
    STRICT.require(GOOD, "the graph")


@pytest.mark.parametrize(
    "name", ["max_abs", "cosine_min", "cosine_p1", "rounding", "neighbours", "classes"]
)
def test_a_figure_that_is_no_number_fails(name) -> None:
    assert len(STRICT.failures(replace(GOOD, **{name: float("nan")}))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_abs": 2e-4}, "max_abs 2.00e-04, allowed 1.0e-04"),
        ({"cosine_min": 0.99}, "cosine_min 0.990000, at least 0.999999 needed"),
        ({"nan": 3, "inf": 1}, "3 NaN and 1 infinite values"),
        ({"rounding": 5.4}, "relative error 1.0e-07 is 5.4 times the reference's own rounding"),
        ({"neighbours": 0.5}, "50.0% of nearest neighbours agree, at least 90.0% needed"),
        ({"classes": 0.5}, "50.0% of classes agree, at least 90.0% needed"),
    ],
)
def test_a_failure_names_the_figure_and_what_was_asked(change, message) -> None:
    (found,) = STRICT.failures(replace(GOOD, **change))
    assert found.startswith(message)
    with pytest.raises(ToleranceError, match="the graph does not agree with its reference: "):
        STRICT.require(replace(GOOD, **change), "the graph")


def test_max_abs_follows_a_large_reference_but_never_a_small_one() -> None:
    gate = Gate(max_abs=1e-4)
    assert gate.failures(replace(GOOD, max_abs=1.9e-3, reference_rms=20.0)) == []
    assert gate.failures(replace(GOOD, max_abs=2e-4, reference_rms=0.01)) != []


def test_what_was_not_measured_is_not_asked() -> None:
    unknown = replace(GOOD, rounding=None, neighbours=None, classes=None)
    assert STRICT.failures(unknown) == []


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


def test_every_gate_says_why_and_can_be_read() -> None:
    for gate in GATES.values():
        assert gate.reason
        assert gate.numbers
    assert str(GATES[Dtype.FP16]) == "first-percentile cosine at least 0.999"
    assert in_words({"of a later version": 0.5}) == "of a later version 0.5"


def compared(reference: np.ndarray, candidate: np.ndarray) -> Agreement:
    comparison = Comparison()
    comparison.add(reference, candidate)
    return comparison.agreement()


def test_an_empty_set_and_another_shape_never_agree() -> None:
    with pytest.raises(ToleranceError, match="an empty set is not a pass"):
        Comparison().agreement()
    with pytest.raises(ToleranceError, match=r"shape \[2, 3\] and its reference \[2, 1\]"):
        compared(np.ones((2, 1)), np.ones((2, 3)))
    with pytest.raises(ToleranceError, match="no output was compared"):
        worst_of([])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_value_that_is_not_finite_fails_every_gate(value) -> None:
    reference = np.ones((3, 4), np.float32)
    candidate = reference.copy()
    candidate[1, 2] = value
    agreement = compared(reference, candidate)
    assert agreement.nan + agreement.inf == 1
    for gate in GATES.values():
        assert gate.failures(agreement)


def test_a_reference_of_zeros_agrees_with_nothing() -> None:
    zeros = np.zeros((2, 4), np.float32)
    assert GATES[Dtype.FP16].failures(compared(zeros, zeros))


def test_relative_error_is_that_of_the_whole_set() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 5.0]])
    agreement = compared(reference, reference + np.array([[0.3, 0.4], [0.0, 0.0]]))
    assert agreement.relative == pytest.approx((0.25 / 50) ** 0.5)
    worst = worst_of([agreement, GOOD])
    assert worst.relative == agreement.relative
    assert worst.rounding == GOOD.rounding
