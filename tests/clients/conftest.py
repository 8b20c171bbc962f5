"""Graphs of one small classifier for every target, exported once and not to be changed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from msn_export.cli import main


@pytest.fixture(scope="session")
def export(
    small_checkpoint: Path, photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Export with options of ``msn-export onnx``; a list of options is exported once."""
    folder, made = tmp_path_factory.mktemp("clients"), dict[tuple[str, ...], Path]()

    def one(*options: str) -> Path:
        if options not in made:
            path = folder / f"{len(made)}.onnx"
            arguments = ["onnx", str(small_checkpoint), "-o", str(path), *options]
            result = CliRunner().invoke(main, [*arguments, "--images", str(photographs)])
            assert result.exit_code == 0, result.output
            made[options] = path
        return made[options]

    return one
