"""``msn-export validate``."""

from __future__ import annotations

from typing import Any

import click

from msn_export.cli.options import (
    BATCH,
    LIMIT,
    checkpoint_options,
    choice,
    exif_option,
    images_option,
    json_option,
    preprocess_option,
)
from msn_export.spec import Dtype

GATE_OPTIONS = {
    "relative": "Largest relative error, of all images and of the worst one; replaces the measured "
    "limit, as --max-abs and --cosine do.",
    "max_abs": "Largest absolute difference, times the reference's RMS where that is above 1.",
    "cosine": "Least cosine: of every image in fp32, else of the first percentile.",
    "cls_cosine": "Least cosine of [CLS], where an output has tokens.",
    "norm_ratio": "Largest distance from 1 of the candidate's norm over the reference's.",
    "neighbours": "Least share of images whose nearest neighbour is the reference's.",
    "classes": "Least share of images whose class is the reference's.",
}


def gate_options(command: Any) -> Any:
    """Add an option for each number of a gate."""
    for name, help_text in reversed(GATE_OPTIONS.items()):
        option = f"--{name.replace('_', '-')}"
        command = click.option(option, name, type=click.FloatRange(min=0), help=help_text)(command)
    return command


@click.command()
@click.argument("reference")
@click.argument("candidate")
@images_option
@click.option("--limit", type=LIMIT, default="64", show_default=True, help="Pictures that are run.")
@click.option("--batch", type=BATCH, help="Batch sizes to run. Default: the candidate's own.")
@preprocess_option(help="How the candidate is fed in production. Default: as its manifest says.")
@exif_option
@checkpoint_options
@click.option(
    "--gate", type=choice(Dtype), help="Whose gate to judge by. Default: the coarser side's dtype."
)
@gate_options
@click.option(
    "--numbers-only",
    is_flag=True,
    help="Judge by outputs alone, not by epsilons and activations the graphs name.",
)
@json_option
@click.pass_context
def validate(ctx: click.Context, /, reference: str, candidate: str, **options: Any) -> None:
    """Compare CANDIDATE with REFERENCE on the same images; the exit code is the verdict.

    Each is a checkpoint, an .onnx file or an engine with its manifest.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_validation
    from msn_export.commands.validate import ValidateJob, run_validate

    console = Console(as_json=options.pop("as_json"))
    asked = {name: options.pop(name) for name in GATE_OPTIONS}
    gate = options.pop("gate")
    job = ValidateJob(
        reference,
        candidate,
        gate=Dtype(gate) if gate else None,
        numbers={name: value for name, value in asked.items() if value is not None},
        **options,
    )
    with console.progress() as progress:
        validation = run_validate(job, progress)
    show_validation(console, validation)
    ctx.exit(0 if validation.passed else 1)
