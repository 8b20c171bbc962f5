"""A gate fails closed: what is no number is inside no tolerance."""

import math
from dataclasses import replace

import numpy as np
import pytest

from msn_export.check.compare import Agreement, Comparison
from msn_export.check.gate import GATES, Gate
from msn_export.errors import ToleranceError
from msn_export.spec import Dtype


def agreement(**changes: float) -> Agreement:
    comparison = Comparison()
    comparison.add(np.ones((4, 8)), np.ones((4, 8)))
    return replace(comparison.agreement(), **changes)


def test_the_gates_are_the_documented_ones() -> None:
    fp32 = GATES[Dtype.FP32]
    assert (fp32.max_abs, fp32.cosine_min) == (1e-4, 0.999999)
    assert GATES[Dtype.FP16].cosine_p1 == GATES[Dtype.BF16].cosine_p1 == 0.999
    assert GATES.keys() == set(Dtype)


@pytest.mark.parametrize("dtype", Dtype)
def test_perfect_agreement_passes_every_gate(dtype) -> None:
    assert GATES[dtype].failures(agreement()) == []
    GATES[dtype].require(agreement(), "it")


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
]


@pytest.mark.parametrize(("gate", "figures", "messages"), LIMITS)
def test_a_limit_is_inside_and_what_is_past_it_is_told(gate, figures, messages) -> None:
    found = gate.failures(agreement(**figures))
    assert len(found) == len(messages)
    for one, message in zip(found, messages, strict=True):
        assert one.startswith(message)


@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize("name", ["max_abs", "cosine_min", "cosine_p1"])
def test_nan_is_inside_no_tolerance(dtype, name) -> None:
    gate = GATES[dtype]
    if getattr(gate, name) is not None:
        assert len(gate.failures(agreement(**{name: math.nan}))) == 1


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
