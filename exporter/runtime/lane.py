"""What one call at a time runs in: a stream, a context, its memory, and its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.runtime.cuda import Gpu, Owned, bytes_of
from msn_export.runtime.engine import Engine, row_bytes
from msn_export.runtime.graphs import Graphs, Run

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Lane:
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
        captures = graphs and engine.loaded.loader.captures
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
        self._memory: dict[str, Owned] = {}
        self._pinned: dict[str, Owned] = {}
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

    def upload(self, name: str, rows: NDArray[Any], stream: Owned) -> None:
        """Start copying a tensor's rows to the GPU."""
        size = len(rows) * self.sizes[name]
        pinned = self._bytes[name][:size].view(rows.dtype).reshape(rows.shape)
        np.copyto(pinned, rows)
        self._gpu.upload(self.addresses[name], self._pinned[name], size, stream)

    def download(self, name: str, rows: int, stream: Owned) -> None:
        """Start copying a tensor's rows to the host."""
        size = rows * self.sizes[name]
        self._gpu.download(self._pinned[name], self.addresses[name], size, stream)

    def read(self, name: str, into: NDArray[Any]) -> None:
        """Copy what arrived, once the stream has done it."""
        size = len(into) * self.sizes[name]
        np.copyto(into, self._bytes[name][:size].view(into.dtype).reshape(into.shape))
