"""What ``bench --json`` wrote is read for the report, and nothing else is."""

import json
import math
from dataclasses import replace

import pytest

from msn_export.benchmark.results import Contender, read_bench
from msn_export.errors import SpecError
from msn_export.reporting.describe import significant
from msn_export.reporting.gather import timed_on, timing_columns, timing_rows
from msn_export.schema import to_plain
from tests.builders.benches import made_up


def test_a_benchmark_has_its_columns_and_a_row_a_time(tmp_path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(to_plain(made_up())))
    found = read_bench(path, {})
    assert found == made_up()
    assert timing_columns(found) == (
        "what", "batch", "median ms", "p90 ms", "p99 ms", "images/s", "time / baseline",
        "cosine min",
    )  # fmt: skip
    timing, rows = made_up().timings[0], list(timing_rows(found))
    assert len(rows) == len(made_up().timings)
    assert rows[0][:3] == ["eager", "1", significant(timing.median_ms, 4)]
    assert timed_on(found) == "a processor; times over eager; today"


def test_what_was_not_compared_has_no_column_and_what_is_no_number_no_figure(tmp_path) -> None:
    first, second = made_up().timings[:2]
    assert first.agreement is not None
    alone = made_up(timings=(replace(first, agreement=None), second))
    assert timing_columns(alone)[-1] == "time / baseline"
    assert {len(row) for row in timing_rows(alone)} == {7}
    path = tmp_path / "bench.json"
    spoiled = replace(first, agreement=replace(first.agreement, cosine_min=math.nan))
    path.write_text(json.dumps(to_plain(made_up(timings=(spoiled,)))))
    assert [row[-1] for row in timing_rows(read_bench(path, {}))] == [""]


def test_times_of_another_file_of_the_same_name_are_refused(tmp_path) -> None:
    timed = [Contender("m.onnx", "onnx", file="a/m.onnx", sha256="ab" * 32)]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(to_plain(made_up(contenders=tuple(timed)))))
    for hashes in ({}, {"other.onnx": {"cd" * 32}}, {"m.onnx": {"cd" * 32, "ab" * 32}}):
        read_bench(path, hashes)
    with pytest.raises(SpecError) as raised:
        read_bench(path, {"m.onnx": {"cd" * 32}})
    assert str(raised.value) == (
        f"--bench {path} timed another m.onnx (sha256 abababababab…, this one has cdcdcdcdcdcd…); "
        "run msn-export bench again"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"does not exist; write it with 'msn-export bench …"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "is not what 'bench --json' prints: bench.json.baseline is missing"),
        ("3", "is not what 'bench --json' prints: bench.json is 3; expected dict"),
        (json.dumps(to_plain(made_up(timings=()))), "has no timings in it; expected what 'bench"),
        (" " * (64 * 2**20 + 1), "is larger than a benchmark can be"),
    ],
    ids=["absent", "cut short", "deep", "empty", "a number", "no time", "large"],
)
def test_what_is_no_benchmark_is_refused(text, message, tmp_path) -> None:
    path = tmp_path / "bench.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match=f"bench.json {message}"):
        read_bench(path, {})
