"""One way to call ``msn-export embed``, and what it wrote."""

import json
from pathlib import Path

from click.testing import CliRunner, Result

from msn_export import image_folder
from msn_export.cli import main

COUNT, BROKEN = 45, (5, 18)


def embed(model: object, folder: object, output: Path, *options: str) -> Result:
    arguments = ["embed", str(model), str(folder), "-o", str(output), *options]
    return CliRunner().invoke(main, arguments)


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in image_folder.find(folder).paths]


def lines_of(output: Path) -> list[dict[str, object]]:
    """Read the sidecar that has a line a row."""
    text = output.with_name(output.name + ".rows.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def is_broken(name: str) -> bool:
    return int(Path(name).stem) in BROKEN
