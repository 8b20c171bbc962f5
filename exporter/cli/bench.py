"""``msn-export bench``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msn_export.cli.options import (
    FILE,
    SIZE,
    Parsed,
    command_line,
    flag_off,
    force_option,
    json_option,
    picture_options,
    runner_options,
    variant_option,
    weights_option,
)
from msn_export.cli.options import IMAGES as PICTURES
from msn_export.errors import SpecError
from msn_export.spec import Dtype

if TYPE_CHECKING:
    from msn_export.commands.jobs import Against

# Hugging Face's table of attention implementations for ViT-MSN: eager against SDPA, batch 1 to 8
PAPER: tuple[tuple[Against, ...], tuple[int, ...]] = (("eager", "sdpa"), (1, 2, 4, 8))
DEFAULT: tuple[tuple[Against, ...], tuple[int, ...]] = (("sdpa",), (1, 8))


def _against(text: str) -> tuple[str, ...]:
    from msn_export.commands.jobs import AGAINST

    names = tuple(filter(None, text.split(",")))
    unknown = [name for name in names if name not in (*AGAINST, "none")]
    if unknown:
        raise SpecError(f"{unknown[0]!r} is none of {', '.join(AGAINST)}, none")
    return tuple(dict.fromkeys(name for name in names if name != "none"))


@click.command()
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT…", type=FILE)
@click.option(
    "--against",
    type=Parsed("eager,sdpa,compile,onnxruntime", _against),
    help="What to compare with, the first being the measure; or none. Default: sdpa.",
)
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(min=1),
    multiple=True,
    help="Repeatable. Default: 1, 8.",
)
@click.option("--checkpoint", help="Of the PyTorch model. Default: what the manifest names.")
@variant_option
@weights_option
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="For each contender at each batch.",
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Of each contender. Default: physical cores."
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Of PyTorch. Default: fp32; on a GPU, as ARTIFACT.",
)
@click.option("--preset", type=click.Choice(["paper"]), help="eager, sdpa; batches 1, 2, 4, 8.")
@click.option("--images", type=PICTURES, help="Pictures to run; without, seeded noise.")
@picture_options
@click.option("--image-size", type=SIZE, help="For a graph that leaves height and width open.")
@click.option("--resident", is_flag=True, help="GPU: data stays there, copies are not counted.")
@flag_off("--no-cuda-graphs", "cuda_graphs", help="Engines: launch kernel by kernel.")
@click.option("--report", type=FILE, help="Write a page with plots here.")
@runner_options
@force_option
@json_option
def bench(artifacts: tuple[Path, ...], **options: Any) -> None:
    """Time each ARTIFACT, an .onnx or .engine file, beside the PyTorch model it came from.

    Rounds are interleaved; agreement with the fp32 reference is measured beside each time.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_bench
    from msn_export.commands.bench import BenchJob, run_bench

    console = Console(as_json=options.pop("as_json"))
    against, batches = PAPER if options["preset"] == "paper" else DEFAULT
    named, sizes = options.pop("against"), options.pop("batches")
    dtype = options.pop("dtype")
    job = BenchJob(
        artifacts,
        command=command_line(),
        against=against if named is None else named,
        batches=tuple(dict.fromkeys(sizes)) or batches,
        dtype=Dtype(dtype) if dtype else None,
        **options,
    )
    with console.progress() as progress:
        measured = run_bench(job, progress)
    show_bench(console, measured)
