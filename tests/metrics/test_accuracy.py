"""Accuracy has an interval, neighbours vote, and twelve images are not read as proof."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.neighbors import KNeighborsClassifier

from msn_export.errors import ToleranceError
from msn_export.metrics.accuracy import (
    CONFUSED,
    Answers,
    ConfusedPair,
    accuracy,
    answers_of_neighbours,
    caution,
    compared,
    failures,
    loss_bound,
    mcnemar,
    notes,
    votes,
    wilson,
)


def test_accuracy_counts_what_is_right() -> None:
    scores = np.array([[3.0, 1, 0], [0, 2, 1], [5, 4, 0], [np.nan, 9, 0]])
    found = accuracy(scores, np.array([0, 1, 1, 1]), ("a", "b", "c"))
    assert found.top1 == 0.5
    assert found.top5 is None
    assert found.per_class == {"a": 1.0, "b": pytest.approx(1 / 3), "c": None}
    assert found.class_images == {"a": 1, "b": 3, "c": 0}
    assert found.confusion == ((1, 0, 0), (1, 1, 0), (0, 0, 0))
    assert found.confused == (ConfusedPair("b", "a", 1),)
    assert found.sentence == "50.0% of 4 images (15.0% to 85.0%)"


def test_top_5_counts_the_right_class_among_the_best_five() -> None:
    scores = np.tile(np.arange(8.0), (2, 1))
    names = tuple("abcdefgh")
    assert accuracy(scores, np.array([7, 3]), names).top5 == 1.0
    assert accuracy(scores, np.array([7, 2]), names).top5 == 0.5


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 40))
def test_batches_count_what_all_images_together_do(seed, classes, images) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.standard_normal((images, classes)), rng.integers(0, classes, images)
    scores[rng.random(images) < 0.1] = np.nan
    names = tuple(map(str, range(classes)))
    cut = rng.integers(0, images + 1)
    parts = [Answers.of(scores[part], labels[part]) for part in (slice(cut), slice(cut, None))]
    assert Answers.joined(parts).accuracy(labels, names) == accuracy(scores, labels, names)


def test_ten_thousand_classes_are_counted_without_their_pairs() -> None:
    names = tuple(map(str, range(10_000)))
    scores = np.eye(10_000, dtype=np.float32)[[5, 9_999, 17]]
    found = accuracy(scores, np.array([5, 9_999, 18]), names)
    assert found.top1 == pytest.approx(2 / 3)
    assert found.confusion is None
    assert found.per_class["9999"] == 1.0
    assert found.per_class["18"] == 0.0


def test_of_many_classes_only_the_most_confused_pairs_are_given() -> None:
    classes = tuple(f"c{number:05}" for number in range(10 * CONFUSED))
    labels = np.arange(40) % 4
    scores = np.zeros((40, len(classes)), np.float32)
    scores[np.arange(40), np.where(labels == 3, 9_999, labels)] = 1
    scores[0, 5] = 2
    found = accuracy(scores, labels, classes)
    assert found.confusion is None
    assert found.confused == (
        ConfusedPair("c00003", "c09999", 10), ConfusedPair("c00000", "c00005", 1)
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 2), (3, 3), (0, 3)])
def test_scores_of_another_shape_are_refused(shape) -> None:
    with pytest.raises(ToleranceError, match=r"expected \[\d, 3\] for one image or more"):
        accuracy(np.zeros(shape), np.zeros(2 if shape[0] else 0, int), ("a", "b", "c"))


def test_wilsons_interval_is_the_published_one() -> None:
    # R. G. Newcombe, Statistics in Medicine 1998, table I: 81 of 263, 15 of 148, 0 of 20
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_an_interval_holds_its_share(case) -> None:
    hits, of = case
    low, high = wilson(hits, of)
    assert 0 <= low <= hits / of <= high <= 1


def test_neighbours_vote_as_scikit_learns_do() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = rng.standard_normal((60, 8)) + 2 * np.eye(8)[labels]
    queries = rng.standard_normal((30, 8)) + 2 * np.eye(8)[np.arange(30) % 3]

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / 0.07)

    peer = KNeighborsClassifier(20, weights=weights, metric="cosine").fit(features, labels)
    ours = votes(features, labels, 3, queries)
    np.testing.assert_allclose(
        ours / ours.sum(axis=1, keepdims=True), peer.predict_proba(queries), atol=1e-9
    )


def test_an_image_does_not_vote_for_itself() -> None:
    features = np.array([[1.0, 0], [1, 0.1], [0, 1], [0.1, 1]])
    labels = np.array([0, 1, 1, 1])
    assert votes(features, labels, 2, k=1).argmax(axis=1).tolist() == [1, 0, 1, 1]


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
def test_an_embedding_without_a_direction_votes_for_nothing_and_is_wrong(bad) -> None:
    features = np.array([[1.0, 0], [bad, bad], [0.9, 0.1], [0, 1]])
    labels = np.array([0, 1, 0, 1])
    found = votes(features, labels, 2, k=1)
    assert np.isnan(found[1]).all()
    assert found[[0, 2, 3]].argmax(axis=1).tolist() == [0, 0, 0]
    assert accuracy(found, labels, ("a", "b")).top1 == 0.5


# --- two sides on the same images -----------------------------------------------------------------


def sides(both: int, lost: int, gained: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Make two sides of these counts."""
    counts = (both, lost, gained, neither)
    return np.repeat([True, True, False, False], counts), np.repeat(
        [True, False, True, False], counts
    )


@given(st.integers(0, 200), st.integers(0, 200))
def test_mcnemars_test_is_scipys_binomial_test(lost, gained) -> None:
    wanted = binomtest(lost, lost + gained, alternative="greater").pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(wanted, rel=1e-9)


