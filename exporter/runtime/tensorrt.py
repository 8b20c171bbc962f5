"""Engines in TensorRT, its lean runtime, or TensorRT-RTX.

A batch is padded with whatever lies behind its images: no image sees another, and the outputs of
the padding are not read.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import DeviceError, InputError, MsnExportError
from msn_export.host import Device
from msn_export.runtime import dlpack
from msn_export.runtime.batches import Chunk, split_batch
from msn_export.runtime.context_pool import ExecutionSlot, Lease, OutputMemory, SlotPool
from msn_export.runtime.cuda import Gpu
from msn_export.runtime.dlpack import OF_ONNX, Borrowed, Tensor
from msn_export.runtime.engine import Engine, VerifiedEngine
from msn_export.runtime.runner import Outputs, Runner, element_of, require_fit
from msn_export.runtime.runtime_cache import RuntimeCache, cache_path
from msn_export.runtime.versions import CudaDriver, LoadedTensorRT
from msn_export.spec import TensorSpec

_ALIGNED = 256  # bytes; what cuMemAlloc gives and TensorRT may count on


def run_on_host(
    slot: ExecutionSlot, images: NDArray[Any], chunks: Sequence[Chunk]
) -> dict[str, NDArray[Any]]:
    """Run images of the host; bfloat16 comes and goes as its bytes."""
    engine, staging, stream = slot.engine, slot.staging, slot.stream
    whole = {
        spec.name: np.empty((len(images), *_sizes(spec)), OF_ONNX[spec.dtype].storage)
        for spec in engine.outputs
    }
    for chunk in chunks:
        rows = slice(chunk.start, chunk.start + chunk.count)
        staging.upload(engine.input.name, images[rows], stream)
        slot.enqueue(chunk.profile, chunk.size, staging.addresses)
        for name in whole:
            staging.download(name, chunk.count, stream)
        slot.gpu.synchronize(stream)
        for name, array in whole.items():
            staging.read(name, array[rows])
    return whole


def run_on_device(
    memory: OutputMemory,
    slot: ExecutionSlot,
    images: Borrowed,
    chunks: Sequence[Chunk],
    caller: int,
    owners: Mapping[int, object],
) -> tuple[dict[str, Tensor], Lease]:
    """Run contiguous images that lie on the GPU; the outputs stay where they are made.

    Nothing is copied but what has to be padded or is not aligned. ``caller`` is the stream on which
    the images are made and the outputs are used, ``owners`` what keeps streams alive.
    """
    rows = max(chunk.start + chunk.size for chunk in chunks)
    offsets, total = _layout(slot, rows)
    lease = memory.lend(total, caller, owners)
    slot.gpu.record(slot.ready, caller)
    slot.gpu.wait(slot.stream, slot.ready)
    for chunk in chunks:
        _run_in_place(slot, images, chunk, lease.pointer, offsets)
    lease.written(slot.stream)
    lease.give_to(caller)
    outputs = {
        spec.name: _tensor(spec, images, lease, lease.pointer + offsets[spec.name])
        for spec in slot.engine.outputs
    }
    return outputs, lease


def _layout(slot: ExecutionSlot, rows: int) -> tuple[dict[str, int], int]:
    """Lay out each output of so many rows in one block: offsets, and the size of the block."""
    offsets, total = {}, 0
    for spec in slot.engine.outputs:
        offsets[spec.name] = total
        total += -(-rows * slot.sizes[spec.name] // _ALIGNED) * _ALIGNED
    return offsets, total


def _run_in_place(
    slot: ExecutionSlot, images: Borrowed, chunk: Chunk, block: int, offsets: dict[str, int]
) -> None:
    gpu, engine = slot.gpu, slot.engine
    name = engine.input.name
    source = images.pointer + chunk.start * slot.sizes[name]
    addresses = {name: source}
    if chunk.count != chunk.size or source % _ALIGNED:
        addresses[name] = slot.staging.addresses[name]
        gpu.copy(addresses[name], source, chunk.count * slot.sizes[name], slot.stream)
    moved = {}
    for spec in engine.outputs:
        target = block + offsets[spec.name] + chunk.start * slot.sizes[spec.name]
        if target % _ALIGNED:
            moved[spec.name] = target
            target = slot.staging.addresses[spec.name]
        addresses[spec.name] = target
    slot.enqueue(chunk.profile, chunk.size, addresses)
    for name, target in moved.items():
        gpu.copy(target, addresses[name], chunk.count * slot.sizes[name], slot.stream)


def _tensor(spec: TensorSpec, images: Borrowed, lease: Lease, pointer: int) -> Tensor:
    return Tensor(
        pointer,
        (images.shape[0], *_sizes(spec)),
        OF_ONNX[spec.dtype],
        images.device,
        lease,
        lease.give_to,
    )


def _sizes(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(int(size) for size in spec.shape[1:])


@dataclass(frozen=True, slots=True)
class EngineHost:
    """Driver API, TensorRT and GPU that an engine runs with."""

    cuda: CudaDriver
    loaded: LoadedTensorRT
    device: Device

    def __str__(self) -> str:
        return f"{self.loaded}, {self.device.name}"


class TrtRunner(Runner):
    """An engine on one GPU. ``open_runner`` checks the file first and makes one.

    ``contexts`` calls run at the same time; more wait. ``eager_kernels`` is ``Engine``'s.
    """

    def __init__(
        self,
        engine: VerifiedEngine,
        host: EngineHost,
        *,
        contexts: int = 2,
        cuda_graphs: bool = True,
        eager_kernels: bool = False,
    ) -> None:
        self._cuda_graphs = cuda_graphs
        self._calls = count(1)
        self._closing = threading.Lock()
        self._gpu = gpu = Gpu(host.cuda, host.device.index)
        self._engine = loaded = _load(engine, host, gpu, eager_kernels=eager_kernels)
        self._memory = OutputMemory(gpu)
        make = partial(ExecutionSlot, gpu, loaded, graphs=cuda_graphs)  # keeps no runner alive
        self._pool = SlotPool(make, max(1, contexts), str(host))
        # also where nobody calls close(), and when the process ends
        self._end = finalize(self, _drop, gpu, loaded, self._memory, self._pool)
        super().__init__(str(host), engine.manifest, loaded.inputs, loaded.outputs, loaded.profiles)
        self.file = engine.path

    def __call__(self, images: Any, *, stream: Any = None, profile: int | None = None) -> Outputs:
        """Run any number of images (see ``Runner``).

        Images on the GPU are read in place, and the call does not wait: it is ordered after what
        ``stream`` was given so far, and what ``stream`` is given from then on after it. Without
        ``stream`` that is the current stream of torch or cupy; for other libraries the call
        returns once the outputs are there.

        Args:
            images: as for every runner.
            stream: as for every runner.
            profile: the index of the only profile to use; by default each run's best.
        """
        self._require_open()
        images = self._pixels(images)
        if isinstance(images, np.ndarray):
            require_fit(images.shape, element_of(images), self.inputs[0])
            outputs = self._on_host(images, profile)
            return Outputs({name: self._for_numpy(name, array) for name, array in outputs.items()})
        device = dlpack.device_of(images)
        if device is not None:
            return self._on_gpu(images, device, stream, profile)
        borrowed = dlpack.borrow(images)
        require_fit(borrowed.shape, borrowed.element, self.inputs[0])
        back = dlpack.take_back(images)
        outputs = self._on_host(borrowed.array(), profile)
        return Outputs(
            {name: back(self._for_dlpack(name, array)) for name, array in outputs.items()}
        )

    @property
    def cuda_graphs(self) -> str:
        """Replay of runs, for reports: ``off``, or by whom and how many are kept."""
        if not self._cuda_graphs:
            return "off"
        if not self._engine.loaded.row.captures:
            return "TensorRT-RTX's own"
        graphs = [slot.graphs for slot in self._pool.free() if slot.graphs is not None]
        refusals = {one.refusal for one in graphs if one.refusal}
        return "; ".join([f"{sum(map(len, graphs))} captured", *sorted(refusals)])

    @property
    def runtime_cache(self) -> str:
        """Kernels that TensorRT-RTX compiled: what was loaded, and what was written, or why not."""
        cache = self._engine.cache
        return "none: TensorRT compiles kernels into the engine" if cache is None else cache.state

    def close(self) -> None:
        """Free the engine, its contexts and their memory, after calls under way have ended.

        Outputs on the GPU stay valid as long as someone uses them. A runner that is dropped, or
        still open when the process ends, does the same.
        """
        with self._closing:
            self._is_open = False
            if self._end.detach() is not None:
                _close(self._gpu, self._engine, self._memory, self._pool)

    def _on_host(self, images: NDArray[Any], profile: int | None) -> dict[str, NDArray[Any]]:
        chunks = split_batch(len(images), self.profiles, profile)
        with self._pool.slot() as slot, self._gpu.current():
            outputs = run_on_host(slot, images, chunks)
            self._keep_kernels()
            return outputs

    def _on_gpu(self, images: Any, device: int, stream: Any, profile: int | None) -> Outputs:
        current = dlpack.current_stream(images, device)
        asked = current if stream is None else stream
        caller = dlpack.LEGACY if asked is None else dlpack.handle_of(asked)
        borrowed = dlpack.borrow(images, caller)
        require_fit(borrowed.shape, borrowed.element, self.inputs[0])
        self._require_here(borrowed)
        chunks = split_batch(borrowed.shape[0], self.profiles, profile)
        owners: dict[int, object] = {}
        for one in (dlpack.LEGACY, current, asked):
            if one is not None and (owner := dlpack.owner_of(one)) is not None:
                owners[dlpack.handle_of(one)] = owner
        with self._pool.slot() as slot, self._gpu.current():
            tensors, lease = run_on_device(self._memory, slot, borrowed, chunks, caller, owners)
            if asked is None:  # nobody orders the images' end after this: wait for it here
                self._gpu.synchronize(slot.stream)
            self._keep_kernels()
        back = dlpack.take_back(images)
        outputs = {name: back(tensor) for name, tensor in tensors.items()}
        return Outputs(outputs, lease.use_on)

    def _keep_kernels(self) -> None:
        """Write what was compiled while a service runs: it may end by a signal, without an end."""
        if self._engine.cache is not None and next(self._calls) in _STORED_AFTER:
            self._engine.cache.store()

    def _require_here(self, images: Borrowed) -> None:
        if images.device != self._gpu.index:
            raise InputError(
                f"images lie on GPU {images.device}; this runner is on GPU {self._gpu.index}"
            )
        if not images.is_contiguous:
            raise InputError("images are not contiguous; make them so (torch: .contiguous())")


_STORED_AFTER = frozenset({1, 10, 100, 1000})  # calls
_INHERITED: list[object] = []


def _close(gpu: Gpu, engine: Engine, memory: OutputMemory, pool: SlotPool) -> None:
    if gpu.is_inherited:  # TensorRT's destructors would call CUDA in a process that was forked
        _INHERITED.append((engine, memory, pool))
        return

    def free() -> None:
        with ExitStack() as owned:
            owned.callback(engine.close)
            owned.callback(pool.close)

    with ExitStack() as owned:
        owned.callback(memory.close)
        gpu.release(free)


def _drop(gpu: Gpu, engine: Engine, memory: OutputMemory, pool: SlotPool) -> None:
    with suppress(DeviceError):  # nobody is there to be told; all is freed that CUDA lets go
        _close(gpu, engine, memory, pool)


def _load(file: VerifiedEngine, host: EngineHost, gpu: Gpu, *, eager_kernels: bool) -> Engine:
    engine = None
    cache = None
    if host.loaded.row.contexts == "config":
        cache = RuntimeCache(cache_path(file.sha256, host.loaded.version, host.device))
    try:
        with gpu.current():
            engine = Engine(
                host.loaded,
                file.content,
                file.path.name,
                compatible=file.compatible,
                eager_kernels=eager_kernels,
                cache=cache,
            )
    except Exception as error:  # noqa: BLE001  pybind raises what it likes
        failure = error
    else:
        return engine

    def forget() -> None:  # the traceback's frames hold TensorRT's objects: they go with the GPU
        failure.__traceback__ = failure.__context__ = failure.__cause__ = None
        if engine is not None:
            engine.close()

    gpu.release(forget)
    if isinstance(failure, MsnExportError):
        raise failure
    raise DeviceError(f"{host.loaded} failed on {file.path.name}: {failure}")
