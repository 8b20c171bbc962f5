"""Two streams compared stage by stage: what errs by itself, and more than its precision costs."""

import math
from collections.abc import Mapping

import numpy as np
import pytest

from msn_export.compare.drift import Drift, suspect_of
from msn_export.errors import ToleranceError
from msn_export.metrics.diagnose import (
    Gathered,
    OwnError,
    StageDrift,
    TensorComparison,
    TensorDrift,
    first_past,
    first_tokens,
    marks,
    most_of,
    own_errors,
    stages_of,
)
from msn_export.spec import Dtype

NAMES = ("patch embedding", "block 0", "block 1", "block 2")


def tensors(errors: Mapping[str, float]) -> dict[str, np.ndarray]:
    batch = np.random.default_rng(0).standard_normal((3, 4, 5))
    return {name: batch * (1 + error) for name, error in errors.items()}


def compared(errors: Mapping[str, float], count: int = 2) -> Gathered:
    gathered = Gathered()
    for _ in range(count):
        gathered.add(tensors(dict.fromkeys(errors, 0.0)), tensors(errors), errors)
    return gathered


def stages(
    *errors: float, cost: float = 1e-3, reasons: Mapping[str, tuple[str, ...]] | None = None
) -> tuple[StageDrift, ...]:
    gathered = compared(dict(zip(NAMES, errors, strict=True)))
    own = own_errors(gathered.relative(), dict.fromkeys(NAMES, cost), NAMES, times=2.0)
    return stages_of(gathered, {}, own, reasons or {}, NAMES)


def test_every_batch_counts_and_errors_are_relative_to_the_reference() -> None:
    gathered = compared({"block 0": 1e-2}, count=3)
    assert len(gathered["block 0"].comparison.cosines) == 9
    assert gathered.relative() == {"block 0": pytest.approx(1e-2)}


# --- marks ----------------------------------------------------------------------------------------


def test_a_block_is_measured_by_what_it_adds_to_the_stream_it_was_given() -> None:
    given = {"patch embedding": np.full((1, 2, 3), 100.0), "block 0": np.full((1, 2, 3), 200.0)}
    made = {
        "patch embedding": np.full((1, 2, 3), 101.0),
        "block 0": np.full((1, 2, 3), 103.0),
        "block 0 MLP": np.full((1, 2, 3), 2.0),
        "block 1": np.full((1, 1, 3), 204.0),  # [CLS] alone
        "logits": np.full((1, 7), 5.0),
    }
    found = marks(made, ("patch embedding", "block 0", "block 1", "logits"), given)
    assert {name: (value.shape, value.flat[0]) for name, value in found.items()} == {
        "patch embedding": ((1, 2, 3), 101.0),
        "block 0": ((1, 2, 3), 3.0),
        "block 0 MLP": ((1, 2, 3), 2.0),
        "block 1": ((1, 1, 3), 4.0),
        "logits": ((1, 7), 5.0),
    }


# --- own errors -----------------------------------------------------------------------------------


def test_a_stage_is_judged_by_the_tensor_that_errs_most_beside_its_cost() -> None:
    errors = {"block 0": 3e-3, "block 0 attention": 1e-2, "block 0 MLP": 4e-2}
    costs = {"block 0": 2e-3, "block 0 attention": 1e-3, "block 0 MLP": 1e-2}
    (own,) = own_errors(errors, costs, ["block 0"], times=2.0).values()
    assert own == OwnError("block 0 attention", 1e-2, 1e-3, 2e-3)
    assert own.times == pytest.approx(10)
    assert not own.inside


def test_the_limit_is_a_multiple_of_what_was_measured_or_the_tolerance_asked_for() -> None:
    (own,) = own_errors({"block 0": 2e-3}, {"block 0": 1e-3}, ["block 0"], times=2.0).values()
    assert own.inside
    (own,) = own_errors({"block 0": 2.1e-3}, {"block 0": 1e-3}, ["block 0"], times=2.0).values()
    assert not own.inside
    errors, costs = {"block 0": 2.1e-3, "block 0 MLP": 9.0}, {"block 0": 1e-3, "block 0 MLP": 1.0}
    asked = own_errors(errors, costs, ["block 0"], times=2.0, tolerance=3e-3)
    assert asked == {"block 0": OwnError("block 0", 2.1e-3, 1e-3, 3e-3)}
    assert asked["block 0"].inside


