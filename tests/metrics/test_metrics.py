"""Agreement is measured image by image, and nothing that is no number is lost."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from msn_export.errors import ToleranceError
from msn_export.metrics.metrics import Agreement, Comparison, Errors, worst_of


def compare(want, have) -> Agreement:
    comparison = Comparison()
    comparison.add(np.asarray(want, np.float32), np.asarray(have, np.float32))
    return comparison.agreement()


def test_each_figure_is_what_it_says() -> None:
    found = compare([[3.0, 4.0], [1.0, 0.0]], [[3.0, 4.5], [0.0, 2.0]])
    assert found.images == 2
    assert found.max_abs == 2.0
    assert found.mean_abs == (0 + 0.5 + 1 + 2) / 4
    assert found.cosine_min == 0.0  # at right angles
    assert found.norm_ratio_min == math.hypot(3, 4.5) / 5
    assert found.norm_ratio_max == 2.0
    assert found.reference_rms == math.sqrt((9 + 16 + 1) / 4)
    assert found.cosine_median == pytest.approx((9 + 18) / 5 / math.hypot(3, 4.5) / 2)
    assert (found.nan, found.inf) == (0, 0)
    assert found.to_json()["max_abs"] == 2.0


vectors = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(1, 5)),
    elements=st.floats(-1e3, 1e3, width=32).filter(lambda x: abs(x) > 1e-3),
)


@given(vectors)
def test_a_thing_agrees_with_itself(array) -> None:
    found = compare(array, array)
    assert found.max_abs == found.mean_abs == 0
    assert found.cosine_min == pytest.approx(1)
    assert found.norm_ratio_min == found.norm_ratio_max == 1


@given(vectors, st.integers(1, 6))
def test_it_does_not_matter_how_images_are_dealt_into_batches(array, size) -> None:
    have = array + np.float32(0.5)
    parts = Comparison()
    for start in range(0, len(array), size):
        parts.add(array[start : start + size], have[start : start + size])
    for part, whole in zip(
        parts.agreement().to_json().values(), compare(array, have).to_json().values(), strict=True
    ):
        assert part is whole is None or part == pytest.approx(whole, nan_ok=True, rel=1e-5)


@given(vectors, st.floats(0.25, 4))
def test_scaling_the_candidate_moves_the_norm_and_not_the_cosine(array, factor) -> None:
    found = compare(array, array * np.float32(factor))
    assert found.cosine_min == pytest.approx(1, abs=1e-6)
    assert found.norm_ratio_min == pytest.approx(factor, rel=1e-6)


def test_an_image_is_one_vector_whatever_its_shape() -> None:
    want, have = np.ones((2, 3, 4), np.float32), np.ones((2, 3, 4), np.float32)
    have[1, 2, 3] = 2
    comparison = Comparison()
    comparison.add(want, have)
    assert comparison.cosines == [pytest.approx(1), pytest.approx(13 / math.sqrt(12 * 15))]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize(("number", "count"), [(math.nan, "nan"), (math.inf, "inf")])
def test_what_is_no_number_is_counted_in_either_side(side, number, count) -> None:
    pair = [np.ones((3, 2), np.float32) for _ in range(2)]
    pair[side][1, 0] = number
    found = compare(*pair)
    assert getattr(found, count) == 1
    assert not math.isfinite(found.max_abs)
    assert math.isnan(found.cosine_min)
    assert math.isnan(found.cosine_p1)


def test_a_reference_of_zeros_has_no_direction() -> None:
    assert math.isnan(compare([[0.0, 0.0]], [[0.0, 0.0]]).cosine_min)
    found = compare([[0.0, 0.0]], [[0.0, 2.0]])  # which warns of no division
    assert math.isnan(found.cosine_min)
    assert found.norm_ratio_max == found.image == math.inf


def test_large_fp16_values_do_not_overflow_on_the_way() -> None:
    comparison = Comparison()
    comparison.add(np.full((1, 999), 6e4, np.float16), np.full((1, 999), 6e4, np.float16))
    assert comparison.agreement().cosine_min == pytest.approx(1)


def test_tokens_too_far_apart_for_fp32_are_infinitely_wrong() -> None:
    want = np.full((1, 2, 2), 3e38, np.float32)
    assert compare(want, -want).worst_token == math.inf


@pytest.mark.parametrize("shape", [(2, 3), (1, 2), (2, 1), (2, 2, 1)])
def test_nothing_is_broadcast(shape) -> None:
    with pytest.raises(ToleranceError) as raised:
        Comparison().add(np.ones((2, 2)), np.ones(shape))
    assert str(raised.value) == (
        f"output has shape {list(shape)} and its reference [2, 2]; they must be the same"
    )


def test_outputs_without_numbers_agree_in_nothing() -> None:
    with pytest.raises(ToleranceError) as raised:
        Comparison().add(np.ones((2, 0)), np.ones((2, 0)))
    assert str(raised.value) == "output has shape [2, 0], which holds no numbers to compare"


def test_an_empty_set_agrees_with_nothing() -> None:
    with pytest.raises(ToleranceError, match="no image was compared; an empty set is not a pass"):
        Comparison().agreement()
    with pytest.raises(ToleranceError, match="no output was compared; an empty set is not a pass"):
        worst_of([])


def test_of_several_outputs_each_figure_is_the_worst() -> None:
    good = compare([[1.0, 2.0]] * 2, [[1.0, 2.0]] * 2)
    bad = compare([[1.0, 2.0]], [[1.0, 2.5]])
    worst = worst_of([good, bad])
    assert worst == replace(
        bad,
        norm_ratio_min=1.0,
        reference_rms=min(good.reference_rms, bad.reference_rms),
        spread=good.spread,
        centred=worst.centred,
    )
    broken = compare([[1.0, 2.0]], [[1.0, math.nan]])
    for order in ([good, broken], [broken, good]):
        assert math.isnan(worst_of(order).max_abs)
        assert worst_of(order).nan == 1
    assert {field.name for field in fields(Agreement)} == set(worst.to_json())


def test_relative_error_is_that_of_the_whole_set() -> None:
    comparison = Comparison()
    reference = np.array([[3.0, 4.0], [0.0, 5.0]])
    comparison.add(reference, reference + np.array([[0.3, 0.4], [0.0, 0.0]]))
    agreement = comparison.agreement()
    assert agreement.relative == pytest.approx((0.25 / 50) ** 0.5)
    better = replace(agreement, relative=1e-9, rounding=1.5)
    assert worst_of([agreement, better]).relative == agreement.relative
    assert worst_of([agreement, better]).rounding == 1.5  # where it was not measured it counts not


# --- tokens, embeddings, references in fp64 -------------------------------------------------------


def tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


def added(want, have, exact=None) -> Agreement:
    comparison = Comparison()
    comparison.add(want, have, exact)
    return comparison.agreement()


def test_one_token_among_many_is_judged_by_itself() -> None:
    want = tokens(2, 200, 4)
    have = want.copy()
    have[1, 0] = 0  # the [CLS] of one image
    found = added(want, have)
    assert found.relative < 0.1
    rms = np.sqrt(np.mean(np.square(np.linalg.norm(want[:, 0], axis=1))))
    assert found.cls_image == pytest.approx(np.linalg.norm(want[1, 0]) / rms)
    assert found.cls == pytest.approx(np.linalg.norm(want[1, 0]) / np.linalg.norm(want[:, 0]))
    assert math.isnan(found.cls_cosine)
    rms = np.sqrt(np.mean(np.square(np.linalg.norm(want, axis=2))))
    assert found.worst_token == pytest.approx(np.linalg.norm(want[1, 0]) / rms)
    assert found.token == 0  # one of 400
    have[:, 5:15] *= 1.5
    assert 0.5 < added(want, have).token < 1  # some of the larger ones
    flat = added(want[:, 0], have[:, 0])
    assert (flat.cls, flat.token, flat.worst_token, flat.cls_cosine) == (None,) * 4


def test_a_wrong_image_shows_however_many_are_right() -> None:
    want = tokens(500, 8)
    have = want.copy()
    have[123] *= -1
    found = added(want, have)
    rms = np.sqrt(np.mean(np.square(np.linalg.norm(want, axis=1))))
    assert found.image == pytest.approx(2 * np.linalg.norm(want[123]) / rms)
    assert found.relative < 0.1


@pytest.mark.parametrize("mean", [0.0, 30.0, 1e6])
def test_what_ignores_its_image_is_as_wrong_as_images_are_apart(mean) -> None:
    want = tokens(50, 8) + mean
    constant = np.broadcast_to(want.mean(axis=0), want.shape)
    found = added(want, constant)
    assert found.centred == pytest.approx(1, rel=1e-6)
    assert found.spread == pytest.approx(
        np.linalg.norm(want - want.mean(axis=0)) / np.linalg.norm(want), rel=1e-6
    )
    assert added(want, want).centred == 0


@pytest.mark.parametrize("mean", [0.0, 30.0, 1e6])
def test_an_error_that_all_embeddings_share_leaves_them_apart(mean) -> None:
    want = tokens(50, 8) + mean
    shift = 100 * tokens(1, 8)
    assert added(want, want + shift).centred == pytest.approx(0, abs=1e-6)
    assert added(want, want.mean(axis=0) + 0 * want + shift).centred == pytest.approx(1, rel=1e-6)


def test_one_image_is_nowhere_apart() -> None:
    found = added(tokens(1, 8), tokens(1, 8))
    assert (found.spread, found.centred) == (None, None)


def test_rows_whose_reference_is_in_fp64_are_judged_and_the_others_apart() -> None:
    want = tokens(4, 3, 8)
    have = want.copy()
    have[0] *= 1.1
    have[3] *= 1.5
    found = added(want, have, [True, True, False, False])
    size = np.sqrt(np.mean(np.square(np.linalg.norm(want.reshape(4, -1), axis=1))))
    assert found.image == pytest.approx(0.1 * np.linalg.norm(want[0]) / size)
    assert found.relative == pytest.approx(0.1 * np.linalg.norm(want[0]) / np.linalg.norm(want[:2]))
    first = np.sqrt(np.mean(np.square(np.linalg.norm(want[:, 0], axis=1))))
    assert found.cls_image == pytest.approx(0.1 * np.linalg.norm(want[0, 0]) / first)
    largest = np.linalg.norm(want[0], axis=1).max()
    assert found.worst_token == pytest.approx(0.1 * largest / (size / np.sqrt(3)))
    assert found.others.image == pytest.approx(0.5 * np.linalg.norm(want[3]) / size)
    last = np.linalg.norm(want[2:, 0])
    assert found.others.cls == pytest.approx(0.5 * np.linalg.norm(want[3, 0]) / last)
    assert found.to_json()["others"] == found.others.image
    whole = added(want, have)
    assert whole.others is None
    assert whole.image == found.others.image


def test_numbers_and_indices_are_not_compared() -> None:
    with pytest.raises(ToleranceError) as raised:
        Comparison().add(np.ones((2, 3), np.float32), np.ones((2, 3), np.int64))
    assert str(raised.value) == (
        "output is int64 and its reference float32; they must be of one kind"
    )


def test_errors_are_scaled_and_bounded_figure_by_figure() -> None:
    errors = Errors(1.0, 2.0, cls=3.0)
    assert errors.times(2) == Errors(2.0, 4.0, cls=6.0)
    assert errors.at_least(2.0) == Errors(2.0, 2.0, cls=3.0)
    assert errors.at_least(Errors(5.0, 1.0, 9.0, 9.0)) == Errors(5.0, 2.0, 9.0)
    assert math.isnan(errors.at_least(Errors(math.nan, 1.0)).relative)
    assert Errors.uniform(0.5).to_json() == dict.fromkeys(
        ("relative", "image", "cls", "cls_image", "token", "worst_token"), 0.5
    )


def test_an_image_whose_output_is_small_by_chance_is_no_worse_for_it() -> None:
    want = tokens(4, 8)
    want[2] *= 1e-6
    found = added(want, want + 1e-3)
    assert found.image == pytest.approx(
        1e-3 * np.sqrt(8) / np.sqrt(np.mean(np.square(np.linalg.norm(want, axis=1))))
    )
