"""One way to call ``msn-export onnx``."""

from pathlib import Path

from click.testing import CliRunner, Result

from msn_export.cli import main


def export(checkpoint: object, output: Path, *options: object) -> Result:
    arguments = ["onnx", str(checkpoint), "-o", str(output), "--json", *map(str, options)]
    return CliRunner().invoke(main, arguments)
