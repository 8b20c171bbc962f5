"""The batch sizes a check runs at."""

import pytest

from msn_export.check.sample import with_ragged


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
