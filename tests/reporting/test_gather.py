"""What ``bench --json`` wrote is read for the report, and nothing else is."""

import json
import math
from dataclasses import replace

import pytest

from msn_export.benchmark.results import Contender, read_bench
from msn_export.errors import SpecError
from msn_export.reporting.describe import significant
from msn_export.reporting.gather import (
    recorded_agreement,
    timed_on,
    timing_columns,
    timing_rows,
)
from msn_export.schema import to_plain
from tests.builders.benches import made_up
from tests.builders.manifests import check, example


def test_a_benchmark_has_its_columns_and_a_row_a_time(tmp_path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(to_plain(made_up())))
    found = read_bench(path, {})
    assert found == made_up()
    assert timing_columns(found) == (
        "what", "runs in", "precision", "threads", "batch", "median ms", "p90 ms", "p99 ms",
        "images/s", "time / baseline", "cosine min",
    )  # fmt: skip
    timing, rows = made_up().timings[0], list(timing_rows(found))
    assert len(rows) == len(made_up().timings)
    median = significant(timing.median_ms, 4)
    assert rows[0][:6] == ["eager", "somewhere", "fp32", "2", "1", median]
    assert timed_on(found) == "a processor; times over eager; today"


def test_what_was_not_compared_has_no_column_and_what_is_no_number_no_figure(tmp_path) -> None:
    first, second = made_up().timings[:2]
    assert first.agreement is not None
    alone = made_up(timings=(replace(first, agreement=None), second))
    assert timing_columns(alone)[-1] == "time / baseline"
    assert {len(row) for row in timing_rows(alone)} == {10}
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


def test_a_row_says_what_it_was_computed_in_and_whether_it_can_be_used() -> None:
    first, *rest = made_up().timings
    odd = replace(first, split="in pieces of 8", noisy="wide")
    bench = made_up(timings=(odd, *rest))
    contender = replace(bench.contenders[0], precision="8 of 8 products in int8", threads=None)
    bench = replace(bench, contenders=(contender, *bench.contenders[1:]))
    row, other, *_ = timing_rows(bench)
    assert row[2:5] == ["8 of 8 products in int8", "", "1, in pieces of 8"]
    assert row[9].endswith(" *")
    assert not other[9].endswith("*")
    assert all(row[9].endswith(" *") for row in timing_rows(made_up(load=9.0)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "fp16: first-percentile cosine at least 0.999, relative error at most 0.02, norm"),
        ({"gate": {"relative": 0.1}}, "fp16: relative error at most 0.1"),
        (
            {"limits": {"logits": {"relative": 2.7e-6}}, "limits_from": "4 times the errors"},
            "fp16: relative error at most 2.7e-06 (measured: 4 times the errors)",
        ),
        (
            {
                "limits": {"a": {"relative": 0.076}, "b": {"relative": 0.08}},
                "gate": {"classes": 0.9},
            },
            "fp16: relative error at most 7.6e-02 in a, 8.0e-02 in b (measured); share of images "
            "of the same class at least 0.9",
        ),
    ],
)
def test_the_gate_is_the_limit_that_counted(changes, words) -> None:
    found = recorded_agreement("m.onnx", example(check=check(**changes), engine=None))
    assert found.gate.startswith(words)
