"""What a person sees: progress on stderr, the result as a table (or JSON) on stdout."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from msn_export.inspection import Inspection
from msn_export.inspection_rows import rows as inspection_rows
from msn_export.manifest import CheckRecord, EngineRecord, Manifest
from msn_export.records import to_plain


class Steps:
    """Progress on a terminal: a spinner and a clock a step, a bar where the length is known."""

    def __init__(self, progress: Progress, console: RichConsole) -> None:
        self._progress = progress
        self._console = console
        self._task: Any = None

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Show a step while it runs; leave one line with its time."""
        started = time.monotonic()
        self._task = self._progress.add_task(title, total=None)
        try:
            yield
        finally:
            self._progress.remove_task(self._task)
            self._task = None
        self._console.print(f"[dim]{time.monotonic() - started:6.1f} s[/]  {title}")

    def advance(self, done: int, of: int, detail: str = "") -> None:
        """Move the open step's bar."""
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=of, detail=detail)


def stdout_console() -> RichConsole:
    """Open stdout; a pipe or a file gets a fixed width."""
    return RichConsole(highlight=False, width=None if sys.stdout.isatty() else 100)


class Console:
    """Prints one command's progress and result."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._stderr = RichConsole(stderr=True, highlight=False)
        self._stdout = stdout_console()

    @contextmanager
    def progress(self) -> Iterator[Steps]:
        """Show steps on stderr while the context is open."""
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._stderr, transient=True) as progress:
            yield Steps(progress, self._stderr)

    def show(self, output: Path, manifest: Manifest) -> None:
        """Print an artifact's result."""
        if self.as_json:
            plain = {**to_plain(manifest), "output": str(output)}
            sys.stdout.write(json.dumps(plain, ensure_ascii=False) + "\n")
            return
        table = Table(title=str(output), title_justify="left", show_header=False)
        for name, text in rows(manifest):
            table.add_row(name, escape(text))
        self._stdout.print(table)


def rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Describe an artifact in lines of a name and a text."""
    yield "file", f"{manifest.bytes / 1e6:.1f} MB, sha256 {manifest.sha256[:16]}…"
    if manifest.checkpoint is not None:
        yield "checkpoint", manifest.checkpoint.source
        for note in manifest.checkpoint.notes:
            yield "", note
    for title, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            shape = ", ".join(str(size) for size in spec.shape)
            yield title, f"{spec.name}: {spec.dtype} [{shape}]"
    yield "batch", ", ".join(str(profile) for profile in manifest.profiles)
    if manifest.preprocessing is not None:
        yield "preprocessing", f"{manifest.preprocessing.name}, {manifest.preprocessing.size}"
    attention = manifest.attention
    yield "graph", f"{manifest.nodes} nodes, opset {manifest.opset}, {manifest.dtype}"
    yield "attention", f"{attention.fused} of {attention.expected} fused ({attention.form})"
    if manifest.islands:
        yield "fp32 islands", f"{len(manifest.islands)}: {', '.join(sorted(manifest.islands))}"
    if manifest.engine is not None:
        yield from _engine_rows(manifest.engine)
    yield from _check_rows(manifest.check)
    for note in manifest.notes:
        yield "note", note
    yield "took", f"{manifest.seconds:.1f} s, peak memory {manifest.peak_rss_bytes / 1e9:.2f} GB"


def _engine_rows(engine: EngineRecord) -> Iterator[tuple[str, str]]:
    capabilities = ", ".join(engine.compute_capabilities)
    yield "engine", f"{engine.backend} {engine.version} for SM {capabilities}"
    blocks = sorted(set(engine.kernels_per_block.values()))
    span = f"{blocks[0]}" if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}" if blocks else "?"
    yield "kernels", f"{engine.kernels} in all, {span} a block"
    gemms = ", ".join(f"{count} in {dtype}" for dtype, count in engine.gemm_dtypes.items())
    yield "matrix products", gemms
    yield "fused attention", f"{engine.fused_attention} kernels"
    yield "executed", "yes" if engine.executed else f"no: {engine.reason}"


def _check_rows(check: CheckRecord | None) -> Iterator[tuple[str, str]]:
    if check is None:
        yield "check", "none (--no-check)"
        return
    sizes = ", ".join(str(size) for size in check.batches)
    what = "inputs" if check.source.startswith("seeded noise") else "images"
    yield "check", f"{check.images} {what}: {check.source}; batches {sizes}"
    yield "", f"against {check.reference}"
    yield "", f"on {check.executed_on}"
    yield "max_abs", f"{check.max_abs:.2e} (mean {check.mean_abs:.2e})"
    yield (
        "cosine",
        (f"min {check.cosine_min:.8f}, p1 {check.cosine_p1:.8f}, median {check.cosine_median:.8f}"),
    )
    yield "verdict", "passed" if check.passed else "failed"


def show_inspections(found: list[Inspection], *, as_json: bool) -> None:
    """Print one artifact, or two side by side with what differs marked."""
    if as_json:
        plain = [{**to_plain(one), "other_bytes": one.other_bytes} for one in found]
        written = plain[0] if len(plain) == 1 else {"artifacts": plain}
        sys.stdout.write(json.dumps(written, ensure_ascii=False) + "\n")
        return
    described = [dict(inspection_rows(one)) for one in found]
    names = list(dict.fromkeys(name for one in described for name in one))
    table = Table("", *(escape(one.file) for one in found), show_lines=len(found) > 1)
    for name in names:
        cells = [one.get(name, "-") for one in described]
        differs = len(set(cells)) > 1
        title = f"[bold]{name} ≠[/]" if differs else name
        table.add_row(title, *(escape(cell) for cell in cells))
    stdout_console().print(table)
