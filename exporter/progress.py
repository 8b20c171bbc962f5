"""The interface by which a long step reports to whoever shows it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Shows which step is under way, and how far it is where that is known."""

    def step(self, title: str) -> AbstractContextManager[None]:
        """Show a step for as long as the context is open."""

    def advance(self, done: int, of: int, detail: str = "") -> None:
        """Show how far the open step is."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def step(self, title: str) -> Iterator[None]:  # noqa: ARG002
        yield

    def advance(self, done: int, of: int, detail: str = "") -> None:
        """Ignore it."""


SILENT = Silent()
