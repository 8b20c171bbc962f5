"""Nearest neighbours: the answer of a search, the same or not."""

import numpy as np
import pytest

from msn_export.errors import ToleranceError
from msn_export.metrics.metrics import class_agreement, embedding_of, nearest, neighbour_agreement

EMBEDDINGS = np.array([[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.9, 0.2]], np.float32)


def test_the_nearest_is_another_image_by_angle_not_by_length() -> None:
    assert nearest(EMBEDDINGS * [[1], [100], [0.01], [3]]).tolist() == [1, 0, 3, 2]


def test_agreement_is_the_share_of_images_with_the_same_nearest() -> None:
    assert neighbour_agreement(EMBEDDINGS, EMBEDDINGS * 2) == 1.0
    moved = EMBEDDINGS.copy()
    moved[0] = [0.1, 1, 0.05]  # near the last two: it and image 1 find others
    assert neighbour_agreement(EMBEDDINGS, moved) < 1.0


def test_of_two_images_each_is_the_others_neighbour_whatever_they_are() -> None:
    assert neighbour_agreement(EMBEDDINGS[:2], -EMBEDDINGS[2:]) is None


def test_classes_agree_where_the_largest_logit_does() -> None:
    logits = np.array([[0, 1], [1, 0], [2, 3], [1, 0]], np.float32)
    other = logits[:, ::-1].copy()
    other[0] = [5, 6]
    assert class_agreement(logits, other) == 0.25
    other[0, 1] = np.inf
    assert class_agreement(logits, other) == 0.0


def test_an_embedding_that_is_not_finite_agrees_with_nothing() -> None:
    broken = EMBEDDINGS.copy()
    broken[2] = np.nan
    assert neighbour_agreement(EMBEDDINGS, broken) <= 0.75
    assert neighbour_agreement(broken, broken) <= 0.75


def test_one_that_is_finite_on_one_side_alone_agrees_with_nothing_either_way() -> None:
    broken = EMBEDDINGS.copy()
    broken[1] = np.nan  # argmax of NaNs answers 0, which is the true neighbour of image 1
    assert nearest(broken)[1] == nearest(EMBEDDINGS)[1] == 0
    assert neighbour_agreement(EMBEDDINGS, broken) == 0.25
    assert neighbour_agreement(broken, EMBEDDINGS) == 0.25


def test_too_few_images_and_other_shapes_are_refused() -> None:
    with pytest.raises(ToleranceError, match="1 image has no neighbour; give at least two"):
        nearest(EMBEDDINGS[:1])
    with pytest.raises(ToleranceError, match="they must be the same"):
        neighbour_agreement(EMBEDDINGS, EMBEDDINGS[:3])


def test_tokens_are_read_by_their_first() -> None:
    tokens = np.arange(24).reshape(2, 3, 4)
    assert embedding_of(tokens).tolist() == [[0, 1, 2, 3], [12, 13, 14, 15]]
    assert embedding_of(np.ones((2, 5))).shape == (2, 5)