def test_mcnemars_test_of_very_many_images_is_a_number() -> None:
    assert mcnemar(500_000, 500_000) == pytest.approx(0.5004, abs=1e-4)
    assert mcnemar(40_000, 0) == 0.0


def test_the_bound_of_the_loss_is_the_published_one() -> None:
    # A. Agresti, Categorical Data Analysis, approval ratings: 150 and 86 of 1,600 change sides;
    # the interval of the difference is 0.02 to 0.06
    assert loss_bound(150, 86, 1600, 0.975) == pytest.approx(0.0587, abs=2e-4)
    assert loss_bound(0, 0, 1) < 1


def test_a_bound_is_exceeded_one_time_in_twenty_and_a_sound_candidate_fails_one_in_a_hundred() -> (
    None
):
    rng, runs, images = np.random.default_rng(0), 4000, 300
    drawn = rng.multinomial(images, [0.85, 0.06, 0.03, 0.06], runs)  # 3 points are lost
    exceeded = np.mean([loss_bound(lost, gained, images) < 0.03 for _, lost, gained, _ in drawn])
    assert 0.04 < exceeded < 0.07  # an approximation
    alike = rng.multinomial(images, [0.8, 0.05, 0.05, 0.1], runs)
    alarms = np.mean([not compared(*sides(*counts)).passed for counts in alike])
    assert alarms < 0.01


def test_a_significant_loss_fails_and_a_gain_does_not() -> None:
    found = compared(*sides(500, 41, 4, 54))
    assert (found.lost, found.gained, found.images) == (41, 4, 599)
    assert found.difference == pytest.approx(-37 / 599)
    assert (found.conclusion, found.passed) == ("significant loss", False)
    (reason,) = failures(found)
    assert reason == (
        "accuracy 84.1% of 599 labelled images, the reference's 90.3%: 41 lost, 4 gained, "
        "McNemar's p = 4.7e-09, below 0.01 it is a significant loss"
    )
    gained = compared(*sides(500, 4, 41, 54))
    assert (gained.conclusion, gained.passed) == ("no significant loss", True)
    assert failures(gained) == notes(gained) == []


def test_a_loss_that_is_allowed_does_not_fail_and_is_named() -> None:
    found = compared(*sides(500, 41, 4, 54), allowed=0.07)
    assert (found.conclusion, found.passed) == ("allowed loss", True)
    assert not compared(*sides(500, 41, 4, 54), allowed=0.06).passed


def test_twelve_images_are_no_proof() -> None:
    found = compared(*sides(6, 4, 0, 2))  # 10 of 12 against 6 of 12
    assert (found.conclusion, found.passed) == ("too few images", True)
    assert found.p_value == pytest.approx(1 / 16)
    (note,) = notes(found)
    assert note == (
        "12 labelled images are too few to tell: a loss of up to 51.6 points is not excluded"
    )
    assert compared(*sides(12, 0, 0, 0)).conclusion == "too few images"
    assert compared(*sides(100, 0, 0, 0)).conclusion == "no significant loss"


def test_an_answer_that_is_no_number_fails_however_accurate_the_rest_is() -> None:
    found = compared(*sides(100, 0, 0, 0), not_finite=1)
    assert not found.passed
    assert failures(found) == ["NaN or infinity on 1 of 100 labelled images"]


@pytest.mark.parametrize(("one", "other"), [(0, 0), (3, 2)])
def test_sides_of_other_images_and_of_none_are_refused(one, other) -> None:
    with pytest.raises(ToleranceError, match="expected the same, one or more"):
        compared(np.ones(one, bool), np.ones(other, bool))


def test_few_images_get_a_note() -> None:
    assert caution(30) == ()
    assert caution(29) == ("29 images say little: see the interval",)


# --- a few images at a time -----------------------------------------------------------------------


def test_neighbours_answer_as_their_votes_do(monkeypatch) -> None:
    monkeypatch.setattr("msn_export.metrics.accuracy._ROWS", 16)
    rng = np.random.default_rng(0)
    features, labels = rng.standard_normal((50, 8)), rng.integers(0, 7, 50)
    features[3] = np.nan
    queries, wanted = rng.standard_normal((40, 8)), rng.integers(0, 7, 40)
    for asked in (None, (queries, wanted)):
        given, right = (None, labels) if asked is None else asked
        scores = votes(features, labels, 7, given, k=5)
        found = answers_of_neighbours(features, labels, 7, asked, k=5)
        whole = Answers.of(scores, right)
        np.testing.assert_array_equal(found.guesses, whole.guesses)
        np.testing.assert_array_equal(found.in_five, whole.in_five)
        np.testing.assert_array_equal(found.margins, whole.margins)


def test_the_clearest_mistakes_come_first_and_what_is_no_number_before_them() -> None:
    scores = np.array([[3, 1], [1, 9], [0, 2], [np.nan, 0], [5, 0], [2, 1.5]], np.float32)
    found = Answers.of(scores, np.array([0, 0, 0, 0, 1, 1]))
    assert found.most_wrong(np.array([0, 0, 0, 0, 1, 1]), 4).tolist() == [3, 1, 4, 2]
    assert found.finite.tolist() == [True, True, True, False, True, True]
    huge = np.float32([[3e38, -3e38]])
    assert Answers.of(huge, np.array([1])).margins[0] == pytest.approx(6e38)


def test_some_answers_are_those_of_the_rows() -> None:
    scores = np.random.default_rng(0).standard_normal((9, 7))
    labels, rows = np.arange(9) % 7, np.array([7, 2, 2])
    found, wanted = Answers.of(scores, labels).some(rows), Answers.of(scores[rows], labels[rows])
    for name in ("guesses", "in_five", "margins"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
