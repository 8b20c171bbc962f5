"""``msn-export triton``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from msn_export.cli.options import JobCommand, json_option


@click.command(cls=JobCommand, job="msn_export.commands.jobs:TritonJob")
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
@json_option
def triton(
    artifacts: tuple[Path, ...],
    linted: Path | None,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write ARTIFACT as a model of a Triton repository, or check one with --lint.

    ARTIFACT is an .onnx file, or one model's engines for several GPU generations.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_findings, show_written
    from msn_export.commands.triton import TritonJob, run_lint, run_triton

    console = Console(as_json=as_json)
    if linted is not None:
        if artifacts or output is not None:
            raise click.UsageError("--lint takes a repository alone, no ARTIFACT and no -o")
        findings = run_lint(linted, options.get("release"))
        show_findings(console, linted, findings)
        if any(finding.level == "wrong" for finding in findings):
            raise click.exceptions.Exit(1)
        return
    if not artifacts or output is None:
        raise click.UsageError("give ARTIFACT and -o REPO, or --lint REPO")
    job = TritonJob(artifacts, output, **options)
    if job.images is not None and not job.warmup:
        raise click.UsageError("--images is what --warmup runs; give both or neither")
    with console.progress() as progress:
        written = run_triton(job, progress)
    show_written(console, written)
