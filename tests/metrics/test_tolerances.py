"""A gate fails closed: what is no number is inside no tolerance, and every failure is told."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from msn_export.errors import SpecError, ToleranceError
from msn_export.metrics.metrics import Agreement, Comparison, Errors
from msn_export.metrics.tolerances import (
    CENTRED,
    GATES,
    MARGIN,
    TOKEN_MARGIN,
    Gate,
    Limit,
    coarsest,
    gate_of,
    in_words,
    quality_gate,
)
from msn_export.spec import Dtype

GOOD = Agreement(
    images=4, max_abs=1e-6, mean_abs=1e-7, cosine_min=1.0, cosine_p1=1.0, cosine_median=1.0,
    norm_ratio_min=1.0, norm_ratio_max=1.0, reference_rms=1.0, relative=1e-7, nan=0, inf=0,
    rounding=1.2, neighbours=1.0, classes=1.0,
)  # fmt: skip
STRICT = Gate(
    max_abs=1e-4, cosine_min=0.999999, cosine_p1=0.999, relative=1e-3, norm_ratio=1e-3,
    neighbours=0.9, classes=0.9,
)  # fmt: skip


def agreement(**changes: Any) -> Agreement:
    return replace(GOOD, **changes)


# --- the gates ------------------------------------------------------------------------------------


def test_the_gates_are_the_documented_ones() -> None:
    fp32 = GATES[Dtype.FP32]
    assert (fp32.max_abs, fp32.cosine_min, fp32.relative) == (1e-4, 0.999999, 2e-5)
    fp16, bf16 = GATES[Dtype.FP16], GATES[Dtype.BF16]
    assert fp16.cosine_p1 == bf16.cosine_p1 == 0.999
    assert (fp16.relative, bf16.relative) == (2e-2, 5e-2)
    assert GATES[Dtype.INT8].cosine_p1 == GATES[Dtype.FP8].cosine_p1 == 0.99
    assert GATES[Dtype.INT8].relative == pytest.approx(math.sqrt(0.02))
    assert GATES.keys() == set(Dtype)


def test_every_gate_says_why_and_can_be_read() -> None:
    for gate in GATES.values():
        assert gate.reason
        assert gate.numbers
    assert str(GATES[Dtype.FP16]) == (
        "first-percentile cosine at least 0.999, relative error at most 0.02, "
        "norm ratio within 1 and plus or minus 0.02"
    )
    assert in_words({"of a later version": 0.5}) == "of a later version 0.5"


@pytest.mark.parametrize("gate", [*GATES.values(), STRICT], ids=repr)
def test_perfect_agreement_passes_every_gate(gate) -> None:
    assert gate.failures(GOOD) == []
    gate.require(GOOD, "it")


def test_numbers_can_be_replaced_and_the_reason_says_so() -> None:
    gate = gate_of(Dtype.FP16, {"cosine": 0.9, "max_abs": 0.5})
    assert gate.numbers == {"cosine_p1": 0.9, "max_abs": 0.5}  # and nothing else is asked
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
    (Gate(max_abs=1e-4), {"max_abs": 1.01e-4}, ["max_abs 1.01e-04, 1.0e-04 allowed"]),
    (Gate(max_abs=1e-4), {"max_abs": 9e-4, "reference_rms": 10.0}, []),
    (Gate(max_abs=1e-4), {"max_abs": 2e-4, "reference_rms": 0.1}, ["max_abs 2.00e-04, 1.0e"]),
    (Gate(cosine_min=0.9), {"cosine_min": 0.9}, []),
    (Gate(cosine_min=0.9), {"cosine_min": 0.8999}, ["cosine_min 0.899900, at least 0.9 needed"]),
    (Gate(cosine_p1=0.9), {"cosine_p1": 0.5}, ["cosine_p1 0.500000, at least 0.9 needed"]),
    (Gate(cosine_p1=0.9), {"cosine_min": 0.1}, []),
    (Gate(), {"max_abs": 1e9, "cosine_min": -1.0}, []),
    (Gate(), {"nan": 2, "inf": 1}, ["2 NaN and 1 infinite values"]),
    (Gate(relative=0.1), {"relative": 0.1, "image": 0.1, "cls": 0.1, "cls_image": 0.1}, []),
    (Gate(relative=0.1), {"relative": 0.2}, ["relative error 2.00e-01, 1.0e-01 allowed"]),
    (Gate(relative=0.1), {"image": 0.2}, ["relative error of the worst image 2.00e-01, 1.0e-01"]),
    (Gate(relative=0.1), {"cls": 0.2}, ["relative error of [CLS] 2.00e-01, 1.0e-01 allowed"]),
    (Gate(relative=0.1), {"cls_image": 0.2}, ["relative error of [CLS] of the worst image 2.00"]),
    (Gate(relative=0.1, image=0.3), {"image": 0.3, "cls_image": 0.3}, []),
    (Gate(relative=0.1, image=0.3), {"image": 0.4}, ["relative error of the worst image 4.00e-01"]),
    (Gate(image=0.3), {"relative": 9.0, "cls": 9.0}, []),
    (Gate(relative=0.1), {"token": 0.2, "worst_token": 9.0}, []),  # for images, not for tokens
    (Gate(norm_ratio=0.1), {"norm_ratio_max": 1.11}, ["norm 1.11 times the reference's, 0.9 to"]),
    (Gate(norm_ratio=0.1), {"norm_ratio_min": 0.5}, ["norm 0.5 times the reference's, 0.9 to 1.1"]),
    (Gate(cls_cosine=0.9), {"cls_cosine": 0.5}, ["cls_cosine 0.500000, at least 0.9 needed"]),
    (Gate(), {"centred": 0.9}, []),
    (Gate(), {"centred": 1.5}, ["error 1.5 times the distance between different images, 0.9 allo"]),
    (Gate(neighbours=0.9), {"neighbours": 0.5},
     ["50.0% of nearest neighbours agree, at least 90.0% needed"]),
    (Gate(classes=0.9), {"classes": 0.5}, ["50.0% of classes agree, at least 90.0% needed"]),
    # what was not measured is not asked
    (STRICT, {"cls": None, "neighbours": None, "classes": None, "centred": None}, []),
]  # fmt: skip


@pytest.mark.parametrize(("gate", "figures", "messages"), LIMITS)
def test_a_limit_is_inside_and_what_is_past_it_is_told(gate, figures, messages) -> None:
    found = gate.failures(agreement(**figures))
    assert len(found) == len(messages)
    for one, message in zip(found, messages, strict=True):
        assert one.startswith(message)


@pytest.mark.parametrize(
    "name",
    ["max_abs", "cosine_min", "cosine_p1", "relative", "image", "cls", "cls_image", "centred",
     "norm_ratio_min", "norm_ratio_max", "neighbours", "classes"],
)  # fmt: skip
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
    assert message.startswith(
        "the fp32 graph does not agree with its reference: max_abs 5.00e-01, 1.0e-04 allowed; "
    )
    assert "cosine_min 0.250000, at least 0.999999 needed" in message


def test_a_reference_of_zeros_agrees_with_nothing() -> None:
    comparison = Comparison()
    comparison.add(np.zeros((2, 4)), np.zeros((2, 4)))
    assert GATES[Dtype.FP16].failures(comparison.agreement())


# --- limits that were measured --------------------------------------------------------------------


BASELINE = Errors(1e-3, 2e-3, 3e-3, 4e-3, 5e-3, 6e-3)
FIGURES = ("relative", "image", "cls", "cls_image", "token", "worst_token")


def test_a_candidate_may_err_as_much_as_its_precision_costs_and_half_again() -> None:
    assert Limit.of(BASELINE).errors == Errors(
        *(pytest.approx(MARGIN * cost) for cost in (1e-3, 2e-3, 3e-3, 4e-3, 5e-3)),
        worst_token=pytest.approx(TOKEN_MARGIN * 6e-3),
    )
    assert Limit.of(BASELINE, margin=2.5).errors.relative == pytest.approx(2.5e-3)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("dtype", list(Dtype))
def test_each_figure_is_held_to_its_limit_and_named(name, dtype) -> None:
    limit = Limit.of(BASELINE)
    allowed = getattr(limit.errors, name)
    inside = agreement(**dict.fromkeys(FIGURES, 0.0) | {name: allowed})
    assert GATES[dtype].failures(inside, limit) == []
    for past in (allowed * 1.001, math.nan):
        (failure,) = GATES[dtype].failures(replace(inside, **{name: past}), limit)
        assert f"{past:.2e}, {allowed:.1e} allowed" in failure


def test_a_measured_limit_stands_in_place_of_the_fixed_numbers() -> None:
    wide, narrow = Limit(Errors.uniform(0.5)), Limit(Errors.uniform(1e-9))
    far = agreement(max_abs=1.0, relative=0.4, image=0.4, cosine_min=0.9, cosine_p1=0.9)
    assert GATES[Dtype.FP32].failures(far)
    assert GATES[Dtype.FP32].failures(far, wide) == []
    assert GATES[Dtype.FP32].failures(GOOD, narrow)


def test_nothing_that_is_no_number_is_inside_a_measured_limit() -> None:
    limit = Limit(Errors.uniform(math.inf))
    assert GATES[Dtype.FP16].failures(agreement(nan=1), limit) == ["1 NaN and 0 infinite values"]
    assert GATES[Dtype.FP16].failures(agreement(inf=1), limit)
    assert GATES[Dtype.FP16].failures(agreement(centred=1.0), limit)
    assert CENTRED < 1  # what a candidate has that gives the mean for every image


def test_no_limit_is_below_the_references_own_rounding() -> None:
    rounding = Errors(5e-3, 1e-3)
    limit = Limit.of(Errors(1e-3, 2e-3), rounding)
    assert limit.errors == Errors(5e-3, pytest.approx(MARGIN * 2e-3))
    # where the reference is not in fp64, it errs too
    assert limit.others == Errors(
        pytest.approx(MARGIN * (1e-3 + 5e-3)), pytest.approx(MARGIN * (2e-3 + 1e-3))
    )
    right = agreement(relative=5e-3, image=3e-3, others=Errors(8e-3, 4.5e-3))
    assert limit.failures(right) == []
    (failure,) = limit.failures(agreement(others=Errors(8e-3, 4.6e-3)))
    assert failure == (
        "images without fp64: relative error of the worst image 4.60e-03, 4.5e-03 allowed"
    )


def test_images_without_fp64_that_the_baseline_rounds_worse_are_allowed_that() -> None:
    one, rounding = Errors(1e-3, 1e-3), Errors(5e-4, 5e-4)
    limit = Limit.of(one, rounding, MARGIN, Errors(1e-4, 4e-3))
    assert limit.others == Errors(pytest.approx(MARGIN * 1.5e-3), pytest.approx(MARGIN * 4e-3))
    assert limit.errors == Limit.of(one, rounding).errors


def test_cls_and_tokens_of_images_without_fp64_have_limits_too() -> None:
    one, rounding = Errors.uniform(1e-3), Errors.uniform(5e-4)
    limit = Limit.of(one, rounding)
    allowed = MARGIN * 1.5e-3
    assert limit.others == Errors(
        *(pytest.approx(allowed) for _ in range(5)), pytest.approx(TOKEN_MARGIN * 1.5e-3)
    )
    for name in ("cls", "cls_image", "token"):
        past = replace(Errors.uniform(1e-3), **{name: 1.01 * allowed})
        (failure,) = limit.failures(agreement(others=past))
        assert failure.startswith("images without fp64: ")


def test_where_only_the_rounding_is_known_a_multiple_of_it_is_allowed() -> None:
    limit = Limit.of_rounding(Errors(1e-7, 2e-7, 3e-7, 4e-7, 5e-7, 6e-7), 4.0)
    assert limit.errors == Errors(
        *(pytest.approx(4 * rounding) for rounding in (1e-7, 2e-7, 3e-7, 4e-7, 5e-7)),
        worst_token=pytest.approx(4 * 6e-7 * TOKEN_MARGIN / MARGIN),
    )
    assert limit.others == Errors(
        *(pytest.approx(5 * rounding) for rounding in (1e-7, 2e-7, 3e-7, 4e-7, 5e-7)),
        worst_token=pytest.approx(5 * 6e-7 * TOKEN_MARGIN / MARGIN),
    )


@pytest.mark.parametrize("name", ["cosine", "max_abs", "relative"])
def test_what_a_user_asks_for_the_same_thing_takes_the_limits_place(name) -> None:
    narrow = Limit(Errors.uniform(1e-9))
    asked = gate_of(Dtype.FP16, {name: {"cosine": 0.5}.get(name, 0.5)})
    assert asked.failures(GOOD, narrow) == []
    assert asked.failures(agreement(max_abs=1.0, relative=0.6, cosine_p1=0.4), narrow)


@pytest.mark.parametrize("name", ["neighbours", "classes", "cls_cosine", "norm_ratio"])
def test_what_a_user_asks_besides_is_asked_beside_the_limit(name) -> None:
    asked = gate_of(Dtype.FP16, {name: 0.25})
    assert asked.numbers == GATES[Dtype.FP16].numbers | {name: 0.25}
    narrow = Limit(Errors.uniform(1e-9))
    bad = agreement(neighbours=0.2, classes=0.2, cls_cosine=0.2, norm_ratio_max=2.0)
    assert len(asked.failures(bad, narrow)) == 2  # the limit's, and the number's
    assert len(asked.failures(bad, Limit(Errors.uniform(1.0)))) == 1


def test_a_cosine_bounds_the_error_and_the_norm_of_a_calibration() -> None:
    gate = quality_gate(Dtype.INT8, 0.98)
    assert (gate.cosine_p1, gate.relative) == (0.98, pytest.approx(0.2))
    assert gate.image == pytest.approx(0.4)
    assert gate.norm_ratio == pytest.approx(0.2)
    assert quality_gate(Dtype.INT8, None) is GATES[Dtype.INT8]
    # however low: another scale is another output
    anything = quality_gate(Dtype.INT8, 0.0)
    assert anything.failures(agreement(image=1.0))
    for factor in (0.5, 2.0, 100.0):
        assert anything.failures(agreement(norm_ratio_min=factor, norm_ratio_max=factor))


# --- numbers by name ------------------------------------------------------------------------------


def test_a_number_that_is_asked_for_is_written_down_whole_or_not() -> None:
    gate = gate_of(Dtype.FP16, {"max_abs": 1, "classes": 1})
    assert gate.numbers["max_abs"] == gate.numbers["classes"] == 1
    assert "reason" not in gate.numbers


def test_a_number_that_no_gate_has_is_refused() -> None:
    with pytest.raises(SpecError) as raised:
        gate_of(Dtype.FP16, {"cosin": 0.9})
    assert str(raised.value) == (
        "a gate has no 'cosin'; it has cosine, max_abs, cosine_min, cosine_p1, cls_cosine, "
        "relative, image, norm_ratio, neighbours, classes"
    )
