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
@click.pass_context
def inspect(ctx: click.Context, /, artifacts: tuple[Path, ...], as_json: bool) -> None:
    """Show what an engine, an ONNX file or a manifest is made of; two of them side by side.

    Exit code 1 where a manifest is damaged or of another file; the file is shown all the same.
    """
    if len(artifacts) > 2:
        raise click.UsageError("give one artifact, or two to compare")
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_inspections
    from msn_export.compare.inspection import inspect as inspect_artifact

    found = [inspect_artifact(path) for path in artifacts]
    show_inspections(Console(as_json=as_json), found)
    ctx.exit(1 if any(one.distrusted for one in found) else 0)
