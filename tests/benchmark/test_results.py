"""Times become figures: robust to what disturbs a round, each contender first in turn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.benchmark.results import figures, medians, ratio_of, rotated

MS = 1_000_000


@given(st.integers(1, 6), st.integers(0, 100))
def test_in_as_many_rounds_as_there_are_each_has_each_place_once(count, start) -> None:
    names = [str(index) for index in range(count)]
    orders = [rotated(names, turn) for turn in range(start, start + count)]
    assert {tuple(sorted(order)) for order in orders} == {tuple(names)}
    for place in range(count):
        assert sorted(order[place] for order in orders) == names


def test_a_disturbed_round_does_not_move_the_ratio() -> None:
    quiet, slow = [[10 * MS] * 3, [5 * MS] * 3], [[400 * MS] * 3, [200 * MS] * 3]
    base = [quiet[0]] * 9 + [slow[0]]
    fast = [quiet[1]] * 9 + [slow[1]]
    ratio = ratio_of(fast, base)
    assert (ratio.q1, ratio.median, ratio.q3, ratio.rounds) == (0.5, 0.5, 0.5, 10)


def test_figures_are_of_all_calls() -> None:
    rounds = [[1 * MS, 2 * MS, 3 * MS], [4 * MS, 100 * MS]]
    found = figures(rounds, batch=8)
    assert found["calls"] == 5
    assert found["median_ms"] == 3
    assert found["mean_ms"] == 22
    assert found["min_ms"] == 1
    assert found["p90_ms"] == pytest.approx(np.percentile([1, 2, 3, 4, 100], 90))
    assert found["images_per_second"] == pytest.approx(8 / 0.003)
    assert found["rounds_ms"] == (2, 52)
    assert medians(rounds) == [2, 52]
