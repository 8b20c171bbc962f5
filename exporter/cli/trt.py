"""``msn-export trt``."""

from __future__ import annotations

from typing import Any

import click

from msn_export.cli.options import FILE, JobCommand, command_line, json_option


@click.command(cls=JobCommand, job="msn_export.commands.jobs:TrtJob")
@click.argument("model", type=FILE)
@json_option
def trt(as_json: bool, **options: Any) -> None:
    """Compile the ONNX graph MODEL into a TensorRT engine."""
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_artifact
    from msn_export.commands.trt import TrtJob, run_trt

    console = Console(as_json=as_json)
    job = TrtJob(command=command_line(), **options)
    with console.progress() as progress:
        output, manifest = run_trt(job, progress)
    show_artifact(console, output, manifest)
