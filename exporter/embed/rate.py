"""How fast a long run goes and when it will be over."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_WINDOW = 60.0  # seconds a rate looks back: long enough for slow batches, short enough to be true


class Rate:
    """The rate of the last minute, and the time that what is left will take at it."""

    def __init__(self, total: int, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self._clock = clock
        self._seen = deque([(clock(), done)])

    def at(self, done: int) -> str:
        """Take note of how many are done; say rate and time left."""
        now = self._clock()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW:
            self._seen.popleft()
        began, before = self._seen[0]
        rate = (done - before) / max(now - began, 1e-9)
        left = f"{_clock_time((self.total - done) / rate)} left" if rate else "time left unknown"
        return f"{done} of {self.total}, {rate:.1f}/s, {left}"


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
