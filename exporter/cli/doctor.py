"""``msn-export doctor``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from msn_export.cli.options import json_option

if TYPE_CHECKING:
    from msn_export.cli.console import Console
    from msn_export.commands.doctor import Diagnosis


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show what this machine can export, build and run, and what to install for the rest.

    Exit code 1 if something that is installed is broken.
    """
    from msn_export.cli.console import Console
    from msn_export.commands.doctor import run_doctor

    group = ctx.parent.command if ctx.parent is not None else None
    commands = group.list_commands(ctx) if isinstance(group, click.Group) else ()
    console = Console(as_json=as_json)
    with console.progress() as progress:
        diagnosis = run_doctor(commands, progress)
    if as_json:
        console.print_json(diagnosis)
    else:
        _show(console, diagnosis)
    if not diagnosis.healthy:
        ctx.exit(1)


def _show(console: Console, found: Diagnosis) -> None:
    from rich.markup import escape
    from rich.table import Table

    machine = found.machine
    about = Table(show_header=False)
    driver = f"driver {machine.driver or 'of unknown release'}, CUDA {machine.cuda}"
    for name, text in (
        ("msn-export", f"{found.product} in {found.location}"),
        ("python", f"{machine.python}, {found.interpreter}"),
        ("machine", f"{machine.cores} cores of {machine.cpu}, {machine.memory / 2**30:.0f} GiB"),
        ("system", machine.system),
        ("GPU", found.no_gpu or f"{'; '.join(machine.gpus)}; {driver}"),
    ):
        about.add_row(name, escape(text))
    console.print(about)
    packages = Table("package", "installed", "wanted", "for", "")
    colours = {"ok": "green", "missing": "dim", "broken": "red"}
    for package in found.packages:
        extras = ", ".join(extra or "everything" for extra in package.extras)
        state = f"[{colours[package.state]}]{package.state}[/] {escape(package.detail)}"
        packages.add_row(
            package.name, package.version or "-", package.range, escape(extras), state.strip()
        )
    console.print(packages)
    commands = Table("command", "can", "", "what it takes")
    for verdict in found.commands:
        works = "[green]yes[/]" if verdict.works else "[yellow]no[/]"
        commands.add_row(verdict.command, verdict.does, works, escape(verdict.mend))
    console.print(commands)
    for fault in found.faults:
        console.print(f"[red]broken[/] {escape(f'{fault.package}: {fault.what}')}")
        console.print(f"       {escape(fault.mend)}")
    if found.healthy:
        console.print("Nothing that is installed is broken.")
