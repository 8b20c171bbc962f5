"""The page of what was tried is written from counts, and they are without a failure."""

import json
from pathlib import Path

import reliability

from tests.contracts.fuzz import TARGETS
from tests.contracts.test_kills import COMMANDS
from tests.contracts.test_low_memory import COMMANDS as LIMITED

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_what_the_counts_say() -> None:
    counts = json.loads((ROOT / reliability.TABLE).read_text(encoding="utf-8"))
    written = (ROOT / reliability.PAGE).read_text(encoding="utf-8")
    assert written == reliability.page(counts), "python scripts/reliability.py writes it again"
    kinds = {*TARGETS, *(f"kill: {name}" for name in COMMANDS)}
    assert set(counts) == kinds | {f"memory: {name}" for name in LIMITED}
    for of in counts.values():
        assert of["tried"] > 0
        assert (of["hung"], of["crashed"], of["unexpected"], of["left"]) == (0, 0, 0, 0)


def test_a_case_counts_as_what_became_of_it() -> None:
    cases = [
        {"kind": "graph", "code": 1, "left": 0, "unexpected": False},
        {"kind": "graph", "code": None, "left": 2, "unexpected": False},
        {"kind": "graph", "code": -11, "left": 0, "unexpected": True},
        {"kind": "kill: trt", "code": 0, "left": 0, "unexpected": False},
        {"kind": "memory: onnx", "code": 1, "left": 0, "unexpected": False},
    ]
    counts = reliability.counts_of(map(json.dumps, cases))
    ends = {"tried": 3, "failed": 1, "hung": 1, "crashed": 1, "unexpected": 1, "left": 2}
    assert counts["graph"] == ends
    page = reliability.page(counts)
    assert "| graph | 3 | 1 | 1 | 1 | 2 |" in page
    assert "| `trt` | 1 | 0 |" in page
    assert "| `onnx` | 1 | 1 | 0 | 0 |" in page
