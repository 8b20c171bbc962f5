"""Write docs/commands.md: the help of every command, as it is printed in 100 columns.

python scripts/commands.py
"""

from pathlib import Path

import click
from click.testing import CliRunner

from msn_export.cli import GROUPS, main

PAGE = Path(__file__).parent.parent / "docs" / "commands.md"
WIDTH = 100
HEAD = """# Commands

The help of every command (`msn-export COMMAND --help`), made by `python scripts/commands.py`. Progress goes to stderr, results to
stdout. With `--json` a command prints one JSON object: [docs/schemas](schemas/README.md). Each command is a Python function too:
[python.md](python.md).

Exit codes: 0, done and every gate passed; 1, an error in one line (`msn-export -v …` shows the traceback); 2, wrong usage, or a path
that does not exist; 130, interrupted.
"""


def help_of(command: click.Command | None) -> str:
    """Give the help of a command; None is the group's."""
    arguments = [str(command.name), "--help"] if command is not None else ["--help"]
    # without a terminal click prints two columns less than it is given
    done = CliRunner().invoke(main, arguments, prog_name="msn-export", terminal_width=WIDTH)
    assert done.exit_code == 0, done.output
    return done.output.rstrip()


def page() -> str:
    """Give the text of the page."""
    parts = [HEAD, f"```text\n{help_of(None)}\n```\n"]
    for commands in GROUPS.values():
        for command in commands:
            parts.append(f"## {command.name}\n\n```text\n{help_of(command)}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
