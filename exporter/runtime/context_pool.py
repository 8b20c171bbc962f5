"""Memory of the GPU for outputs that callers keep, used again once they let go of it.

A caller's last use may still be waiting in its stream when it lets go. So a block goes back to
calls of that stream, which are ordered after it, or to one that is made to wait for that stream.
That takes a stream that still exists: the block keeps the object of torch or cupy that owns it. A
stream that is known by its number alone may be gone and cannot be asked. Blocks that it used go
back to its own calls, or are freed, for which CUDA waits.

A graph holds shapes and addresses as they were when it was captured, and the state of its execution
context: so each has a context of its own, which nothing else touches, over the slot's memory. It is
captured the second time a run comes up, after that run was done eagerly in the new context, as
TensorRT asks; a run that never comes again costs nothing.
"""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import DeviceError, RunnerError
from msn_export.runtime import dlpack
from msn_export.runtime.cuda import Gpu, Graph, Handle, bytes_of
from msn_export.runtime.engine import Engine, Execution, row_bytes

_IDLE = 8  # blocks kept for later


class MemoryBlock:
    """Memory with an event that is recorded after what was written last.

    ``streams`` are those that use it, each with what keeps it alive, None where nothing does.
    """

    def __init__(self, size: int, memory: Handle, event: Handle) -> None:
        self.size = size
        self.memory = memory
        self.event = event
        self.streams: dict[int, object] = {}

    def close(self) -> None:
        with ExitStack() as owned:
            owned.callback(self.memory.close)
            owned.callback(self.event.close)


class Lease:
    """A block as long as an output in it is used; then the output memory has it back.

    ``owners`` are what keeps the streams alive that are known when it is lent.
    """

    def __init__(
        self, output_memory: OutputMemory, block: MemoryBlock, owners: Mapping[int, object]
    ) -> None:
        self._output_memory = output_memory
        self._block = block
        self._owners = owners
        self.pointer = int(block.memory)

    def written(self, stream: Handle) -> None:
        self._output_memory.gpu.record(self._block.event, stream)

    def give_to(self, stream: int) -> None:
        """Make a stream wait for what is written, and remember it."""
        self._give(stream, self._owners.get(stream))

    def use_on(self, stream: Any) -> None:
        """Do the same for a stream as callers name it."""
        self._give(dlpack.handle_of(stream), dlpack.owner_of(stream))

    def _give(self, stream: int, owner: object) -> None:
        streams, gpu = self._block.streams, self._output_memory.gpu
        streams[stream] = owner if owner is not None else streams.get(stream)
        with gpu.current():
            gpu.wait(stream, self._block.event)

    def __del__(self) -> None:
        # anywhere: in another thread, in the garbage collector, while a graph is captured. So
        # nothing of CUDA here, and no lock, unless the runner is gone.
        if not sys.is_finalizing():  # the driver frees what a process that ends still holds
            self._output_memory.give_back(self._block)


