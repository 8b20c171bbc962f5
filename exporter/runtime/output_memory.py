"""Memory of the GPU for outputs that callers keep, used again once they let go of it.

A caller's last use may still be waiting in its stream when it lets go, and a stream that is not
ours may be gone by then: it cannot be asked. So a block goes back only to calls that are ordered
after that stream, because they name it as theirs; other blocks are freed, for which CUDA waits.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from msn_export.runtime.cuda import Gpu, Handle


_IDLE = 8  # blocks kept for later


class MemoryBlock:
    """Memory with the event that says when what was written last is there.

    ``streams`` are those of callers that were given it.
    """

    def __init__(self, size: int, memory: Handle, event: Handle) -> None:
        self.size = size
        self.memory = memory
        self.event = event
        self.streams: set[int] = set()

    def close(self) -> None:
        """Free it."""
        with ExitStack() as owned:
            owned.callback(self.memory.close)
            owned.callback(self.event.close)


class Lease:
    """A block as long as an output in it is used; then the arena has it back."""

    def __init__(self, arena: OutputMemory, block: MemoryBlock) -> None:
        self._arena = arena
        self._block = block
        self.pointer = int(block.memory)

    def written(self, stream: Handle) -> None:
        """Note that what ``stream`` was given so far writes the block."""
        self._arena.gpu.record(self._block.event, stream)

    def give_to(self, stream: int) -> None:
        """Make a caller's stream wait for what is written, and remember it."""
        self._block.streams.add(stream)
        with self._arena.gpu.current():
            self._arena.gpu.wait(stream, self._block.event)

    def __del__(self) -> None:
        # anywhere: in another thread, in the garbage collector, while a graph is captured. So
        # nothing of CUDA here, and no lock, unless the runner is gone.
        self._arena.give_back(self._block)


class OutputMemory:
    """Lends blocks. Its memory may outlive the runner: the last block that comes back ends it."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self._returned: deque[MemoryBlock] = deque()
        self._idle: list[MemoryBlock] = []
        self._lent = 0
        self._is_open = True
        self._lock = threading.RLock()  # __del__ may come while this thread holds it

    def lend(self, size: int, stream: int | None) -> Lease:
        """Lend a block of at least ``size`` bytes.

        Args:
            size: bytes.
            stream: the caller's, which the run is ordered after; None where it has none.
        """
        capacity = 1 << max(size - 1, 255).bit_length()
        with self._lock:
            self._collect()
            block = self._reuse(capacity, stream) or self._allocate(capacity)
            self._lent += 1
        return Lease(self, block)

    def give_back(self, block: MemoryBlock) -> None:
        """Take a block back."""
        self._returned.append(block)
        if not self._is_open:
            self.close()

    def close(self) -> None:
        """Free what is not lent, and once nothing is, let go of the GPU."""
        self._is_open = False
        with self._lock, ExitStack() as owned:
            self._collect()
            if self._lent == 0:
                owned.callback(self.gpu.close)
            if self._idle:
                self.gpu.release(self._free_idle)

    def _free_idle(self) -> None:
        with ExitStack() as owned:
            while self._idle:
                owned.callback(self._idle.pop().close)

    def _collect(self) -> None:
        while self._returned:
            self._idle.append(self._returned.popleft())
            self._lent -= 1

    def _reuse(self, capacity: int, stream: int | None) -> MemoryBlock | None:
        for index, block in enumerate(self._idle):
            if block.size == capacity and block.streams <= {stream}:
                return self._idle.pop(index)
        while len(self._idle) >= _IDLE:
            self._idle.pop(0).close()
        return None

    def _allocate(self, capacity: int) -> MemoryBlock:
        with ExitStack() as owned:
            memory = self.gpu.memory(capacity)
            owned.callback(memory.close)
            event = self.gpu.event()
            owned.pop_all()
        return MemoryBlock(capacity, memory, event)
