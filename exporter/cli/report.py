"""``msn-export report``."""

from __future__ import annotations

from typing import Any

import click

from msn_export.cli.options import JobCommand, command_line


@click.command(cls=JobCommand, job="msn_export.commands.jobs:ReportJob")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT…")
@click.pass_context
def report(ctx: click.Context, /, **options: Any) -> None:
    """Write one page of all that is known of ARTIFACT… and was measured.

    With --images every artifact that runs here is compared with the first, block by block too.
    Exit code 1 where one does not agree; the page is written all the same.
    """
    from rich.markup import escape

    from msn_export.cli.console import Console
    from msn_export.commands.report import ReportJob, run_report

    console = Console(as_json=False)
    job = ReportJob(command=command_line(), **options)
    with console.progress() as progress:
        page = run_report(job, progress)
    console.print(escape(f"{job.output}: {page.headline}"))
    if job.markdown is not None:
        console.print(escape(str(job.markdown)))
    ctx.exit(1 if page.state == "failed" else 0)