class OutputMemory:
    """Lends blocks. Those that are lent may outlive the runner: each is freed as it comes back."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._returned: deque[MemoryBlock] = deque()
        self._idle: list[MemoryBlock] = []
        self._is_open = True
        self._lock = threading.RLock()  # __del__ may come while this thread holds it

    def lend(self, size: int, stream: int, owners: Mapping[int, object]) -> Lease:
        """Lend a block of at least ``size`` bytes to a run that is ordered after ``stream``.

        ``owners`` are what keeps streams alive.
        """
        capacity = 1 << max(size - 1, 255).bit_length()
        with self._lock:
            self._collect()
            block = self._reuse(capacity, stream) or self._allocate(capacity)
        return Lease(self, block, owners)

    def give_back(self, block: MemoryBlock) -> None:
        self._returned.append(block)
        if not self._is_open:
            self.close()

    def close(self) -> None:
        """Free what is not lent, and from now on what comes back."""
        self._is_open = False
        with self._lock:
            self._collect()
            if self._idle:
                self.gpu.release(self._free_idle)

    def _free_idle(self) -> None:
        with ExitStack() as owned:
            while self._idle:
                owned.callback(self._idle.pop().close)

    def _collect(self) -> None:
        while self._returned:
            self._idle.append(self._returned.popleft())

    def _reuse(self, capacity: int, stream: int) -> MemoryBlock | None:
        fitting = [block for block in self._idle if block.size == capacity]
        for block in sorted(fitting, key=lambda block: len(_others(block, stream))):
            if self._wait_for_use(block, stream):
                self._idle.remove(block)
                block.streams.clear()
                return block
        while len(self._idle) >= _IDLE:
            self._idle.pop(0).close()
        return None

    def _wait_for_use(self, block: MemoryBlock, stream: int) -> bool:
        """Make a stream wait for all others that use a block; False where one cannot be asked."""
        others = _others(block, stream)
        if any(block.streams[other] is None for other in others):
            return False
        if any(self.gpu.is_capturing(other) for other in others):
            return False
        for other in others:
            self.gpu.record(block.event, other)
            self.gpu.wait(stream, block.event)
        return True

    def _allocate(self, capacity: int) -> MemoryBlock:
        with ExitStack() as owned:
            memory = self.gpu.memory(capacity)
            owned.callback(memory.close)
            event = self.gpu.event()
            owned.pop_all()
        return MemoryBlock(capacity, memory, event)


def _others(block: MemoryBlock, stream: int) -> list[int]:
    """List the streams of a block that a call of ``stream`` is not ordered after."""
    # the default stream per thread is another in each
    return [one for one in block.streams if one != stream or one == dlpack.PER_THREAD]


LIMIT = 8  # graphs a slot keeps; each holds a context (host memory, little of the GPU's)
_REMEMBERED = 64  # runs that were seen once
_PAUSE = 16  # runs after the first refusal; four times as many after each further one
_ATTEMPTS = 5  # that fail one after the other


@dataclass(frozen=True, slots=True)
class Run:
    """Key of a graph: a profile, a batch and the addresses of every tensor."""

    profile: int
    batch: int
    addresses: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, profile: int, batch: int, addresses: Mapping[str, int]) -> Run:
        return cls(profile, batch, tuple(addresses.items()))


class _Captured:
    """A graph with the context it was captured from, and when it was launched last."""

    def __init__(self, graph: Graph, owned: ExitStack, now: int) -> None:
        self.graph = graph
        self.close = owned.close
        self.used = now


class Graphs:
    """Graphs of one slot. ``refusal`` says why nothing is captured at the moment, where that is so.

    Memory may be short for a moment only: after a pause it is tried again, a few times.
    """

    def __init__(self, gpu: Gpu, engine: Engine, scratch: Handle | None, stream: Handle) -> None:
        self._gpu, self._engine, self._scratch, self._stream = gpu, engine, scratch, stream
        self._captured: OrderedDict[Run, _Captured] = OrderedDict()
        self._seen: OrderedDict[Run, int] = OrderedDict()
        self._now = 0
        self._failed = 0  # attempts, since the last that did not
        self._paused_until = 0
        self.refusal = ""

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, run: Run) -> bool:
        """Replay a run, or do it in a new context and capture it; False: the caller shall do it."""
        self._now += 1
        found = self._captured.get(run)
        if found is not None:
            found.used = self._now
            self._captured.move_to_end(run)
            self._gpu.launch(found.graph, self._stream)
            return True
        first = self._seen.pop(run, None)
        if first is None or not self._may_capture() or not self._has_room(first):
            self._seen[run] = self._now
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
            return False
        return self._capture(run)

    def close(self) -> None:
        with ExitStack() as owned:
            while self._captured:
                owned.callback(self._captured.popitem()[1].close)

    def _may_capture(self) -> bool:
        return self._failed < _ATTEMPTS and self._now >= self._paused_until

    def _refuse(self, error: DeviceError) -> None:
        self._paused_until = self._now + _PAUSE * 4**self._failed
        self._failed += 1
        later = "it is not tried again" if self._failed == _ATTEMPTS else "it is tried again later"
        self.refusal = f"{error}; {later}"

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
                self._refuse(error)
                return False
            owned.callback(execution.close)
            owned.callback(self._gpu.synchronize, self._stream)  # before the context goes
            self._enqueue(execution, run)  # the run itself
            try:
                graph = self._gpu.capture(self._stream, lambda: self._enqueue(execution, run))
            except DeviceError as error:
                self._refuse(error)
                return True
            owned.callback(graph.close)
            self._captured[run] = _Captured(graph, owned.pop_all(), self._now)
            self._failed, self.refusal = 0, ""
            return True

    def _enqueue(self, execution: Execution, run: Run) -> None:
        execution.enqueue(run.profile, run.batch, dict(run.addresses), self._stream)


class ExecutionSlot:
    """A stream with a context and the GPU's memory it needs, allocated once.

    ``sizes`` are the bytes of one row of each tensor. ``staging`` and ``enqueue`` want the GPU to
    be current. After an error the slot is closed, not used again.
    """

    def __init__(self, gpu: Gpu, engine: Engine, *, graphs: bool) -> None:
        self.gpu, self.engine = gpu, engine
        self.sizes = {spec.name: row_bytes(spec) for spec in (*engine.inputs, *engine.outputs)}
        self._staging: Staging | None = None
        self._owned = ExitStack()
        try:
            with gpu.current():
                self._make(graphs=graphs)
        except BaseException:
            gpu.release(self._owned.close)
            raise

    def _make(self, *, graphs: bool) -> None:
        gpu, engine, owned = self.gpu, self.engine, self._owned
        self.stream = gpu.stream()
        owned.callback(self.stream.close)
        scratch = None
        if engine.scratch:
            scratch = gpu.memory(engine.scratch)
            owned.callback(scratch.close)
        self.ready = gpu.event()
        owned.callback(self.ready.close)
        self._eager = engine.context(scratch, graphs=graphs)
        owned.callback(self._eager.close)
        captures = graphs and engine.loaded.row.captures
        self.graphs = Graphs(gpu, engine, scratch, self.stream) if captures else None
        if self.graphs is not None:
            owned.callback(self.graphs.close)

    @property
    def staging(self) -> Staging:
        """Buffers for images of the host, and for what cannot be run in place; made when needed."""
        if self._staging is None:
            self._staging = Staging(self.gpu, self.engine, self.sizes)
            self._owned.callback(self._staging.close)
        return self._staging

    def enqueue(self, profile: int, batch: int, addresses: Mapping[str, int]) -> None:
        """Give a run of the engine to the slot's stream, as a graph where there is one."""
        if self.graphs is not None and self.graphs.run(Run.of(profile, batch, addresses)):
            return
        self._eager.enqueue(profile, batch, addresses, self.stream)

    def close(self) -> None:
        """Wait for what runs, then free everything."""
        self._owned.callback(self.gpu.synchronize, self.stream)
        self.gpu.release(self._owned.close)


