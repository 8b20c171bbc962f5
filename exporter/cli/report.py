"""``msn-export report``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from msn_export.cli.options import (
    FILE,
    IMAGES,
    checkpoint_options,
    command_line,
    force_option,
    picture_options,
)


@click.command()
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT…")
@click.option("-o", "--output", type=FILE, default=Path("report.html"), show_default=True)
@click.option("--markdown", type=FILE, help="Write a model card here too.")
@click.option("--images", type=IMAGES, help="Pictures to run on; without, nothing runs.")
@picture_options
@click.option("--limit", type=click.IntRange(3), default=64, show_default=True, help="Pictures.")
@click.option("--bench", type=FILE, help="What 'msn-export bench --json' wrote.")
@checkpoint_options
@click.option("--title", help="Default: the checkpoint's name.")
@force_option
@click.pass_context
def report(ctx: click.Context, /, artifacts: tuple[str, ...], **options: Any) -> None:
    """Write one page of all that is known of ARTIFACT… and was measured.

    With --images every artifact that runs here is compared with the first, block by block too.
    Exit code 1 where one does not agree; the page is written all the same.
    """
    from rich.markup import escape

    from msn_export.cli.console import Console
    from msn_export.commands.report import ReportJob, run_report

    console = Console(as_json=False)
    job = ReportJob(artifacts, command=command_line(), **options)
    with console.progress() as progress:
        page = run_report(job, progress)
    console.print(escape(f"{job.output}: {page.headline}"))
    if job.markdown is not None:
        console.print(escape(str(job.markdown)))
    ctx.exit(1 if page.state == "failed" else 0)
