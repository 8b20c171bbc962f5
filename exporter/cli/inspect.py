"""``msn-export inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from msn_export.cli.options import json_option


@click.command()
@click.argument(
    "artifacts",
    nargs=-1,
    required=True,
    metavar="ARTIFACT [OTHER]",
    type=click.Path(dir_okay=False, path_type=Path),
)
@json_option
def inspect(artifacts: tuple[Path, ...], as_json: bool) -> None:
    """Show what an engine, an ONNX file or a manifest is made of; two of them side by side."""
    if len(artifacts) > 2:
        raise click.UsageError("give one artifact, or two to compare")
    from msn_export.cli.console import Console
    from msn_export.cli.inspection_rows import show_inspections
    from msn_export.proof.inspection import inspect as inspect_artifact

    show_inspections(Console(as_json=as_json), [inspect_artifact(path) for path in artifacts])