def test_a_stage_that_costs_nothing_may_not_err() -> None:
    (own,) = own_errors({"block 0": 0.0}, {"block 0": 0.0}, ["block 0"], times=2.0).values()
    assert (own.times, own.inside) == (0.0, True)
    (own,) = own_errors({"block 0": 1e-9}, {"block 0": 0.0}, ["block 0"], times=2.0).values()
    assert (own.times, own.inside) == (math.inf, False)


def test_without_a_cost_the_median_of_the_other_blocks_takes_its_place() -> None:
    errors = {f"block {i}": error for i, error in enumerate([1e-3, 3e-3, 2e-3, 9e-3])}
    errors |= {"block 3 MLP": 1.0, "patch embedding": 5.0}
    own = own_errors(errors, None, (*NAMES, "block 3"), times=2.0)
    assert own["block 3"] == OwnError("block 3", 9e-3, 2e-3, 4e-3)
    assert own["block 0"].cost == 3e-3
    assert [stage.inside for stage in own.values()] == [True, True, True, True, False]
    # one other block is no median, and the patch embedding is no block
    few = own_errors({"block 0": 1.0, "block 1": 2.0}, None, ["block 0"], times=2.0)
    assert few == {"block 0": OwnError("block 0", 1.0, None, math.inf)}
    assert own["patch embedding"].cost is None


def test_what_is_no_number_is_the_worst_and_never_inside() -> None:
    errors = {"block 0": math.nan, "block 0 MLP": 5.0}
    costs = {"block 0": 1.0, "block 0 MLP": 1.0}
    (own,) = own_errors(errors, costs, ["block 0"], times=2.0).values()
    assert own.tensor == "block 0"
    assert not own.inside
    for cost in ({"block 0": math.nan}, None):
        (own,) = own_errors({"block 0": math.nan}, cost, ["block 0"], times=2.0).values()
        assert not own.inside
    (own,) = own_errors({"block 0": 1.0}, {"block 0": math.nan}, ["block 0"], times=2.0).values()
    assert not own.inside


# --- the verdict ----------------------------------------------------------------------------------


def test_the_first_past_what_is_allowed_is_named_and_nan_is_past_everything() -> None:
    assert first_past(stages(1e-3, 2e-3, 1e-3, 0.0)) is None
    past = first_past(stages(1e-3, 2e-3, 5e-3, 6e-3))
    assert past is not None
    assert past.name == "block 1"
    spoiled = first_past(stages(1e-3, math.nan, 1e-3, 1e-3, cost=1e9))
    assert spoiled is not None
    assert spoiled.name == "block 0"


def test_a_stage_that_is_another_one_parts_whatever_its_numbers() -> None:
    found = stages(0.0, 0.0, 0.0, 0.0, reasons={"block 1": ("epsilon is 1",)})
    past = first_past(found)
    assert past is not None
    assert past.name == "block 1"


def test_a_stage_that_could_not_be_compared_has_its_reasons_alone() -> None:
    found = stages_of(Gathered(), {}, {}, {"block 3": ("there is none",)}, ("block 2", "block 3"))
    (stage,) = found
    assert (stage.name, stage.own, stage.reasons) == ("block 3", None, ("there is none",))
    assert math.isnan(stage.tensor.relative)
    assert (stage.tensor.nan, stage.tensor.inf) == (0, 0)
    assert not stage.inside


