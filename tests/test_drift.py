"""Two streams compared stage by stage: what each adds, where the first is past what is allowed."""

import math
from collections.abc import Mapping

import numpy as np
import pytest

from msn_export.check.drift import (
    StageDrift,
    TensorComparison,
    TensorDrift,
    compare_streams,
    first_past,
    first_tokens,
    stages_of,
)
from msn_export.check.gate import DRIFT, JUMP
from msn_export.errors import ToleranceError
from msn_export.proof.drift import Drift, suspect_of
from msn_export.spec import Dtype


class Shown:
    """A model that shows what it is given, changed a little."""

    def __init__(self, change: Mapping[str, float]) -> None:
        self.name, self.peaks, self.change = "shown", {}, change

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: images * (1 + error) for name, error in self.change.items()}

    def close(self) -> None:
        pass


def compared(errors: Mapping[str, float], count: int = 2) -> dict[str, TensorComparison]:
    batch = np.random.default_rng(0).standard_normal((3, 4, 5))
    exact = Shown(dict.fromkeys(errors, 0.0))
    return compare_streams(exact, Shown(errors), [(batch, batch)] * count, errors)


NAMES = ("patch embedding", "block 0", "block 1", "block 2")


def stages(*errors: float, allowed: float = 1e-3) -> tuple[StageDrift, ...]:
    gathered = compared(dict(zip(NAMES, errors, strict=True)))
    return stages_of(gathered, {}, dict.fromkeys(NAMES, allowed))


def test_there_is_a_tolerance_for_every_precision_and_coarser_ones_are_wider() -> None:
    assert DRIFT.keys() == set(Dtype)
    order = [Dtype.FP32, Dtype.FP16, Dtype.BF16, Dtype.INT8, Dtype.FP8]
    assert sorted(DRIFT[dtype] for dtype in order) == [DRIFT[dtype] for dtype in order]


def test_every_batch_counts_and_errors_are_relative_to_the_reference() -> None:
    gathered = compared({"block 0": 1e-2}, count=3)
    assert len(gathered["block 0"].comparison.cosines) == 9
    assert gathered["block 0"].drift().relative == pytest.approx(1e-2)


def test_a_stage_adds_what_the_one_before_does_not_explain() -> None:
    found = stages(3e-4, 5e-4, 5e-4, 4e-4)
    # errors of independent origin add as squares do
    assert [stage.added for stage in found] == pytest.approx([3e-4, 4e-4, 0, 0], abs=1e-9)


def test_the_first_past_what_is_allowed_is_named_and_nan_is_past_everything() -> None:
    assert first_past(stages(1e-4, 2e-4, 3e-4, 4e-4)) is None
    past = first_past(stages(1e-4, 2e-4, 5e-3, 6e-3))
    assert past is not None
    assert past.name == "block 1"
    spoiled = first_past(stages(1e-4, math.nan, 1e-4, 1e-4, allowed=math.inf))
    assert spoiled is not None
    assert (spoiled.name, math.isnan(spoiled.added)) == ("block 0", True)


def test_the_suspect_is_the_block_that_parts_else_the_first_jump_else_the_most() -> None:
    parted = stages(1e-4, 2e-4, 5e-3, 6e-3)
    assert suspect_of(parted, parted[2]) == "block 1"
    assert suspect_of(parted, parted[0]) is None  # an embedding has no inside
    # later blocks magnify what comes in: the first that jumps, not the largest
    jumping = stages(1e-5, 1.1e-5, 2 * JUMP * 1e-5, 9e-4)
    assert suspect_of(jumping, None) == "block 1"
    steady = stages(1e-4, 1.5e-4, 2.5e-4, 2.7e-4)
    assert suspect_of(steady, None) == "block 1"


def drift_of(found: tuple[StageDrift, ...], parted: str | None, suspect: str | None) -> Drift:
    return Drift("a", "b", Dtype.FP32, found, parted, suspect, (), None, ())


def test_it_is_said_in_a_sentence() -> None:
    steady = stages(0.0, 1e-4, math.sqrt(5) * 1e-4, math.sqrt(6) * 1e-4)  # adding 1e-4, 2e-4, 1e-4
    assert drift_of(steady, None, "block 1").sentence == (
        "No stage is past what is allowed; block 1 adds the most error, 2.0 times the median block."
    )
    assert drift_of(steady, "block 1", "block 1").sentence == (
        "They part at block 1, the first stage whose error is not allowed."
    )
    jumping = stages(1e-5, 1.1e-5, 8e-5, 9e-4)
    assert drift_of(jumping, None, "block 1").sentence.startswith(
        "No stage is past what is allowed; block 1 is the first to add 4 times what any stage "
        "before it does, block 2 adds the most error, "
    )
    exact = drift_of(stages(0.0, 0.0, 0.0, 0.0), None, "block 0")
    assert exact.sentence.endswith("block 0 adds the most error.")
    assert exact.passed


def test_headroom_is_how_often_the_peak_fits_below_65504() -> None:
    tensor = TensorDrift("block 0", 1.0, 1.0, 0.0, 0.0, 2.0, 0, 0)
    assert StageDrift(tensor, 0.0, 1.0, 32752.0, "x").headroom == 2.0
    assert StageDrift(tensor, 0.0, 1.0, 0.0, "x").headroom == math.inf


def test_a_peak_inside_the_block_counts_and_is_named() -> None:
    gathered = compared({"block 0": 0.0})
    (found,) = stages_of(gathered, {"block 0": (99.0, "mlp.fc1")}, {"block 0": 1.0})
    assert (found.peak, found.peak_tensor) == (99.0, "mlp.fc1")


def test_a_peak_that_is_no_number_is_none_that_fits() -> None:
    batch = np.array([[1.0, np.nan]])
    exact = {"block 0": 0.0}
    gathered = compare_streams(Shown(exact), Shown(exact), [(batch, batch)], exact)
    (found,) = stages_of(gathered, {"block 0": (1.0, "mlp.fc1")}, {"block 0": 1.0})
    assert math.isnan(found.peak)


# --- shapes ---------------------------------------------------------------------------------------


def test_a_side_with_one_token_is_compared_at_that_token() -> None:
    comparison = TensorComparison("block 1")
    tokens = np.arange(24.0).reshape(2, 3, 4) + 1
    comparison.add(tokens, tokens[:, :1] * 2)
    assert comparison.drift().first_token
    assert comparison.drift().relative == pytest.approx(1.0)


@pytest.mark.parametrize("other", [(2, 2, 4), (2, 3, 5), (3, 1, 4), (2, 12)])
def test_any_other_shape_is_refused_or_left_out(other) -> None:
    tokens = np.ones((2, 3, 4))
    assert not first_tokens(tokens, np.ones(other))

    class Other(Shown):
        def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
            return {"block 0": np.ones(other)}

    sides = Shown({"block 0": 0.0}), Other({})
    with pytest.raises(ToleranceError, match=r"block 0: output has shape .* they must be the same"):
        compare_streams(*sides, [(tokens, tokens)], ["block 0"])
    assert compare_streams(*sides, [(tokens, tokens)], ["block 0"], strict=False) == {}


def test_nothing_compared_is_no_agreement() -> None:
    with pytest.raises(ToleranceError, match="no image was compared; an empty set is not a pass"):
        TensorComparison("block 0").drift()
