"""``msn-export onnx``."""

from __future__ import annotations

from typing import Any

import click

from msn_export.cli.options import JobCommand, command_line, json_option


@click.command(cls=JobCommand, job="msn_export.commands.jobs:OnnxJob")
@click.argument("checkpoint")
@json_option
def onnx(as_json: bool, **options: Any) -> None:
    """Export CHECKPOINT to a checked ONNX graph.

    CHECKPOINT is a hub id, a Hugging Face folder, a weights file, or random:VARIANT[:SEED].
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_artifact
    from msn_export.commands.jobs import OnnxJob

    console = Console(as_json=as_json)
    job = OnnxJob(command=command_line(), **options)
    job.judge()
    from msn_export.commands.onnx import run_onnx  # torch: seconds, which no mistake is to wait for

    with console.progress() as progress:
        output, manifest = run_onnx(job, progress)
    show_artifact(console, output, manifest)
