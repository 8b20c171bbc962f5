"""Progress on stderr, and the result as a table or JSON on stdout."""

import gc
import io
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from msn_export.cli.options import STARTED
from msn_export.errors import ESCAPES
from msn_export.schema import to_plain

_TELL = 30.0  # seconds between two lines of a long step in a log
_ANY_WIDTH = 10_000  # columns


class _Shown(RichConsole):
    """A console that shows the characters a terminal would obey: names in files are hostile."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(text.translate(ESCAPES), **options)


def _plain(text: str) -> str:
    """Keep a title from being markup, or a terminal's commands."""
    return escape(text.translate(ESCAPES))


class Steps:
    """Progress on a terminal: a spinner and a clock a step, a bar where the length is known."""

    def __init__(self, progress: Progress, console: RichConsole) -> None:
        self._progress = progress
        self._console = console
        self._task: Any = None
        self._printed_at = 0.0

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Show a step while it runs; leave one line with its time."""
        started = self._printed_at = time.monotonic()
        self._task = self._progress.add_task(_plain(title), total=None, detail="")
        try:
            yield
        finally:
            self._progress.remove_task(self._task)
            self._task = None
        self._console.print(f"[dim]{time.monotonic() - started:6.1f} s[/]  {_plain(title)}")

    def advance(self, done: int, of: int, detail: str = "") -> None:
        if self._task is not None:
            self._progress.update(self._task, completed=done, total=of, detail=_plain(detail))
        if detail and not self._console.is_terminal and time.monotonic() - self._printed_at > _TELL:
            self._printed_at = time.monotonic()  # a log shows no bar
            self._console.print(f"          {_plain(detail)}")


@contextmanager
def _without_collections() -> Iterator[None]:
    """Import without searching for garbage: torch makes little, and the search took 0.3 s."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _standard_output_named() -> Iterator[None]:
    """Name the file that is full or closed."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def _least(table: Table) -> int:
    """Count the terminal's columns that a table takes with each of its columns at its least width.

    rich counts the longest word, and a word may be folded.
    """
    _, right, _, left = table.padding
    columns = len(table.columns)
    padding = columns * (left + right) - (0 if table.pad_edge else left + right)
    return sum(column.min_width or 1 for column in table.columns) + padding + columns + 1


class Console:
    """Prints one command's progress on stderr and its result, a table or JSON, on stdout."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may have no "…" and no "≠"
            sys.stdout.reconfigure(errors="backslashreplace")
        self._stderr = _Shown(stderr=True, highlight=False, emoji=False)
        # a pipe or a file gets a fixed width, and tables of figures as much as they need
        self._is_open_ended = (
            not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdigit()
        )
        self._stdout = _Shown(
            highlight=False, emoji=False, width=100 if self._is_open_ended else None
        )

    @contextmanager
    def progress(self) -> Iterator[Steps]:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("[dim]{task.fields[detail]}[/]"),
            TimeElapsedColumn(),
        )
        # without a terminal nothing is redrawn; the line that a step leaves is printed all the same
        still = not self._stderr.is_terminal
        with Progress(*columns, console=self._stderr, transient=True, disable=still) as progress:
            yield Steps(progress, self._stderr)

    @contextmanager
    def loading(self, package: str) -> Iterator[None]:
        """Show on a terminal that packages are imported; on a slow disk that takes many seconds."""
        with _without_collections():
            if not self._stderr.is_terminal:  # a log has the steps of the work alone
                yield
                return
            with self.progress() as progress, progress.step(f"load {package}"):
                yield

    @property
    def took(self) -> str:
        """The time since the process began, imports too, in seconds."""
        return f"{time.monotonic() - STARTED:.1f} s"

    def print(self, shown: Any) -> None:
        with _standard_output_named():
            self._stdout.print(shown)
            sys.stdout.flush()

    def fits(self, table: Table) -> bool:
        """Check whether a table can be shown with every cell whole."""
        return self._is_open_ended or _least(table) <= self._stdout.width

    def print_whole(self, table: Table) -> None:
        """Print a table and clip none of its lines: in a pipe they are as long as they need be."""
        width, least = self._stdout.width, _least(table)
        if self._is_open_ended:
            options = self._stdout.options.update(width=_ANY_WIDTH)
            least = Measurement.get(self._stdout, options, table).maximum
        self._stdout.width = max(width, least)  # a terminal breaks lines that are longer
        try:
            with _standard_output_named():
                self._stdout.print(table)
                sys.stdout.flush()
        finally:
            self._stdout.width = width

    def print_json(self, record: Any) -> None:
        """Print one JSON object on stdout, and nothing else there."""
        text = json.dumps(to_plain(record), ensure_ascii=False, allow_nan=False)
        with _standard_output_named():
            sys.stdout.write(text.translate(ESCAPES) + "\n")
            sys.stdout.flush()
