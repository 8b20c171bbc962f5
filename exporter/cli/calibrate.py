"""``msn-export calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from msn_export.cli.options import (
    CAPABILITY,
    FILE,
    IMAGES,
    Parsed,
    command_line,
    flag_off,
    flags_of,
    force_option,
    json_option,
    picture_options,
    the_one,
)

FORMATS = ("int8", "fp8")


def _strength(text: str) -> str | float:
    if text in {"auto", "off"}:
        return text
    strength = float(text)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {text} is not from 0 to 1")
    return strength


@click.command()
@click.argument("model", type=click.Path(dir_okay=False, path_type=Path))
@flags_of(
    *FORMATS,
    int8="8-bit integers, 127 even steps.",
    fp8="8-bit floats (E4M3), for SM 8.9 and later.",
)
@click.option("--images", type=IMAGES, required=True, help="Pictures like those to come.")
@click.option("-o", "--output", type=FILE, help="The .onnx file to write.")
@picture_options
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Images to calibrate on at most; one in four is held out besides.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Which images."
)
@click.option(
    "--observer",
    type=click.Choice(["max", "percentile", "entropy", "mse"]),
    default="mse",
    show_default=True,
    help="How a range is chosen from what was seen.",
)
@click.option("--ranges", type=FILE, help="Ranges taken before, instead of taking them again.")
@click.option(
    "--smooth",
    type=Parsed("auto|0..1|off", _strength),
    help="Move channel outliers into the weights; default auto, the measured best.",
)
@click.option("--quantize-attention", is_flag=True, help="Attention's own products too.")
@click.option("--quantize-patch", is_flag=True, help="The patch convolution too.")
@click.option("--quantize-head", is_flag=True, help="The classifier too.")
@click.option("--bias-correction", is_flag=True, help="Take the mean error out of the biases.")
@click.option(
    "--base",
    type=click.Choice(["auto", "fp32", "fp16", "bf16"]),
    default="auto",
    show_default=True,
    help="The type of all that is not 8-bit; auto: fp32 for int8 graphs of --target onnxruntime,"
    " else fp16.",
)
@click.option(
    "--gate-cosine",
    type=click.FloatRange(0, 1),
    help="First-percentile cosine with the fp32 graph on held-out images; blocks stay until then."
    " Default: the gate of the format, docs/tolerances.md.",
)
@click.option(
    "--compute-capability",
    "capability",
    type=CAPABILITY,
    help="GPU generation to compile for, to count kernels. Default: this machine's, else 8.9.",
)
@flag_off("--no-compile", "compile", help="Do not compile it to count kernels; time nothing.")
@force_option
@json_option
def calibrate(model: Path, **options: Any) -> None:
    """Quantise the fp32 ONNX graph MODEL to int8 or fp8, with ranges taken on images."""
    dtype = the_one(options, *FORMATS)
    if dtype is None:
        raise click.UsageError("give --int8 or --fp8")
    _require_consistent(dtype, options)
    from msn_export.calibration.job import CalibrateJob
    from msn_export.calibration.observers import Observer
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_artifact
    from msn_export.commands.calibrate import run_calibrate
    from msn_export.spec import Dtype

    console, base = Console(as_json=options.pop("as_json")), options.pop("base")
    job = CalibrateJob(
        model,
        Dtype(dtype),
        command=command_line(),
        base=None if base == "auto" else Dtype(base),
        observer=Observer(options.pop("observer")),
        **options,
    )
    with console.progress() as progress:
        output, manifest = run_calibrate(job, progress)
    show_artifact(console, output, manifest)


def _require_consistent(dtype: str, options: dict[str, Any]) -> None:
    if dtype == "fp8" and options["observer"] == "entropy":
        raise click.BadParameter("fp8 has no even steps to compare with", param_hint="--observer")
    if dtype == "fp8" and options["base"] == "fp32":
        raise click.BadParameter(
            "fp32 is for onnxruntime, which multiplies no fp8 on a CPU; use fp16 or bf16",
            param_hint="--base",
        )
    if options["capability"] is not None and not options["compile"]:
        raise click.UsageError("--no-compile leaves nothing to compile for --compute-capability")
