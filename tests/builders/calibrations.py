"""One way to call ``msn-export calibrate``."""

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from msn_export.cli import main

PRODUCTS = 8  # two blocks of four
QUICK = ("--no-compile", "--smooth", "off")


def calibrate(graph: Path, images: Path, output: Path, *options: str) -> Result:
    arguments = ["calibrate", str(graph), "-o", str(output), "--images", str(images)]
    return CliRunner().invoke(main, [*arguments, *options])


def done(graph: Path, images: Path, output: Path, *options: str) -> dict[str, Any]:
    result = calibrate(graph, images, output, "--json", *options)
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def refused(graph: Path, images: Path, output: Path, *options: str) -> str:
    """Give the one line it is refused with; nothing is left at the output path or beside it."""
    result = calibrate(graph, images, output, *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert not [path for path in output.parent.iterdir() if path.name.startswith(output.stem)]
    line: str = result.stderr.strip().splitlines()[-1]
    return line


def ranges_of(output: Path) -> Path:
    return output.with_name(f"{output.stem}.ranges.json")
