"""Drift as a person reads it: a line a stage, then the tensors of the block in question."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from msn_export.check.drift import StageDrift, TensorDrift
from msn_export.cli.console import Console
from msn_export.proof.drift import Drift
from msn_export.records import to_plain


def show_drift(console: Console, found: Drift) -> None:
    """Print every stage, and inside the block that parted or errs the most."""
    if console.as_json:
        console.print_json({**to_plain(found), "passed": found.passed})
        return
    title = f"{found.candidate} against {found.reference}"
    console.print(_stages(f"{title}, {found.check.images} images", found.stages, found.parted))
    console.print(escape(found.sentence))
    console.print(escape(f"{found.how[:1].upper()}{found.how[1:]}."))
    if found.inside:  # an engine shows nothing inside a block
        console.print(_tensors(f"inside {found.suspect}", found.inside))
    for note in found.notes:
        console.print(escape(f"note: {note}"))


def _stages(title: str, stages: Sequence[StageDrift], parted: str | None) -> Table:
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    for name in ("1 - cos", "error", "own", "allowed", "max_abs", "peak", "headroom"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("peak in", overflow="fold")
    for stage in stages:
        tensor, own = stage.tensor, stage.own
        first = " (\\[CLS])" if tensor.first_token else ""
        table.add_row(
            f"{escape(stage.name)}{first}",
            f"{1 - tensor.cosine_min:.1e}",
            f"{tensor.relative:.1e}",
            f"{own.relative:.1e}" if own else "",
            f"{own.allowed:.1e}" if own else "",
            f"{tensor.max_abs:.1e}",
            f"{stage.peak:.4g}",
            f"{stage.headroom:,.0f}" if stage.headroom >= 100 else f"{stage.headroom:.1f}",
            escape(_short(stage)),
            style="bold red" if stage.name == parted else None,
        )
    return table


def _short(stage: StageDrift) -> str:
    """Leave out of a tensor's name the block it stands in the row of."""
    name = stage.peak_tensor
    for block in (stage.name, stage.name.replace("block ", "blocks.")):
        name = name.removeprefix(block) or name
    return name.removesuffix(".LayerNormalization").lstrip(" .")


def _tensors(title: str, tensors: Sequence[TensorDrift]) -> Table:
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("tensor", overflow="fold")
    for name in ("1 - cos", "error", "max_abs", "largest", "not finite"):
        table.add_column(name, justify="right", no_wrap=True)
    for tensor in tensors:
        table.add_row(
            escape(tensor.name),
            f"{1 - tensor.cosine_min:.1e}",
            f"{tensor.relative:.1e}",
            f"{tensor.max_abs:.1e}",
            f"{tensor.largest:.4g}",
            str(tensor.nan + tensor.inf or ""),
        )
    return table
