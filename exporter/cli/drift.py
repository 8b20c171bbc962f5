"""``msn-export drift``."""

from __future__ import annotations

from typing import Any

import click

from msn_export.cli.options import (
    checkpoint_options,
    exif_option,
    images_option,
    json_option,
    preprocess_option,
)


@click.command()
@click.argument("reference")
@click.argument("candidate")
@images_option
@click.option("--limit", type=click.IntRange(1), default=16, show_default=True, help="Pictures.")
@click.option(
    "--batch", type=click.IntRange(1), default=4, show_default=True, help="Pictures at a time."
)
@preprocess_option(help="What makes the pixels both are given. Default: the reference's own.")
@exif_option
@checkpoint_options
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="Relative error from which a block has parted. Default: measured.",
)
@json_option
@click.pass_context
def drift(ctx: click.Context, /, reference: str, candidate: str, **options: Any) -> None:
    """Compare CANDIDATE with REFERENCE block by block: where do they part?

    Each is a checkpoint, an .onnx file, or an engine where its GPU is: its graph, beside it, is
    compiled once more with the blocks as outputs. Each block of a candidate that is no engine is
    given the reference's own stream; its error is judged beside what its precision costs there.
    Exit code 0: no block parts.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_drift
    from msn_export.commands.drift import DriftJob, run_drift

    console = Console(as_json=options.pop("as_json"))
    with console.progress() as progress:
        found = run_drift(DriftJob(reference, candidate, **options), progress)
    show_drift(console, found)
    ctx.exit(0 if found.passed else 1)
