"""How the tests that need a card run: the telling ones first, until a deadline, each written down.

A card may be lent for minutes, and what runs on it for the first time may end the process or hang.
``--results FILE`` has a line of JSON for each test as it begins and one as it ends; a session that
is given the file of an earlier one goes on behind it. No test begins after the time in the variable
``DEADLINE``, which holds for every process of a run (``--budget SECONDS`` sets it, where nothing
has). ``scripts/card.py`` starts such sessions until all tests have ended, and ends what hangs.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from msn_export.host import Driver, find_driver

PACKAGES = (
    "msn-export", "torch", "tensorrt", "tensorrt-rtx", "cuda-bindings", "onnxruntime",
    "onnxruntime-gpu", "onnx", "numpy", "pytest",
)  # fmt: skip
DEADLINE = "MSN_EXPORT_CARD_DEADLINE"  # seconds since 1970
CANARY = "MSN_EXPORT_CARD_CANARY"  # why no test of TensorRT may begin; empty where they may
# What to run first, and the seconds that one of its tests may take, a build included: a row matches
# where all its words are in the test's name. The canary says whether an engine runs at all; the
# state machine takes seconds and needs no model; one shape in one precision says most of the rest;
# the large shapes take minutes of the CPU before an engine is built.
ORDER = (
    (("test_gpu_canary",), 60),
    (("runtime/test_tensorrt",), 60),
    (("agrees", "vit-msn-small", "fp16"), 120),
    (("test_gpu_runs",), 120),
    (("agrees", "vit-msn-small"), 120),
    (("test_gpu_refusals",), 120),
    (("test_gpu_commands",), 120),
    (("vit-msn-small",), 120),
    (("test_gpu_engines.py::test_what",), 120),
    (("agrees", "vit-msn-base-", "fp16"), 180),
    (("test_gpu_benchmark",), 180),
    (("agrees", "vit-msn-base-", "fp32"), 180),
    (("agrees", "vit-msn-base-", "bf16"), 180),
)
LARGE = ("vit-msn-base-4", "vit-msn-large")
LONGEST = 600  # seconds of any other test
WITHOUT_TENSORRT = "card without TensorRT"  # the parameter of tests that the canary says nothing of


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("a card")
    group.addoption("--budget", type=float, help="seconds in which tests of the card may begin")
    group.addoption("--results", type=Path, help="a file for the results of tests of the card")


@pytest.hookimpl(trylast=True)  # behind -m, which leaves those of a card
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the telling tests of a card first, leave out those that ended, and let its machine warn.

    It has the torch and the compiler that it has, which give advice that is none for us.
    """
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))
    if all(item.get_closest_marker("gpu") for item in items):
        items.sort(key=lambda item: rank(item.nodeid))
        ended = ended_in(config.getoption("results"))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in ended])
        items[:] = [item for item in items if item.nodeid not in ended]


def rank(test: str) -> int:
    """Give a test's place in the order; the large shapes are the last."""
    if any(shape in test for shape in LARGE):
        return len(ORDER) + 1
    rows = (index for index, (row, _) in enumerate(ORDER) if all(word in test for word in row))
    return next(rows, len(ORDER))


def seconds_of(test: str) -> float:
    """Give the time that a test may take."""
    place = rank(test)
    return ORDER[place][1] if place < len(ORDER) else LONGEST


def lines_of(results: Path | None) -> list[dict[str, Any]]:
    """Read the lines of tests; one that was cut off is none."""
    if results is None or not results.exists():
        return []
    lines = []
    for text in results.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return [line for line in lines if "test" in line]


def ended_in(results: Path | None) -> set[str]:
    return {line["test"] for line in lines_of(results) if "outcome" in line}


def pytest_sessionstart(session: pytest.Session) -> None:
    """Set the deadline, and begin the file of results with the machine."""
    budget = session.config.getoption("budget")
    if budget is not None:
        os.environ.setdefault(DEADLINE, str(time.time() + budget))
    file = _results(session.config)
    if file is not None and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, machine())


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin nothing on the card once the time is over, and no engine where the canary died."""
    if not item.get_closest_marker("gpu"):
        return
    if time.time() > float(os.environ.get(DEADLINE, "inf")):
        pytest.skip("not begun: the time of the run is over")
    died = os.environ.get(CANARY, "")
    if died and WITHOUT_TENSORRT not in item.nodeid and "test_gpu_canary" not in item.nodeid:
        pytest.skip(f"not begun: {died}")


class _Current:
    """The session's file, for a hook that is not given its configuration."""

    file: Path | None = None


def pytest_runtest_logstart(nodeid: str) -> None:
    """Write down what begins: a crash leaves nothing else of it."""
    if _Current.file is not None:
        write(_Current.file, {"test": nodeid, "begun": time.time()})


def write(file: Path, line: dict[str, Any]) -> None:
    """Add a line that is on disk when this returns."""
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a line for what ended; a test that failed before its call or after it, too."""
    if _Current.file is None or (report.when != "call" and report.passed):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    line = {
        "test": report.nodeid, "when": report.when, "outcome": report.outcome,
        "seconds": round(report.duration, 3), "why": reason[-4000:],
    }  # fmt: skip
    write(_Current.file, line)


def _results(config: pytest.Config) -> Path | None:
    """Find the file; a worker of xdist reports to the process that writes it."""
    _Current.file = None if hasattr(config, "workerinput") else config.getoption("results")
    return _Current.file


def machine() -> dict[str, Any]:
    """Describe where tests run: the card with its clocks, the driver, versions and the commit."""
    there = {one.name: one.version for one in importlib.metadata.distributions()}
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "driver": asdict(find_driver()),
        "clocks": _said(
            "nvidia-smi",
            "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,power.limit",
            "--format=csv,noheader",
        )
        if isinstance(find_driver(), Driver)
        else "",
        "commit": commit(),
        "versions": {name: there[name] for name in PACKAGES if name in there},
    }


def commit() -> str:
    """Give the commit of the tree; that of a bundle is in its ``commit.txt``."""
    carried = Path(__file__).parent.parent.parent / "commit.txt"
    return carried.read_text().strip() if carried.exists() else _said("git", "rev-parse", "HEAD")


def _said(*command: str) -> str:
    """Give what a command printed; nothing where it is not here or fails."""
    try:
        done = subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
