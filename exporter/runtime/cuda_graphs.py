"""CUDA graphs of one lane: which runs are captured, replayed and given up.

A graph holds shapes and addresses as they were when it was captured, and the state of its execution
context: so each has a context of its own, which nothing else touches, over the lane's memory. It is
captured the second time a run comes up, after that run was done eagerly in the new context, as
TensorRT asks; a run that never comes again costs nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from msn_export.errors import DeviceError

if TYPE_CHECKING:
    from msn_export.runtime.cuda import Gpu, Graph, Handle
    from msn_export.runtime.engine import Engine, Execution


LIMIT = 8  # graphs a lane keeps; each holds a context (host memory, little of the GPU's)
_REMEMBERED = 64  # runs that were seen once


@dataclass(frozen=True, slots=True)
class Run:
    """What a graph is for: a profile, a batch and the addresses of every tensor."""

    profile: int
    batch: int
    addresses: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, profile: int, batch: int, addresses: Mapping[str, int]) -> Run:
        """Make the key of a run."""
        return cls(profile, batch, tuple(addresses.items()))


class _Captured:
    """A graph with the context it was captured from, and when it was launched last."""

    def __init__(self, graph: Graph, owned: ExitStack, now: int) -> None:
        self.graph = graph
        self.close = owned.close
        self.used = now


class Graphs:
    """The graphs of one lane. ``refusal`` says why nothing more is captured, where that is so."""

    def __init__(self, gpu: Gpu, engine: Engine, scratch: Handle | None, stream: Handle) -> None:
        self._gpu, self._engine, self._scratch, self._stream = gpu, engine, scratch, stream
        self._captured: OrderedDict[Run, _Captured] = OrderedDict()
        self._seen: OrderedDict[Run, int] = OrderedDict()
        self._now = 0
        self.refusal = ""

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, run: Run) -> bool:
        """Replay a run, or do it in a new context and capture it; False: the caller shall do it.

        Raises:
            DeviceError: a launch failed, or the new context did not run.
        """
        self._now += 1
        found = self._captured.get(run)
        if found is not None:
            found.used = self._now
            self._captured.move_to_end(run)
            self._gpu.launch(found.graph, self._stream)
            return True
        first = self._seen.pop(run, None)
        if first is None or self.refusal or not self._has_room(first):
            self._seen[run] = self._now
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
            return False
        return self._capture(run)

    def close(self) -> None:
        """Free every graph and its context."""
        with ExitStack() as owned:
            while self._captured:
                owned.callback(self._captured.popitem()[1].close)

    def _has_room(self, first: int) -> bool:
        """Make room; a graph goes only for a run that came up twice since it was launched last.

        So addresses that rotate among more than fit do not push each other out at every turn.
        """
        if len(self._captured) < LIMIT:
            return True
        oldest, captured = next(iter(self._captured.items()))
        if captured.used > first:
            return False
        del self._captured[oldest]
        captured.close()
        return True

    def _capture(self, run: Run) -> bool:
        with ExitStack() as owned:
            try:
                execution = self._engine.context(self._scratch, graphs=False)
            except DeviceError as error:
                self.refusal = str(error)
                return False
            owned.callback(execution.close)
            owned.callback(self._gpu.synchronize, self._stream)  # before the context goes
            self._enqueue(execution, run)  # the run itself
            try:
                graph = self._gpu.capture(self._stream, lambda: self._enqueue(execution, run))
            except DeviceError as error:
                self.refusal = str(error)
                return True
            owned.callback(graph.close)
            self._captured[run] = _Captured(graph, owned.pop_all(), self._now)
            return True

    def _enqueue(self, execution: Execution, run: Run) -> None:
        execution.enqueue(run.profile, run.batch, dict(run.addresses), self._stream)
