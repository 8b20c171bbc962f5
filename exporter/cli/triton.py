"""``msn-export triton``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from msn_export.cli.options import IMAGES, force_option, json_option, picture_options


@click.command()
@click.argument(
    "artifacts",
    nargs=-1,
    metavar="[ARTIFACT]...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="The repository."
)
@click.option(
    "--lint", "linted", type=click.Path(path_type=Path), help="Check a repository instead."
)
@click.option("--name", help="The model's name. Default: the artifact's, without its ending.")
@click.option("--model-version", "version", type=click.IntRange(1), default=1, show_default=True)
@click.option("--release", metavar="YY.MM", help="Triton's release. Default: one that fits.")
@click.option("--max-batch", type=click.IntRange(1, 4096), help="Default: the largest profile's.")
@click.option("--instances", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option(
    "--queue-delay",
    type=click.IntRange(0, 1_000_000),
    default=500,
    show_default=True,
    help="Microseconds a request may wait for others.",
)
@click.option("--ensemble", is_flag=True, help="Also take bytes, and normalise them in Triton.")
@click.option("--warmup", is_flag=True, help="Run a picture through each instance first.")
@click.option("--response-cache", is_flag=True, help="Answer repeated requests from a cache.")
@click.option("--cuda-graphs", is_flag=True, help="Engines: a GPU variant that captures graphs.")
@click.option("--images", type=IMAGES, help="Pictures to warm up with; without, noise.")
@picture_options
@force_option
@json_option
def triton(
    artifacts: tuple[Path, ...],
    linted: Path | None,
    output: Path | None,
    release: str | None,
    **options: Any,
) -> None:
    """Write ARTIFACT as a model of a Triton repository, or check one with --lint.

    ARTIFACT is an .onnx file, or one model's engines for several GPU generations.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_findings, show_written
    from msn_export.commands.triton import TritonJob, run_lint, run_triton

    console = Console(as_json=options.pop("as_json"))
    if linted is not None:
        if artifacts or output is not None:
            raise click.UsageError("--lint takes a repository alone, no ARTIFACT and no -o")
        findings = run_lint(linted, release)
        show_findings(console, linted, findings)
        if any(finding.level == "wrong" for finding in findings):
            raise click.exceptions.Exit(1)
        return
    if not artifacts or output is None:
        raise click.UsageError("give ARTIFACT and -o REPO, or --lint REPO")
    if options["images"] is not None and not options["warmup"]:
        raise click.UsageError("--images is what --warmup runs; give both or neither")
    with console.progress() as progress:
        job = TritonJob(artifacts, output, release=release, **options)
        written = run_triton(job, progress)
    show_written(console, written)
