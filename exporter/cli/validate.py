"""``msn-export validate``."""

from __future__ import annotations

from typing import Any

import click

from msn_export.cli.options import JobCommand, json_option


@click.command(cls=JobCommand, job="msn_export.commands.jobs:ValidateJob")
@click.argument("reference")
@click.argument("candidate")
@json_option
@click.pass_context
def validate(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Compare CANDIDATE with REFERENCE on the same images; the exit code is the verdict.

    Each is a checkpoint, an .onnx file or an engine with its manifest.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_validation
    from msn_export.commands.validate import ValidateJob, run_validate

    console = Console(as_json=as_json)
    with console.progress() as progress:
        validation = run_validate(ValidateJob(**options), progress)
    show_validation(console, validation)
    ctx.exit(0 if validation.passed else 1)
