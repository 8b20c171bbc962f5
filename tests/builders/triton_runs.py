"""One way to call ``msn-export triton``, and what it wrote."""

from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from msn_export.cli import main
from msn_export.commands.triton import run_lint
from msn_export.triton_server import config


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["triton", *map(str, arguments)])


def config_of(repository: Path, place: str) -> Any:
    return config.from_text((repository / place).read_text())


def refused(*arguments: object) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 1, result.output
    line: str = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def wrong(repository: Path) -> list[str]:
    """List what the check of a repository calls wrong."""
    return [
        f"{finding.model}/{finding.where}: {finding.what}"
        for finding in run_lint(repository, None)
        if finding.level == "wrong"
    ]
