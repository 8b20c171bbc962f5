"""How the tests that need a card run: in which order, until when, and what is written of each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.on_a_card import ORDER, rank

ROOT = Path(__file__).parent.parent.parent
FEW = """
import os
import pytest
pytestmark = pytest.mark.gpu

def test_ends_the_process():
    os._exit(7)

@pytest.mark.parametrize("number", [1, 2])
def test_counts(number):
    assert number == 1
"""
NAMES = ("test_ends_the_process", "test_counts[1]", "test_counts[2]")


def run(results: Path, *options: str | Path, cwd: Path = ROOT) -> list[dict[str, Any]]:
    """Run tests of a card where there is none, and read what is written of each."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu",
         "--results", results, *options],
        cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    machine, *tests = [json.loads(line) for line in results.read_text().splitlines()]
    assert "reason" in machine["driver"] or machine["driver"]["devices"], done.stdout
    assert machine["versions"]["torch"]
    return tests


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What is written of this suite's tests of a card, in the order in which they ran."""
    results = tmp_path_factory.mktemp("card") / "results.jsonl"
    return run(results, "tests/gpu", "tests/runtime/test_tensorrt.py")


def test_every_row_of_the_order_finds_tests_and_the_telling_ones_are_first(tests) -> None:
    names = [test["test"] for test in tests]
    ranks = [rank(name) for name in names]
    assert ranks == sorted(ranks)
    assert set(range(len(ORDER))) <= set(ranks)
    assert "runtime/test_tensorrt" in names[0]
    first = next(name for name in names if "runtime/test_tensorrt" not in name)
    assert "agrees" in first
    assert "vit-msn-small" in first
    assert "fp16" in first
    assert "vit-msn-large-7" in names[-1]


def test_without_a_card_each_is_skipped_with_the_reason(tests) -> None:
    assert len(tests) > 100
    assert {test["outcome"] for test in tests} == {"skipped"}
    assert all("NVIDIA driver" in test["why"] for test in tests)


@pytest.fixture
def few(tmp_path: Path) -> tuple[str | Path, ...]:
    """A suite of three tests that need no card."""
    file = tmp_path / "test_few.py"
    file.write_text(FEW)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    return ("-p", "tests.contracts.on_a_card", file)


def test_what_does_not_begin_within_the_budget_is_skipped_and_written(few, tmp_path) -> None:
    tests = run(tmp_path / "folder" / "results.jsonl", *few, "--budget", "0", cwd=tmp_path)
    assert [test["outcome"] for test in tests] == ["skipped"] * 3
    assert {test["why"] for test in tests} == {"Skipped: not begun: the 0 s of --budget are over"}


def test_a_test_that_ends_its_process_is_written_and_the_next_goes_on(few, tmp_path) -> None:
    options = ("-n", "1", "--budget", "600")
    tests = run(tmp_path / "results.jsonl", *few, *options, cwd=tmp_path)
    why = {test["test"].partition("::")[2]: (test["outcome"], test["why"]) for test in tests}
    assert [outcome for outcome, _ in (why[name] for name in NAMES)] == [
        "failed",
        "passed",
        "failed",
    ]
    assert "crashed while running" in why[NAMES[0]][1]
    assert "assert 2 == 1" in why[NAMES[2]][1]
