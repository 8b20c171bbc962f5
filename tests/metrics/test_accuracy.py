"""Accuracy has an interval, neighbours vote, and twelve images are not read as proof."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.neighbors import KNeighborsClassifier

from msn_export.errors import ToleranceError
from msn_export.metrics.accuracy import Answers, accuracy, votes, wilson


def test_accuracy_counts_what_is_right() -> None:
    scores = np.array([[3.0, 1, 0], [0, 2, 1], [5, 4, 0], [np.nan, 9, 0]])
    found = accuracy(scores, np.array([0, 1, 1, 1]), ("a", "b", "c"))
    assert found.top1 == 0.5
    assert found.top5 is None
    assert found.per_class == {"a": 1.0, "b": pytest.approx(1 / 3), "c": None}
    assert found.confusion == ((1, 0, 0), (1, 1, 0), (0, 0, 0))
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
