"""``msn-export onnx``."""

from __future__ import annotations

from typing import Any

import click

from msn_export.cli.options import (
    BATCH,
    FILE,
    SIZE,
    artifact_options,
    checkpoint_options,
    choice,
    command_line,
    exif_option,
    flag_off,
    preprocess_option,
)
from msn_export.spec import Dtype, Head, InputFormat, Target


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", type=FILE, help="The .onnx file to write.")
@checkpoint_options
@click.option(
    "--head",
    "heads",
    type=choice(Head),
    multiple=True,
    help="Output; repeatable. Default: logits for a classifier, else cls.",
)
@click.option(
    "--input",
    "input_format",
    type=click.Choice(["float", "uint8"]),
    default="float",
    show_default=True,
    help="Normalised planes, or bytes [b, h, w, 3].",
)
@click.option(
    "--dtype", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True
)
@click.option("--batch", type=BATCH, default="1:8:32", show_default=True)
@click.option("--image-size", type=SIZE, help="Interpolate the position embedding to this size.")
@click.option(
    "--target",
    type=choice(Target),
    default="tensorrt",
    show_default=True,
    help="Form of attention and opset.",
)
@preprocess_option(
    default="auto",
    show_default=True,
    help="How its pictures are made; auto: as the checkpoint's own file says, else hf.",
)
@exif_option
@flag_off("--no-simplify", "simplify", help="Keep the graph as it was traced and fused.")
@artifact_options
def onnx(checkpoint: str, **options: Any) -> None:
    """Export CHECKPOINT to a checked ONNX graph.

    CHECKPOINT is a hub id, a Hugging Face folder, a weights file, or random:VARIANT[:SEED].
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_artifact
    from msn_export.commands.jobs import OnnxJob

    console = Console(as_json=options.pop("as_json"))
    job = OnnxJob(
        checkpoint,
        command=command_line(),
        heads=tuple(Head(head) for head in options.pop("heads")),
        input_format=InputFormat(options.pop("input_format")),
        dtype=Dtype(options.pop("dtype")),
        target=Target(options.pop("target")),
        **options,
    )
    job.judge()
    from msn_export.commands.onnx import run_onnx  # torch: seconds, which no mistake is to wait for

    with console.progress() as progress:
        output, manifest = run_onnx(job, progress)
    show_artifact(console, output, manifest)
