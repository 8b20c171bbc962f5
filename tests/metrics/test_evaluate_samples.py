"""Pictures of a check: every picture at least once, at batches that memory affords."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from msn_export import images
from msn_export.errors import ImageError, SpecError
from msn_export.metrics import evaluate as subject
from msn_export.metrics.evaluate import (
    batch_sizes,
    batches,
    draw,
    max_batch_in_memory,
    sizes_without_largest,
    with_drawn,
    with_ragged,
)
from msn_export.preprocessing import preset
from msn_export.spec import BatchRange, ImageSize, InputFormat

SMALL = preset("hf", ImageSize(8, 8))


# --- pictures -------------------------------------------------------------------------------------


def test_without_a_folder_the_noise_is_called_noise() -> None:
    drawn = draw(None, SMALL)
    assert drawn.source == "seeded noise (no --images given)"
    assert drawn.names == ("noise 0", "noise 1", "noise 2", "noise 3")
    np.testing.assert_array_equal(drawn.pixels, draw(None, SMALL).pixels)


def test_a_folder_gives_at_most_the_limit_and_names_the_broken(tmp_path) -> None:
    for i in range(20):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "04.png").write_bytes(b"")
    drawn = draw(tmp_path, SMALL, limit=5)
    assert drawn.source == str(tmp_path)
    assert drawn.names == ("00.png", "08.png", "12.png", "16.png")
    assert len(drawn) == 4
    assert len(drawn.broken) == 1
    assert "04.png is not a readable picture" in drawn.broken[0]


def test_a_folder_without_a_picture_is_an_error(tmp_path) -> None:
    with pytest.raises(ImageError, match="holds no picture"):
        draw(tmp_path, SMALL)


def test_a_feed_is_what_the_graph_takes_and_starts_over_past_the_end() -> None:
    drawn = draw(None, SMALL)
    raw = drawn.preprocess([0, 3, 4], InputFormat.UINT8)
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(raw, drawn.pixels[[0, 3, 0]])
    np.testing.assert_array_equal(
        drawn.preprocess(range(3, 5), InputFormat.FLOAT),
        images.normalize(drawn.pixels[[3, 0]], SMALL),
    )


# --- batch sizes ----------------------------------------------------------------------------------

ranges = st.lists(st.integers(1, 64), min_size=3, max_size=3).map(lambda x: BatchRange(*sorted(x)))


@pytest.mark.parametrize(
    ("batch", "max_batch", "sizes"),
    [
        ("1:8:32", 99, (1, 8, 32)),
        ("1:8:32", 10, (1, 8, 10)),
        ("1:8:32", 4, (1, 2, 4)),
        ("1:8:32", 1, (1,)),
        ("1:1:32", 99, (1, 16, 32)),
        ("1:32:32", 99, (1, 16, 32)),
        ("4", 99, (4,)),
        ("8:8:16", 4, (8,)),  # the smallest is not optional
        ("1:1:2", 99, (1, 2)),
    ],
)
def test_the_smallest_the_largest_and_one_between(batch, max_batch, sizes) -> None:
    assert batch_sizes(BatchRange.parse(batch), max_batch) == sizes


def test_a_batch_that_could_not_be_checked_is_refused() -> None:
    with pytest.raises(SpecError) as raised:
        batch_sizes(BatchRange.parse("64"), 5)
    assert str(raised.value) == (
        "batch 64:64:64: memory affords a check of about 15 images at once; choose a smaller "
        "batch, or a machine with more memory"
    )


@given(ranges, st.integers(22, 99))
def test_every_size_is_one_the_graph_accepts(batch, max_batch) -> None:
    sizes = batch_sizes(batch, max_batch)
    assert sizes[0] == batch.min
    assert list(sizes) == sorted(set(sizes))
    assert sizes[-1] <= max(batch.min, min(batch.max, max_batch))
    assert len(sizes) <= 3


@given(st.lists(st.integers(1, 20), min_size=1, max_size=3, unique=True).map(sorted),
       st.integers(1, 50))  # fmt: skip
def test_each_image_and_each_size_is_run_at_least_once(sizes, count) -> None:
    dealt = list(batches(sizes, count))
    assert [len(batch) for batch in dealt[: len(sizes)]] == sizes
    assert {len(batch) for batch in dealt} == set(sizes)
    assert {index % count for batch in dealt for index in batch} >= set(range(count))
    assert [i for batch in dealt for i in batch] == list(range(sum(map(len, dealt))))


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ((1, 8, 32), 16, (1, 8, 16, 32)),  # the last batch of a folder of 16
        ((1, 8, 32), 40, (1, 8, 32)),  # 8 is the ragged one
        ((1, 8, 32), 64, (1, 8, 17, 32)),  # all full: any size between
        ((1, 2), 16, (1, 2)),
        ((4,), 10, (4,)),  # a graph of one size takes no other
        ((2, 3), 9, (2, 3)),
        ((1,), 5, (1,)),
    ],
)
def test_the_last_batch_of_a_data_set_is_tried(sizes, count, expected) -> None:
    assert with_ragged(sizes, count) == expected


# --- memory ---------------------------------------------------------------------------------------


def test_a_batch_takes_a_quarter_of_what_is_free(monkeypatch) -> None:
    monkeypatch.setattr(subject, "available_memory", lambda: 4 * 2**30)
    # vit-msn-base-4: scores and probabilities of 12 heads over 3137 tokens, fp32, 0.95 GB; 0.12
    # of the MLP and the residual stream
    assert max_batch_in_memory(3137, 768, 3072, 12) == 1
    assert max_batch_in_memory(197, 384, 1536, 6) == 160
    monkeypatch.setattr(subject, "available_memory", lambda: 0)
    assert max_batch_in_memory(197, 384, 1536, 6) == 1


@pytest.mark.parametrize(
    ("sizes", "count", "expected", "runs"),
    [
        ((1, 8, 32), 16, (1, 7, 8), 16),
        ((1, 8, 32), 15, (1, 6, 8), 15),
        ((1, 8, 32), 9, (1, 8), 9),
        ((1, 8, 32), 64, (1, 7, 8), 64),
        ((1, 8, 32), 4, (1, 3), 4),
        ((1, 8, 32), 2, (1, 2), 3),
        ((4, 8, 32), 16, (4, 8), 20),
        ((1, 2), 16, (1, 2), 17),
        ((8,), 16, (8,), 16),
    ],
)
def test_without_the_largest_size_each_image_runs_once_where_it_can(
    sizes, count, expected, runs
) -> None:
    assert sizes_without_largest(sizes, count) == expected
    assert sum(map(len, batches(expected, count))) == runs


def test_sizes_between_are_drawn_by_seed_and_named() -> None:
    sizes, note = with_drawn((1, 8, 32), 0)
    assert sizes == (1, 8, 15, 30, 32)
    assert note == "batch 15 and 30 drawn by seed 0"
    assert with_drawn((1, 8, 32), 1)[0] != sizes
    assert with_drawn((1, 8, 32), 0) == (sizes, note)


@pytest.mark.parametrize("sizes", [(4,), (1, 2), (1, 2, 3)])
def test_where_there_is_no_size_between_none_is_drawn(sizes) -> None:
    assert with_drawn(sizes, 0) == (sizes, "")


def test_one_size_between_is_drawn_alone() -> None:
    assert with_drawn((1, 3), 5) == ((1, 2, 3), "batch 2 drawn by seed 5")
