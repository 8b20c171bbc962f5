"""Rows are read off a model's outputs; a picture or a number that is broken costs its row alone."""

import numpy as np
import pytest

from msn_export.embedding.inference import (
    PictureBatch,
    Reading,
    Rows,
    joined,
    read_rows,
    reading_of,
    stack,
)
from msn_export.errors import GraphError, SpecError
from msn_export.images import Fitted
from msn_export.spec import ImageSize, Scores, TensorSpec


def spec(name: str, *shape: object, dtype: str = "float") -> TensorSpec:
    return TensorSpec(name, dtype, ("batch", *shape))


def test_the_vector_is_the_embedding_or_what_comes_nearest() -> None:
    both = (spec("last_hidden_state", 5, 8), spec("logits", 3), spec("embedding", 8))
    assert reading_of("m.onnx", both, None) == Reading("embedding", "logits", Scores.SOFTMAX)
    assert reading_of("m.onnx", both[:1], None) == Reading("last_hidden_state", None)
    assert reading_of("m.onnx", (spec("features", 8),), None) == Reading("features", None)
    assert reading_of("m.onnx", both, "logits").vector == "logits"
    with pytest.raises(SpecError, match="has the outputs a, b; choose one with --output-name"):
        reading_of("m.onnx", (spec("a", 8), spec("b", 8)), None)
    with pytest.raises(SpecError, match=r"'c': m\.onnx has no such output; it has a"):
        reading_of("m.onnx", (spec("a", 8),), "c")
    with pytest.raises(GraphError, match=r"output 'a' is int64\['batch', 8\]; expected floats"):
        reading_of("m.onnx", (spec("a", 8, dtype="int64"),), None)


def test_a_broken_picture_is_black_in_its_stack() -> None:
    white = Fitted(np.full((2, 3, 1), 255, np.uint8), turned=True, sha256=b"h" * 32)
    batch = stack([white, "broken", white], ImageSize(2, 3), 1)
    assert batch.pixels.shape == (3, 2, 3, 1)
    assert [picture.any() for picture in batch.pixels] == [True, False, True]
    assert (batch.errors, batch.turned) == ({1: "broken"}, 2)
    assert [row.tobytes() for row in batch.hashes] == [b"h" * 32, bytes(32), b"h" * 32]


def test_batches_that_follow_each_other_are_joined_whatever_their_order() -> None:
    def rows(*values: float, **more: object) -> Rows:
        return Rows(np.array([values], np.float32).T, **more)

    hashes = np.arange(128, dtype=np.uint8).reshape(4, 32)
    first = rows(1.0, 2.0, turned=1, hashes=hashes[:2])
    second = rows(3.0, 4.0, errors={1: "broken"}, hashes=hashes[2:])
    (start, whole), (apart, _) = joined([(8, rows(9.0)), (2, second), (0, first)])
    assert (start, apart) == (0, 8)
    assert whole.vectors.ravel().tolist() == [1, 2, 3, 4]
    assert (whole.errors, whole.turned, whole.best) == ({3: "broken"}, 1, None)
    np.testing.assert_array_equal(whole.hashes, hashes)


def of(count: int) -> PictureBatch:
    """Make a batch of pictures that were all decoded."""
    pixels = np.zeros((count, 2, 3, 1), np.uint8)
    return PictureBatch(pixels, {}, 0, np.zeros((count, 32), np.uint8))


def test_logits_that_are_none_are_errors_too() -> None:
    outputs = {"embedding": np.ones((2, 4)), "logits": np.array([[0, 1], [0, np.nan]])}
    rows = read_rows(outputs, Reading("embedding", "logits"), of(2))
    assert rows.errors == {1: "the model's logits has NaN or infinity"}
    assert np.isnan(rows.vectors[1]).all()
    assert not np.isnan(rows.vectors[0]).any()


def test_a_vector_of_zeros_cannot_be_normalised() -> None:
    outputs = {"embedding": np.array([[3.0, 4.0], [0, 0]], np.float32)}
    rows = read_rows(outputs, Reading("embedding", None, normalize=True), of(2))
    assert rows.vectors[0].tolist() == pytest.approx([0.6, 0.8])
    assert rows.errors == {1: "the model's embedding is zero: it has no direction"}
    assert np.isnan(rows.vectors[1]).all()


def test_of_few_classes_no_more_are_kept() -> None:
    outputs = {"embedding": np.ones((1, 4)), "logits": np.array([[0.0, 2.0, 1.0]])}
    rows = read_rows(outputs, Reading("embedding", "logits", top=5), of(1))
    assert rows.best["class"].tolist() == [[1, 2, 0]]
    assert rows.best["score"].sum() == pytest.approx(1)


@pytest.mark.parametrize("shape", [(2,), (2, 3, 4), (1, 3), (2, 0)])
def test_logits_of_another_shape_are_refused(shape) -> None:
    outputs = {"embedding": np.ones((2, 4)), "logits": np.zeros(shape)}
    with pytest.raises(GraphError) as raised:
        read_rows(outputs, Reading("embedding", "logits"), of(2))
    assert str(raised.value) == (
        f"output 'logits' is {list(shape)} for 2 images; expected [images, classes]"
    )
