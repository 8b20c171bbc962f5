"""``msn-export calibrate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from msn_export.cli.options import FILE, JobCommand, command_line, json_option

if TYPE_CHECKING:
    from msn_export.calibration.job import CalibrateJob


@click.command(cls=JobCommand, job="msn_export.calibration.job:CalibrateJob")
@click.argument("model", type=FILE)
@json_option
def calibrate(as_json: bool, **options: Any) -> None:
    """Quantise the fp32 ONNX graph MODEL to int8 or fp8, with ranges taken on images."""
    if "dtype" not in options:
        raise click.UsageError("give --int8 or --fp8")
    from msn_export.calibration.job import CalibrateJob

    job = CalibrateJob(command=command_line(), **options)
    _require_consistent(job)
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_artifact
    from msn_export.commands.calibrate import run_calibrate

    console = Console(as_json=as_json)
    with console.progress() as progress:
        output, manifest = run_calibrate(job, progress)
    show_artifact(console, output, manifest)


def _require_consistent(job: CalibrateJob) -> None:
    if job.dtype == "fp8" and job.observer == "entropy":
        raise click.BadParameter("fp8 has no even steps to compare with", param_hint="--observer")
    if job.dtype == "fp8" and job.base == "fp32":
        raise click.BadParameter(
            "fp32 is for onnxruntime, which multiplies no fp8 on a CPU; use fp16 or bf16",
            param_hint="--base",
        )
    if job.capability is not None and not job.compile:
        raise click.UsageError("--no-compile leaves nothing to compile for --compute-capability")
