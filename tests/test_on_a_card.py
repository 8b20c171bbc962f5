"""How the tests that need a card run: in which order, until when, and what is written of each."""

import json
import os
import subprocess
import sys
from pathlib import Path

from on_a_card import ORDER, rank

HERE = Path(__file__).parent


def run(*options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu",
         HERE / "gpu", HERE / "test_trt_runner.py", *options],
        cwd=HERE.parent, capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def test_every_row_of_the_order_finds_tests_and_the_telling_ones_are_first() -> None:
    done = run("--collect-only")
    assert done.returncode == 0, done.stdout
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    ranks = [rank(test) for test in tests]
    assert ranks == sorted(ranks)
    assert set(range(len(ORDER))) <= set(ranks)
    assert "test_trt_runner" in tests[0]
    first = next(test for test in tests if "test_trt_runner" not in test)
    assert "agrees" in first
    assert "vit-msn-small" in first
    assert "fp16" in first
    assert "vit-msn-large-7" in tests[-1]


def test_what_does_not_begin_within_the_budget_is_skipped_and_written(tmp_path) -> None:
    file = tmp_path / "folder" / "results.jsonl"
    done = run("--budget", "0", "--results", file, "-n", "1")
    assert done.returncode == 0, done.stdout
    machine, *tests = [json.loads(line) for line in file.read_text().splitlines()]
    assert "reason" in machine["driver"] or machine["driver"]["devices"]
    assert machine["versions"]["torch"]
    assert len(tests) > 100
    assert {test["outcome"] for test in tests} == {"skipped"}
    assert {test["why"] for test in tests} == {"Skipped: not begun: the 0 s of --budget are over"}


def test_without_a_card_each_is_skipped_with_the_reason(tmp_path) -> None:
    file = tmp_path / "results.jsonl"
    done = run("--results", file)
    assert done.returncode == 0, done.stdout
    tests = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert len(tests) > 100
    assert all("NVIDIA driver" in test["why"] for test in tests)
