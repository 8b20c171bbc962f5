"""The faults that are planted to test the tests: each kind, what is left alone, which tests run."""

import json
import subprocess
import sys
from pathlib import Path

import mutants
import pytest
from mutations import mutations_of

SOURCE = b'''"""A module."""
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy


@decorated(slots=True)
def f(x: int = 3, *, name: str = "a") -> int | None:
    """Say 1 == 2."""
    assert x == 1
    if not x:
        raise ValueError(f"{x + 1} is odd")
    for i in range(0, x):
        if i <= 2 and x is not None:
            continue
        g(i, x, key=i - 1)
    y = -x if name else "t" + name
    y += 0.5
    return y if (x) == (y) else 0
'''


def planted(source: bytes) -> dict[str, list[str]]:
    """List the lines that each kind of fault makes."""
    found: dict[str, list[str]] = {}
    for one in mutations_of(source):
        line = one.apply(source).splitlines()[one.line - 1].decode().strip()
        found.setdefault(one.kind, []).append(line)
    return found


def test_each_kind_is_planted_and_nothing_where_no_test_could_see_it() -> None:
    assert planted(SOURCE) == {
        "constant": [
            'def f(x: int = 4, *, name: str = "a") -> int | None:',
            "for i in range(1, x):",
            "if i <= 3 and x is not None:",
            "g(i, x, key=i - 2)",
            "y += 1.0",
            "return y if (x) == (y) else 1",
        ],
        "comparison": [
            "if i < 2 and x is not None:",
            "if i <= 2 and x is None:",
            "return y if (x) != (y) else 0",
        ],
        "not removed": ["if x:"],
        "operator": ["if i <= 2 or x is not None:", "g(i, x, key=i + 1)"],
        "argument dropped": ["for i in range(0):", "g(i, key=i - 1)", "g(i, x)"],
        "sign removed": ['y = x if name else "t" + name'],
        "condition negated": ['y = -x if (not (name)) else "t" + name'],
        "statement deleted": ["pass", "pass", "pass", "pass"],
    }


@pytest.mark.parametrize(
    ("call", "dropped"),
    [
        ("f(a=1)", {"f()"}),
        ("f(a=1, b=2)", {"f(b=2)", "f(a=1)"}),
        ("f(x, *rest, **more)", {"f(x, **more)"}),
        ("f(x)", set()),
        ("f(x, y)", {"f(x)"}),
    ],
)
def test_an_argument_is_dropped_with_its_comma(call, dropped) -> None:
    assert set(planted(call.encode()).get("argument dropped", ())) == dropped


def test_places_are_counted_in_bytes() -> None:
    source = 'x = "é" == y  # ü'.encode()
    assert planted(source) == {"comparison": ['x = "é" != y  # ü']}


def test_a_draw_is_the_seeds_and_has_no_fault_twice() -> None:
    where = ["metrics/metrics.py", "metrics/evaluate.py"]
    first, again, other = (mutants.draw(where, None, 30, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 30
    assert {m.module for m in first} == set(where)
    assert {m.mutation.kind for m in mutants.draw(where, "comparison", 9, 0)} == {"comparison"}
    assert all(m.difference.startswith(f"--- {m.module}\n+++ {m.mutation.kind}\n") for m in first)


def test_a_draw_may_be_of_one_line() -> None:
    drawn = mutants.draw(["metrics/metrics.py"], None, 10**6, 0)
    line = drawn[0].mutation.line
    here = mutants.draw([f"metrics/metrics.py:{line}"], None, 10**6, 0)
    assert here == [one for one in drawn if one.mutation.line == line] != drawn


def test_a_fault_that_does_not_compile_is_known() -> None:
    source = b"x = not (\n    a\n    or b\n)\n"
    assert [one.compiles(source) for one in mutations_of(source)] == [False, True]


def test_the_tests_of_a_module_are_its_own_then_its_importers_then_their_own() -> None:
    tests = mutants.tests_of("graph/fuse.py")
    assert tests[0] == "graph/test_fuse.py"
    assert 0 < tests.index("graph/test_attention.py") < tests.index("commands/test_onnx.py")
    assert len(set(tests)) == len(tests)
    first = mutants.tests_of("triton_server/repository.py")[0]
    assert first.startswith("triton_server/test_repository_")


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(SystemExit, match="no_such is neither a folder nor a file of the package"):
        mutants.modules_in("no_such")


def test_a_fault_is_of_the_innermost_function_whose_body_has_it() -> None:
    lines = {1: None, 2: None, 8: None, 9: None, 11: 8, 20: 8, 21: None}
    assert {line: mutants.function_at(SOURCE, line) for line in lines} == lines


def test_a_process_knows_which_functions_it_entered() -> None:
    program = """
import json, subprocess, sys
sys.path.insert(0, "scripts")
from mutants import ROOT, Watch, draw, function_at
watch = Watch(f"{ROOT}/scripts/")
function_at(b"", 1)
print(json.dumps(watch.found()))
watch = Watch(f"{ROOT}/scripts/")
subprocess.run(["true"], check=True)
print(watch.found())
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=mutants.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    entered, other = run.stdout.splitlines()
    first = mutants.function_at.__code__.co_firstlineno
    assert ["mutants.py", first] in json.loads(entered)
    assert ["mutants.py", mutants.draw.__code__.co_firstlineno] not in json.loads(entered)
    assert other == "None"


TRY = """
import sys
sys.path.insert(0, "scripts")
from pathlib import Path
from mutants import Mutant, Runner, source_of
from mutations import Mutation

module = "engine/compile.py"
source = source_of(module).read_bytes()
runner = Runner(Path(sys.argv[1]), 600, 2)
for old, new in ((b"import", b"import"), (b"return", b"raise")):
    at = source.index(old)
    print(runner.survives(Mutant(module, source, Mutation("", 1, at, at + len(old), new.decode()))))
"""


@pytest.mark.slow
def test_a_fault_is_killed_in_a_copy_and_none_is_not(tmp_path) -> None:
    before = mutants.source_of("engine/compile.py").read_bytes()
    run = subprocess.run(
        [sys.executable, "-c", TRY, str(tmp_path)],
        cwd=Path(mutants.__file__).parent.parent, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.split() == ["survived", "killed"], run.stderr
    assert mutants.source_of("engine/compile.py").read_bytes() == before
