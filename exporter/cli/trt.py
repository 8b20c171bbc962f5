"""``msn-export trt``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from msn_export.cli.options import (
    BATCH,
    CAPABILITY,
    FILE,
    MEMORY,
    artifact_options,
    command_line,
    flags_of,
    picture_options,
    the_one,
)
from msn_export.spec import Dtype

PRECISIONS = ("fp32", "fp16", "bf16")


@click.command()
@click.argument("model", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=FILE, help="The .engine file to write.")
@flags_of(*PRECISIONS, fp32="Default: as the graph is typed.")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    show_default=True,
)
@click.option(
    "--compute-capability",
    "capabilities",
    type=CAPABILITY,
    multiple=True,
    help="GPU generation to compile for, as in 8.9; repeatable (tensorrt-rtx).",
)
@click.option(
    "--batch",
    "profiles",
    type=BATCH,
    multiple=True,
    help="Repeatable: one profile each. Default: the graph's.",
)
@click.option("--workspace", type=MEMORY, help="Scratch memory a kernel may use.")
@click.option("--optimization-level", type=click.IntRange(0, 5))
@click.option("--timing-cache", type=FILE)
@click.option("--version-compatible", is_flag=True, help="Loads in the lean runtime of others.")
@click.option("--hardware-compatible", is_flag=True, help="For any GPU from Ampere on (tensorrt).")
@click.option("--tf32", is_flag=True, help="Let fp32 products round to TF32, 10 bits of mantissa.")
@click.option("--timeout", type=click.FloatRange(min=1), help="Seconds the compiler may take.")
@click.option("--memory-limit", type=MEMORY, help="Resident memory the compiler may take.")
@click.option("--allow-unfused", is_flag=True, help="Accept attention that is not fused.")
@click.option(
    "--allow-fp32",
    is_flag=True,
    help="Accept fp32 products in a typed graph that its manifest does not declare.",
)
@click.option("--log", type=FILE, help="Write everything TensorRT says here.")
@picture_options
@artifact_options
def trt(model: Path, **options: Any) -> None:
    """Compile the ONNX graph MODEL into a TensorRT engine."""
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_artifact
    from msn_export.commands.jobs import TrtJob
    from msn_export.commands.trt import run_trt

    console = Console(as_json=options.pop("as_json"))
    precision = the_one(options, *PRECISIONS)
    job = TrtJob(
        model,
        command=command_line(),
        precision=Dtype(precision) if precision else None,
        **options,
    )
    with console.progress() as progress:
        output, manifest = run_trt(job, progress)
    show_artifact(console, output, manifest)
