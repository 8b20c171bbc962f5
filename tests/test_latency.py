"""What ``bench --json`` wrote is read for the report; of a file nobody knows, its table."""

import json

import pytest
from benches import made_up

from msn_export.bench.results import Contender
from msn_export.errors import SpecError
from msn_export.report.latency import read_latency
from msn_export.schema import to_plain


def test_a_benchmark_has_its_own_columns_and_a_bar_a_row(tmp_path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(to_plain(made_up())))
    found = read_latency(path, {})
    assert found.columns == (
        "what", "batch", "median ms", "p90 ms", "p99 ms", "images/s", "time / baseline",
        "cosine min",
    )  # fmt: skip
    timing = made_up().timings[0]
    assert len(found.rows) == len(made_up().timings) == len(found.bars)
    assert found.rows[0][:3] == ("eager", "1", f"{timing.median_ms:.5g}")
    assert found.bars[0] == ("eager, batch 1", timing.median_ms)
    assert found.title == "a processor; times over eager; today"


def test_times_of_another_file_of_the_same_name_are_refused(tmp_path) -> None:
    timed = [Contender("m.onnx", "onnx", file="a/m.onnx", sha256="ab" * 32)]
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(to_plain(made_up(contenders=tuple(timed)))))
    for hashes in ({}, {"other.onnx": {"cd" * 32}}, {"m.onnx": {"cd" * 32, "ab" * 32}}):
        read_latency(path, hashes)
    with pytest.raises(SpecError) as raised:
        read_latency(path, {"m.onnx": {"cd" * 32}})
    assert str(raised.value) == (
        f"--bench {path} timed another m.onnx (sha256 abababababab…, this one has cdcdcdcdcdcd…); "
        "run msn-export bench again"
    )


@pytest.mark.parametrize("contenders", [3, [3], [{"file": 3, "sha256": 3}], [{"file": "m.onnx"}]])
def test_contenders_of_another_tool_are_not_looked_up(tmp_path, contenders) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({**to_plain(made_up()), "contenders": contenders}))
    assert read_latency(path, {"m.onnx": {"cd" * 32}}).rows


def test_any_other_list_of_records_is_a_table(tmp_path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps([{"name": "a", "ms": 1.25}, {"name": "b", "ms": None}]))
    found = read_latency(path, {})
    assert found.columns == ("name", "ms")
    assert found.rows == (("a", "1.25"), ("b", ""))
    assert found.bars == ()
    assert found.title == "other.json"


@pytest.mark.parametrize("notes", [None, 3, {"a": 1}])
def test_notes_that_are_no_list_are_none(tmp_path, notes) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({**to_plain(made_up()), "notes": notes}))
    assert read_latency(path, {}).notes == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"cannot be read as JSON \(.*No such file.*\); write it with 'msn-export bench …"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "has no timings in it; expected what 'bench --json' prints"),
        ('{"timings": [1, 2]}', "has no timings in it"),
        ("3", "has no timings in it"),
        (" " * (16 * 2**20 + 1), "is larger than a benchmark can be"),
    ],
    ids=["absent", "cut short", "deep", "empty", "numbers", "a number", "large"],
)
def test_what_is_no_benchmark_is_refused(text, message, tmp_path) -> None:
    path = tmp_path / "bench.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpecError, match=f"--bench .*bench.json {message}"):
        read_latency(path, {})