class Staging:
    """For each tensor, memory on the GPU and pinned memory of the host, for the largest batch."""

    def __init__(self, gpu: Gpu, engine: Engine, sizes: Mapping[str, int]) -> None:
        self._gpu, self.sizes = gpu, sizes
        most = max(profile.max for profile in engine.profiles)
        self._memory: dict[str, Handle] = {}
        self._pinned: dict[str, Handle] = {}
        self._bytes: dict[str, NDArray[Any]] = {}
        with ExitStack() as owned:
            for name, size in self.sizes.items():
                self._memory[name] = gpu.memory(most * size)
                owned.callback(self._memory[name].close)
                self._pinned[name] = gpu.pinned(most * size)
                owned.callback(self._pinned[name].close)
                self._bytes[name] = bytes_of(self._pinned[name], most * size)
            self.close = owned.pop_all().close
        self.addresses = {name: int(memory) for name, memory in self._memory.items()}

    def upload(self, name: str, rows: NDArray[Any], stream: Handle) -> None:
        size = len(rows) * self.sizes[name]
        pinned = self._bytes[name][:size].view(rows.dtype).reshape(rows.shape)
        np.copyto(pinned, rows)
        self._gpu.upload(self.addresses[name], self._pinned[name], size, stream)

    def download(self, name: str, rows: int, stream: Handle) -> None:
        size = rows * self.sizes[name]
        self._gpu.download(self._pinned[name], self.addresses[name], size, stream)

    def read(self, name: str, into: NDArray[Any]) -> None:
        """Copy what arrived, once the stream has done it."""
        size = len(into) * self.sizes[name]
        np.copyto(into, self._bytes[name][:size].view(into.dtype).reshape(into.shape))


class SlotPool:
    """Execution slots; one more is made only where all are in use, ``limit`` at most."""

    def __init__(self, make: Callable[[], ExecutionSlot], limit: int, name: str) -> None:
        self._make = make
        self._limit = limit
        self._name = name
        self._free: list[ExecutionSlot] = []
        self._count = 0
        self._is_open = True
        self._changed = threading.Condition()
        self._making = threading.Lock()  # one context is made at a time

    @contextmanager
    def slot(self) -> Iterator[ExecutionSlot]:
        """Lend a slot for the length of a block; one in which an error happened is closed."""
        slot = self._take()
        try:
            yield slot
        except BaseException:
            with ExitStack() as last:
                last.callback(self._give_back, None)
                slot.close()
            raise
        self._give_back(slot)

    def close(self) -> None:
        """Lend nothing more, wait for what is lent, and close all slots."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._count == len(self._free))
            with ExitStack() as owned:
                while self._free:
                    owned.callback(self._free.pop().close)
                self._count = 0

    def free(self) -> list[ExecutionSlot]:
        """List the slots that nobody uses at the moment."""
        with self._changed:
            return list(self._free)

    def _take(self) -> ExecutionSlot:
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

    def _give_back(self, slot: ExecutionSlot | None) -> None:
        with self._changed:
            if slot is not None:
                self._free.append(slot)
            else:
                self._count -= 1
            self._changed.notify_all()
