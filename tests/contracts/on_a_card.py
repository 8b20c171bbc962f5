"""How the tests that need a card run: the telling ones first, within a budget, each written down.

A card may be lent for minutes, and what runs on it for the first time may end the process. So
``--budget SECONDS`` begins no test of the card after that time, and ``--results FILE`` has a line
of JSON for each as it ends (``pytest -n 1`` starts anew after a crash and goes on).
"""

import datetime
import importlib.metadata
import json
import platform
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from msn_export.host import find_driver

PACKAGES = (
    "msn-export", "torch", "tensorrt", "tensorrt-rtx", "cuda-bindings", "onnxruntime",
    "onnxruntime-gpu", "onnx", "numpy", "pytest",
)  # fmt: skip
# What to run first: a row matches where all its words are in the test's name. The state machine
# takes seconds and needs no model; one shape in one precision says most of the rest; the large
# shapes take minutes of the CPU before an engine is built.
ORDER = (
    ("runtime/test_tensorrt",),
    ("agrees", "vit-msn-small", "fp16"),
    ("test_gpu_runs",),
    ("agrees", "vit-msn-small"),
    ("test_gpu_refusals",),
    ("test_gpu_commands",),
    ("vit-msn-small",),
    ("test_gpu_engines.py::test_what",),
    ("agrees", "vit-msn-base-", "fp16"),
    ("test_gpu_benchmark",),
    ("agrees", "vit-msn-base-", "fp32"),
    ("agrees", "vit-msn-base-", "bf16"),
)
LARGE = ("vit-msn-base-4", "vit-msn-large")
_begun = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("a card")
    group.addoption("--budget", type=float, help="seconds in which tests of the card may begin")
    group.addoption("--results", type=Path, help="a file for the results of tests of the card")


@pytest.hookimpl(trylast=True)  # behind -m, which leaves those of a card
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the telling tests of a card first, and let its machine warn.

    It has the torch and the compiler that it has, which give advice that is none for us.
    """
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.filterwarnings("default"))
    if all(item.get_closest_marker("gpu") for item in items):
        items.sort(key=lambda item: rank(item.nodeid))


def rank(test: str) -> int:
    """Give a test's place in the order; the large shapes are the last."""
    if any(shape in test for shape in LARGE):
        return len(ORDER) + 1
    rows = (index for index, row in enumerate(ORDER) if all(word in test for word in row))
    return next(rows, len(ORDER))


def pytest_sessionstart(session: pytest.Session) -> None:
    """Begin the file of results with the machine."""
    file = _results(session.config)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_machine()) + "\n")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Begin nothing on the card once the time is over."""
    budget = item.config.getoption("budget")
    over = budget is not None and time.monotonic() - _begun > budget
    if over and item.get_closest_marker("gpu"):
        pytest.skip(f"not begun: the {budget:g} s of --budget are over")


class _Current:
    """The session's file, for a hook that is not given its configuration."""

    file: Path | None = None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a line for what ended; a test that failed before its call or after it, too."""
    if _Current.file is None or (report.when != "call" and report.passed):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    line = {
        "test": report.nodeid, "when": report.when, "outcome": report.outcome,
        "seconds": round(report.duration, 3), "why": reason[-4000:],
    }  # fmt: skip
    with _Current.file.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _results(config: pytest.Config) -> Path | None:
    """Find the file; a worker of xdist reports to the process that writes it."""
    _Current.file = None if hasattr(config, "workerinput") else config.getoption("results")
    return _Current.file


def _machine() -> dict[str, Any]:
    there = {one.name: one.version for one in importlib.metadata.distributions()}
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "driver": asdict(find_driver()),
        "versions": {name: there[name] for name in PACKAGES if name in there},
    }