def test_the_suspect_is_the_block_that_parts_else_the_one_that_errs_most_for_its_cost() -> None:
    parted = stages(1e-4, 2e-4, 5e-3, 6e-3)
    assert suspect_of(parted, parted[2]) == "block 1"
    assert suspect_of(parted, parted[0]) is None  # an embedding has no inside
    assert suspect_of(stages(9e-4, 1e-4, 2e-4, 1e-4), None) == "block 1"
    assert suspect_of((), None) is None
    # not the largest error: the largest beside its cost
    gathered = compared(dict(zip(NAMES, (0.0, 8e-3, 4e-3, 1e-3), strict=True)))
    costs = {"patch embedding": 1.0, "block 0": 8e-3, "block 1": 2e-3, "block 2": 1e-3}
    own = own_errors(gathered.relative(), costs, NAMES, times=3.0)
    most = most_of(stages_of(gathered, {}, own, {}, NAMES))
    assert most is not None
    assert most.name == "block 1"


def drift_of(found: tuple[StageDrift, ...], parted: str | None) -> Drift:
    return Drift("a", "b", Dtype.FP32, found, parted, None, (), None, "", ())


def test_it_is_said_in_a_sentence() -> None:
    assert drift_of(stages(0.0, 1e-4, 1.5e-3, 1e-4), None).sentence == (
        "No stage parts; block 1 errs the most: its own error is 1.5e-03, 1.5 times its cost of "
        "1.0e-03, 2.0e-03 allowed."
    )
    assert drift_of(stages(0.0, 1e-4, 5e-3, 1e-4), "block 1").sentence == (
        "They part at block 1: its own error is 5.0e-03, 5 times its cost of 1.0e-03, 2.0e-03 "
        "allowed."
    )
    other = stages(0.0, 1e-4, 5e-4, 1e-4, reasons={"block 1": ("epsilon is 1", "and more")})
    assert drift_of(other, "block 1").sentence == "They part at block 1: epsilon is 1; and more."
    assert drift_of((), None).sentence == "No stage parts."
    spoiled = stages(0.0, math.nan, 0.0, 0.0)
    assert drift_of(spoiled, "block 0").sentence.startswith(
        "They part at block 0: its own error is nan, 120 NaN and 0 infinite values in it, nan"
    )


def test_headroom_is_how_often_the_peak_fits_below_65504() -> None:
    tensor = TensorDrift("block 0", 1.0, 1.0, 0.0, 0.0, 2.0, 0, 0)
    assert StageDrift(tensor, None, 32752.0, "x").headroom == 2.0
    assert StageDrift(tensor, None, 0.0, "x").headroom == math.inf


def test_a_peak_inside_the_block_counts_and_is_named() -> None:
    gathered = compared({"block 0": 0.0})
    (found,) = stages_of(gathered, {"block 0": (99.0, "mlp.fc1")}, {}, {}, ["block 0"])
    assert (found.peak, found.peak_tensor) == (99.0, "mlp.fc1")


def test_a_peak_that_is_no_number_is_none_that_fits() -> None:
    batch = {"block 0": np.array([[1.0, np.nan]])}
    gathered = Gathered()
    gathered.add(batch, batch, batch)
    (found,) = stages_of(gathered, {"block 0": (1.0, "mlp.fc1")}, {}, {}, ["block 0"])
    assert math.isnan(found.peak)


# --- shapes ---------------------------------------------------------------------------------------


def test_a_side_with_one_token_is_compared_at_that_token() -> None:
    comparison = TensorComparison("block 1")
    tokens = np.arange(24.0).reshape(2, 3, 4) + 1
    comparison.add(tokens, tokens[:, :1] * 2)
    assert comparison.drift().first_token
    assert comparison.drift().relative == pytest.approx(1.0)


@pytest.mark.parametrize("other", [(2, 2, 4), (2, 3, 5), (3, 1, 4), (2, 12)])
def test_any_other_shape_is_left_out(other) -> None:
    tokens = np.ones((2, 3, 4))
    assert not first_tokens(tokens, np.ones(other))
    gathered = Gathered()
    gathered.add({"block 0": tokens}, {"block 0": np.ones(other)}, ["block 0", "block 1"])
    assert gathered == {}
    with pytest.raises(ToleranceError, match=r"output has shape .* they must be the same"):
        TensorComparison("block 0").add(tokens, np.ones(other))


def test_nothing_compared_is_no_agreement() -> None:
    with pytest.raises(ToleranceError, match="no image was compared; an empty set is not a pass"):
        TensorComparison("block 0").drift()
