"""A Triton repository that was written or checked, as a person reads it."""

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from msn_export.cli.console import Console
from msn_export.records import to_plain
from msn_export.run_triton import Written
from msn_export.triton.findings import Finding


def show_written(console: Console, written: Written) -> None:
    """Print which models are in the repository now, and where to read on."""
    if console.as_json:
        console.print_json(written)
        return
    table = Table(title=escape(written.repository), title_justify="left", show_header=False)
    for name in written.models:
        table.add_row("model", f"{escape(name)}, version {written.version}")
    table.add_row("Triton", escape(written.image))
    for note in written.notes:
        table.add_row("note", escape(note))
    table.add_row("how to", escape(str(Path(written.repository, written.model, "README.md"))))
    console.print(table)


def show_findings(console: Console, repository: Path, findings: Sequence[Finding]) -> None:
    """Print what is wrong, then what could not be known."""
    wrong = sum(finding.level == "wrong" for finding in findings)
    if console.as_json:
        console.print_json(
            {
                "repository": str(repository),
                "passed": wrong == 0,
                "findings": [to_plain(finding) for finding in findings],
            }
        )
        return
    ordered = sorted(findings, key=lambda finding: finding.level == "note")
    table = Table("", "model", show_lines=True)
    for title in ("where", "what"):
        table.add_column(title, overflow="fold")
    for finding in ordered:
        level = f"[bold red]{finding.level}[/]" if finding.level == "wrong" else finding.level
        table.add_row(level, *(escape(x) for x in (finding.model, finding.where, finding.what)))
    if findings:
        console.print(table)
    console.print(f"{escape(str(repository))}: {f'{wrong} wrong' if wrong else 'nothing wrong'}")
