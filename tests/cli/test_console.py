"""Progress goes to stderr, results to stdout; nothing there can break what was already done."""

import io
import json
import os
import subprocess
import sys

import pytest
from rich.console import Console as RichConsole
from rich.progress import Progress
from rich.table import Table

from msn_export.cli import console
from msn_export.cli.console import Console, Steps


def steps() -> tuple[Steps, Progress, io.StringIO]:
    written = io.StringIO()
    console = RichConsole(file=written, width=80)
    progress = Progress(console=console, disable=True)
    return Steps(progress, console), progress, written


def test_a_step_leaves_one_line_with_its_time() -> None:
    shown, progress, written = steps()
    with shown.step("trace"):
        assert [task.description for task in progress.tasks] == ["trace"]
        assert progress.tasks[0].total is None
    assert progress.tasks == []
    assert written.getvalue().endswith(" s  trace\n")


def test_how_far_it_is_and_at_what_is_shown() -> None:
    shown, progress, _ = steps()
    with shown.step("compile"):
        shown.advance(300, 1000, "[tactics]")
        (task,) = progress.tasks
        assert (task.completed, task.total) == (300, 1000)
        assert task.fields["detail"] == r"\[tactics]"
    shown.advance(1, 2)  # no step is open: nothing to move


def test_a_step_that_fails_leaves_no_line_and_its_error() -> None:
    shown, progress, written = steps()
    with pytest.raises(ValueError, match="no"), shown.step("trace"):
        raise ValueError("no")
    assert written.getvalue() == ""
    assert progress.tasks == []


def test_results_are_on_stdout_and_progress_on_stderr(capsys) -> None:
    console = Console(as_json=False)
    with console.progress() as progress, progress.step("work"):
        progress.advance(1, 2, "half")
    console.print("result")
    out, err = capsys.readouterr()
    assert out == "result\n"
    assert err.endswith(" s  work\n")


def test_json_is_one_object_with_no_number_that_is_none(capsys) -> None:
    Console(as_json=True).print_json({"a": float("nan"), "b": "dög", "c": (1, 2)})
    out = capsys.readouterr().out
    assert json.loads(out) == {"a": None, "b": "dög", "c": [1, 2]}
    assert out.count("\n") == 1


SHOW = """
from msn_export.cli.console import Console
console = Console(as_json=False)
console.print("cosine … ≠ caf\\udce9")
console.print_json({"path": "caf\\udce9 …"})
"""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_our_characters_gets_others(encoding) -> None:
    run = subprocess.run(
        [sys.executable, "-c", SHOW],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    shown, plain = run.stdout.decode(encoding).splitlines()
    assert shown.startswith("cosine ")
    if encoding == "utf-8":
        assert shown == r"cosine … ≠ caf\udce9"
        assert json.loads(plain) == {"path": "caf\ufffd …"}


def test_a_long_step_tells_a_log_how_far_it_is(monkeypatch, capsys) -> None:
    monkeypatch.setattr(console, "_TELL", 0.0)
    with console.Console(as_json=True).progress() as progress, progress.step("embed"):
        progress.advance(1, 10, "1 of 10, 2.0/s")
        progress.advance(2, 10)  # nothing to say
    told = capsys.readouterr()
    assert told.out == ""
    assert "1 of 10, 2.0/s" in told.err
    assert "embed" in told.err


def test_but_not_with_every_step(capsys) -> None:
    with console.Console(as_json=True).progress() as progress, progress.step("embed"):
        progress.advance(1, 10, "1 of 10")
    assert "1 of 10" not in capsys.readouterr().err


HOSTILE = "a\x1b[2J\x07\x9b31mb\u202eexe.x\x7f"
SHOWN = r"a\u001b[2J\u0007\u009b31mb\u202eexe.x\u007f"


def test_what_a_terminal_would_obey_is_shown(capsys) -> None:
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE + " :bomb:")
    console = Console(as_json=False)
    console.print(table)
    console.print(HOSTILE)
    with console.progress() as progress, progress.step(HOSTILE):
        pass
    out, err = capsys.readouterr()
    for text in (out, err):
        assert all(c.isprintable() or c == "\n" for c in text)
        assert SHOWN in text
    assert "\N{BOMB}" not in out


def test_json_of_what_a_terminal_would_obey_is_still_json(capsys) -> None:
    Console(as_json=True).print_json({"name": HOSTILE, "b": "dög\n"})
    out = capsys.readouterr().out
    assert out.removesuffix("\n").isprintable()
    assert json.loads(out) == {"name": HOSTILE, "b": "dög\n"}
