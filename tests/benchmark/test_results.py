"""Times become figures: robust to what disturbs a round, each contender first in turn."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.benchmark.results import (
    BUSY,
    NOISY,
    Ratio,
    busy,
    figures,
    footnotes,
    medians,
    milliseconds,
    noise_of,
    ratio_of,
    rotated,
    spread_of,
)
from tests.builders.benches import made_up

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
    assert found["samples_ms"] == ((1, 2, 3), (4, 100))


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("q3", "noisy"), [(0.59, False), (0.6, False), (0.61, True), (2.0, True)])
def test_a_ratio_whose_quartiles_are_far_apart_cannot_be_used(q3, noisy) -> None:
    assert NOISY == 1.2
    found = noise_of(Ratio(0.55, 0.5, q3, 5), [[MS]] * 5, alone=False)
    if noisy:
        assert found == f"quartiles of the ratio are 0.5 and {q3:.3g}, more than 1.2 times apart"
    else:
        assert found is None


def test_a_disturbed_round_is_no_noise_and_half_of_them_are() -> None:
    base = [[10 * MS]] * 8
    assert noise_of(ratio_of([[5 * MS]] * 7 + [[50 * MS]], base), base, alone=False) is None
    mixed = [[5 * MS]] * 4 + [[9 * MS]] * 4
    assert noise_of(ratio_of(mixed, base), mixed, alone=False) is not None


def test_what_is_timed_alone_is_judged_by_its_own_rounds() -> None:
    own = [[5 * MS]] * 4 + [[9 * MS]] * 4
    assert ratio_of(own, own) == Ratio(1, 1, 1, 8)
    assert noise_of(ratio_of(own, own), own, alone=True) == (
        "quartiles of the median of a round are 5 and 9 ms, more than 1.2 times apart"
    )
    assert noise_of(ratio_of(own, own), own, alone=False) is None  # the baseline beside others


def test_the_fastest_is_named_where_nothing_at_its_batch_is_noisy() -> None:
    bench = made_up()
    assert (bench.fastest(1), bench.fastest(8)) == ("model.onnx", "model.onnx")
    noisy = replace(bench.timing("sdpa", 8), noisy="wide")
    timings = tuple(noisy if t == bench.timing("sdpa", 8) else t for t in bench.timings)
    told = replace(bench, timings=timings)
    assert (told.fastest(1), told.fastest(8)) == ("model.onnx", None)
    line = "Too noisy, run again on an idle machine: sdpa at batch 8, wide."
    assert footnotes(told)[0] == line
    assert line not in footnotes(bench)


def test_too_few_rounds_have_no_quartiles_and_no_fastest() -> None:
    assert noise_of(Ratio(1, 0.1, 9, 2), [[MS]] * 2, alone=False) is None
    few = made_up(rounds=2)
    assert few.fastest(1) is None
    told = "2 rounds cannot show whether the machine was disturbed: take --rounds 3 or more."
    assert told in footnotes(few)
    assert not any("cannot show" in line for line in footnotes(made_up()))


@pytest.mark.parametrize(
    ("load", "cores", "reason"),
    [
        (0.0, 2, None),
        (1.0, 2, None),
        (1.01, 2, "load average 1.0 on 2 cores when the run began, more than 1"),
        (2.8, 1, "load average 2.8 on 1 core when the run began, more than 0.5"),
        (8.0, 16, None),
    ],
)
def test_a_machine_with_other_work_cannot_time_anything(load, cores, reason) -> None:
    assert BUSY == 0.5
    assert busy(load, cores) == reason


def test_under_load_no_figure_is_to_be_used() -> None:
    loaded = made_up(load=2.8)
    assert all(one.noisy for one in loaded.timings)
    assert loaded.fastest(1) is None
    first, second = footnotes(loaded)[:2]
    assert first == (
        "Too noisy, run again on an idle machine: every figure, load average 2.8 on 2 cores when "
        "the run began, more than 1. Under load, ratios between different runtimes change from run "
        "to run too, even with narrow quartiles. The average is over one minute: wait that long "
        "after another run."
    )
    assert second == (
        "ratio: time / eager, median over 10 rounds of the ratio within a round (quartiles); * too "
        "noisy to be used."
    )
    both = replace(loaded.timings[0], noisy="wide")
    same = replace(loaded.timings[1], noisy=loaded.busy)
    told = footnotes(replace(loaded, timings=(both, same, *loaded.timings[2:])))
    assert told[:2] == [first, "Too noisy, run again on an idle machine: eager at batch 1, wide."]
    assert told[2] == second


@pytest.mark.parametrize(
    ("time", "text"),
    [(1.0, "1.00"), (0.01234, "0.0123"), (99.96, "100"), (369.4, "369"), (6914.28, "6910")],
)
def test_times_of_a_few_calls_have_three_digits(time, text) -> None:
    assert milliseconds(time) == text


def test_the_spread_of_a_ratio_in_a_manifest_is_described() -> None:
    latency = {"ratio": {"int8": 0.614}, "quartiles": {"int8": [0.6, 0.6249]}, "rounds": 5}
    text = "time ratio 0.614 (quartiles 0.6 to 0.625) over 5 rounds"
    assert spread_of(latency, "int8") == text
    loaded = {**latency, "noisy": busy(2.8, 2)}
    assert spread_of(loaded, "int8") == (
        f"{text}; Too noisy, use bench on an idle machine: load average 2.8 on 2 cores when the "
        "run began, more than 1"
    )
    assert spread_of({"ratio": {"int8": 0.614}}, "int8") == ""  # of an earlier version
