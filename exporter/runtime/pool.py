"""A bounded number of lanes, lent to one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from msn_export.errors import RunnerError

if TYPE_CHECKING:
    from msn_export.runtime.lane import Lane


class Pool:
    """Lends lanes; makes one only where all others are in use, ``limit`` at most.

    Args:
        make: makes a lane.
        limit: lanes that exist at once; who wants one more waits.
        name: what errors call the runner.
    """

    def __init__(self, make: Callable[[], Lane], limit: int, name: str) -> None:
        self._make = make
        self._limit = limit
        self._name = name
        self._free: list[Lane] = []
        self._count = 0
        self._is_open = True
        self._changed = threading.Condition()
        self._making = threading.Lock()  # one context is made at a time

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """Lend a lane for the length of a block; one in which an error happened is closed.

        Raises:
            RunnerError: the pool is closed.
        """
        lane = self._take()
        try:
            yield lane
        except BaseException:
            with ExitStack() as last:
                last.callback(self._give_back, None)
                lane.close()
            raise
        self._give_back(lane)

    def close(self) -> None:
        """Lend nothing more, wait for what is lent, and close all lanes."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._count == len(self._free))
            with ExitStack() as owned:
                while self._free:
                    owned.callback(self._free.pop().close)
                self._count = 0

    def free(self) -> list[Lane]:
        """List the lanes that nobody uses at the moment."""
        with self._changed:
            return list(self._free)

    def _take(self) -> Lane:
        with self._changed:
            self._changed.wait_for(
                lambda: self._free or self._count < self._limit or not self._is_open
            )
            if not self._is_open:
                raise RunnerError(f"this runner ({self._name}) is closed; open another")
            if self._free:
                return self._free.pop()  # the one used last: its graphs are the likeliest to fit
            self._count += 1
        try:
            with self._making:
                return self._make()
        except BaseException:
            self._give_back(None)
            raise

    def _give_back(self, lane: Lane | None) -> None:
        with self._changed:
            if lane is not None:
                self._free.append(lane)
            else:
                self._count -= 1
            self._changed.notify_all()
