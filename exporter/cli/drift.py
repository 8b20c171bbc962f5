"""``msn-export drift``."""

from __future__ import annotations

from typing import Any

import click

from msn_export.cli.options import JobCommand, json_option


@click.command(cls=JobCommand, job="msn_export.commands.jobs:DriftJob")
@click.argument("reference")
@click.argument("candidate")
@json_option
@click.pass_context
def drift(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Compare CANDIDATE with REFERENCE block by block: where do they part?

    Each is a checkpoint, an .onnx file, or an engine where its GPU is: its graph, beside it, is
    compiled once more with the blocks as outputs. Each block of a candidate that is no engine is
    given the reference's own stream; its error is judged beside what its precision costs there.
    Exit code 0: no block parts.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_drift
    from msn_export.commands.drift import DriftJob, run_drift

    console = Console(as_json=as_json)
    with console.progress() as progress:
        found = run_drift(DriftJob(**options), progress)
    show_drift(console, found)
    ctx.exit(0 if found.passed else 1)
