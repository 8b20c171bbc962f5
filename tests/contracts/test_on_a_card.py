"""How the tests that need a card run: in which order, until when, and what is written of each."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import card
import pytest

from tests.contracts.on_a_card import CANARY, DEADLINE, ORDER, lines_of, rank, write
from tests.gpu.places import Built, Once

ROOT = Path(__file__).parent.parent.parent
FEW = """
import os
import signal
import time
import pytest
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("number", range(6))
def test_ends_the_process(number):
    os.kill(os.getpid(), signal.SIGSEGV) if number else os._exit(7)

def test_hangs():
    time.sleep(600)

@pytest.mark.parametrize("number", [1, 2])
def test_counts(number):
    assert number == 1
"""


def run(results: Path, *options: str | Path, cwd: Path = ROOT) -> list[dict[str, Any]]:
    """Run tests of a card where there is none, and read what is written of each."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu",
         "--results", results, *options],
        cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    machine = json.loads(results.read_text().splitlines()[0])
    tests = [line for line in lines_of(results) if "outcome" in line]
    assert "reason" in machine["driver"] or machine["driver"]["devices"], done.stdout
    assert machine["versions"]["torch"]
    assert re.fullmatch("[0-9a-f]{40}", machine["commit"])
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
    assert "test_gpu_canary" in names[0]
    assert "runtime/test_tensorrt" in names[1]
    first = next(name for name in names[1:] if "runtime/test_tensorrt" not in name)
    assert "agrees" in first
    assert "vit-msn-small" in first
    assert "fp16" in first
    assert "vit-msn-large-7" in names[-1]


def test_without_a_card_each_is_skipped_with_the_reason(tests) -> None:
    assert len(tests) > 100
    assert {test["outcome"] for test in tests} == {"skipped"}
    assert all("NVIDIA driver" in test["why"] for test in tests)


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A suite that needs no card, of tests that kill, hang, pass and fail; 2 seconds for each."""
    file = tmp_path / "suite" / "test_few.py"
    file.parent.mkdir()
    file.write_text(FEW)
    (file.parent / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(card, "seconds_of", lambda _: 2.0)
    for name in (DEADLINE, CANARY):
        monkeypatch.delenv(name, raising=False)
    return ("-p", "tests.contracts.on_a_card", "-c", str(file.parent / "pytest.ini"), str(file))


def outcomes(folder: Path) -> dict[str, tuple[str, str]]:
    lines = [line for line in lines_of(folder / "results.jsonl") if "outcome" in line]
    return {line["test"].partition("::")[2]: (line["outcome"], line["why"]) for line in lines}


def test_a_crash_or_a_hang_costs_one_test_and_the_order_stays(few, tmp_path) -> None:
    card.run_tests(few, tmp_path, time.time() + 300)
    found = outcomes(tmp_path)
    killed = [f"test_ends_the_process[{number}]" for number in range(6)]
    assert list(found) == [*killed, "test_hangs", "test_counts[1]", "test_counts[2]"]
    assert found[killed[0]] == ("failed", "ended with exit code 7")
    assert {found[name] for name in killed[1:]} == {("failed", "ended by SIGSEGV")}
    assert re.fullmatch(r"killed after \d s: it hung \(its group has 2 s\)", found["test_hangs"][1])
    assert found["test_counts[1]"][0] == "passed"
    assert "assert 2 == 1" in found["test_counts[2]"][1]


def test_the_deadline_holds_for_every_process(few, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(DEADLINE, str(time.time() - 1))
    card.run_tests(few, tmp_path, time.time() + 300)
    why = {"Skipped: not begun: the time of the run is over"}
    assert {why for _, why in outcomes(tmp_path).values()} == why
    assert len(outcomes(tmp_path)) == 9


def test_where_the_canary_died_no_engine_is_opened(few, tmp_path, monkeypatch) -> None:
    write(tmp_path / "results.jsonl", {"test": "test_gpu_canary.py::test", "outcome": "failed",
                                       "when": "call", "why": "ended by SIGSEGV"})  # fmt: skip
    reason = card.died(tmp_path / "results.jsonl")
    assert reason == "the canary failed: ended by SIGSEGV"
    monkeypatch.setenv(CANARY, reason)
    card.run_tests(few, tmp_path, time.time() + 300)
    (_, *found) = outcomes(tmp_path).values()
    assert set(found) == {("skipped", f"Skipped: not begun: {reason}")}


def test_a_canary_that_did_not_run_is_no_good_sign(tmp_path) -> None:
    assert card.died(tmp_path / "results.jsonl") == "the canary did not run"


def test_tests_that_cannot_be_collected_end_the_run(few, tmp_path, capsys) -> None:
    (tmp_path / "suite" / "test_few.py").write_text("import nothing_of_that_name")
    card.run_tests(few, tmp_path, time.time() + 300)
    assert "ended with exit code 2; log.txt has what it printed" in capsys.readouterr().err
    assert "nothing_of_that_name" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_the_first_questions_are_asked_where_there_is_no_card(tmp_path) -> None:
    command = [ROOT / "scripts" / "card.sh", tmp_path, "--seconds", "240"]
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines if "up to" in line] == [
        "canary", "state machine", "vit-msn-small in fp16", "benchmark",
    ]  # fmt: skip
    assert "the canary skipped: " in done.stdout
    assert re.fullmatch(r"\d+ skipped", lines[-1])
    assert "nothing was measured: " in (tmp_path / "log.txt").read_text()


def test_a_build_that_failed_or_killed_is_not_tried_again(tmp_path) -> None:
    tried = []

    def make(shape: str) -> Built:
        tried.append(shape)
        raise ValueError("no kernel")

    for _ in range(2):  # the second is a process of its own
        build = Once(make, tmp_path)
        with pytest.raises((ValueError, pytest.fail.Exception), match="no kernel"):
            build("small")
    assert tried == ["small"]
    (tmp_path / "base.begun").touch()
    with pytest.raises(pytest.fail.Exception, match="base was not built: it ended the process"):
        Once(make, tmp_path)("base")
    assert tried == ["small"]
