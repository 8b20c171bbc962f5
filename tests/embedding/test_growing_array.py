"""An array that grows on disk ends as the file numpy.save writes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msn_export.embedding.growing_array import GrowingArray
from msn_export.errors import OutputError


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.integers(1, 5), min_size=1, max_size=6),
    shape=st.sampled_from([(3,), (2, 2), (1,)]),
    dtype=st.sampled_from([np.float32, np.dtype([("class", "<i4"), ("probability", "<f4")])]),
)
def test_whole_it_is_byte_for_byte_what_numpy_saves(tmp_path_factory, steps, shape, dtype) -> None:
    folder = tmp_path_factory.mktemp("growing")
    total = sum(steps)
    rows = np.zeros((total, *shape), dtype)
    rows.view(np.uint8)[...] = (
        np.random.default_rng(total)
        .integers(0, 256, rows.nbytes)
        .reshape(rows.view(np.uint8).shape)
    )
    array, start = GrowingArray(folder / "a.npy", total), 0
    for step in steps:
        assert array.holds(start)
        assert not array.holds(start + 1)
        array.write(start, rows[start : start + step])
        start += step
    np.save(folder / "b.npy", rows)
    assert (folder / "a.npy").read_bytes() == (folder / "b.npy").read_bytes()


def test_rows_may_come_in_any_order_and_again(tmp_path) -> None:
    array = GrowingArray(tmp_path / "a.npy", 4)
    array.write(2, np.full((2, 2), 3, np.float32))
    assert array.holds(4)
    array.write(0, np.ones((2, 2), np.float32))
    array.write(1, np.full((1, 2), 7, np.float32))
    np.testing.assert_array_equal(array.read(0, 4), [[1, 1], [7, 7], [3, 3], [3, 3]])
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), array.read(0, 4))


def test_rows_of_another_shape_are_refused(tmp_path) -> None:
    array = GrowingArray(tmp_path / "a.npy", 4)
    array.write(0, np.ones((1, 2), np.float32))
    with pytest.raises(OutputError, match=r"holds rows of float32\[2\], these are float32\[3\]"):
        array.write(1, np.ones((1, 3), np.float32))


def test_a_header_cut_short_is_damage(tmp_path) -> None:
    array = GrowingArray(tmp_path / "a.npy", 4)
    array.write(0, np.ones((1, 2), np.float32))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:50])
    with pytest.raises(OutputError, match=r"a\.npy is damaged .* start over with --force"):
        array.read(0, 1)
