"""What one call at a time runs in, and a bounded number of these, lent to one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.errors import RunnerError
from msn_export.runtime.cuda import Gpu, Handle, bytes_of
from msn_export.runtime.cuda_graphs import Graphs, Run
from msn_export.runtime.engine import Engine, row_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray


class ExecutionSlot:
    """A stream with a context and the GPU's memory it needs, allocated once.

    ``sizes`` are the bytes of one row of each tensor.

    ``staging`` and ``enqueue`` want the GPU to be current. After an error the lane is closed, not
    used again.
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
        """Give a run of the engine to the lane's stream, as a graph where there is one.

        Raises:
            DeviceError: CUDA or TensorRT refuses.
        """
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
        """Start copying a tensor's rows to the GPU."""
        size = len(rows) * self.sizes[name]
        pinned = self._bytes[name][:size].view(rows.dtype).reshape(rows.shape)
        np.copyto(pinned, rows)
        self._gpu.upload(self.addresses[name], self._pinned[name], size, stream)

    def download(self, name: str, rows: int, stream: Handle) -> None:
        """Start copying a tensor's rows to the host."""
        size = rows * self.sizes[name]
        self._gpu.download(self._pinned[name], self.addresses[name], size, stream)

    def read(self, name: str, into: NDArray[Any]) -> None:
        """Copy what arrived, once the stream has done it."""
        size = len(into) * self.sizes[name]
        np.copyto(into, self._bytes[name][:size].view(into.dtype).reshape(into.shape))


class SlotPool:
    """Lends lanes; makes one only where all others are in use, ``limit`` at most.

    Args:
        make: makes a lane.
        limit: lanes that exist at once; who wants one more waits.
        name: what errors call the runner.
    """

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
    def lane(self) -> Iterator[ExecutionSlot]:
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

    def free(self) -> list[ExecutionSlot]:
        """List the lanes that nobody uses at the moment."""
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

    def _give_back(self, lane: ExecutionSlot | None) -> None:
        with self._changed:
            if lane is not None:
                self._free.append(lane)
            else:
                self._count -= 1
            self._changed.notify_all()
