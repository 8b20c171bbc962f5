"""``msn-export bench``."""

from __future__ import annotations

from typing import Any

import click

from msn_export.cli.options import FILE, JobCommand, command_line, json_option

# Hugging Face's table of attention implementations for ViT-MSN: eager against SDPA, batch 1 to 8
PAPER = {"against": ("eager", "sdpa"), "batches": (1, 2, 4, 8)}


@click.command(cls=JobCommand, job="msn_export.commands.jobs:BenchJob")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT…", type=FILE)
@json_option
def bench(as_json: bool, **options: Any) -> None:
    """Time each ARTIFACT, an .onnx or .engine file, beside the PyTorch model it came from.

    Rounds are interleaved; agreement with the fp32 reference is measured beside each time.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_bench
    from msn_export.commands.bench import BenchJob, run_bench

    console = Console(as_json=as_json)
    if "preset" in options:
        options = {**PAPER, **options}
    if "batches" in options:
        options["batches"] = tuple(dict.fromkeys(options["batches"]))
    job = BenchJob(command=command_line(), **options)
    with console.progress() as progress:
        measured = run_bench(job, progress)
    show_bench(console, measured)
