"""Run an engine in TensorRT, its lean runtime, or TensorRT-RTX.

A batch that has to be padded is so with what lies behind its images: no image sees another, and
what comes of the padding is not read.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.errors import DeviceError, InputError, MsnExportError
from msn_export.runtime import dlpack
from msn_export.runtime import dlpack as library
from msn_export.runtime.context_pool import ExecutionSlot, OutputMemory, SlotPool
from msn_export.runtime.cuda import Gpu
from msn_export.runtime.dlpack import OF_ONNX, Tensor, widen
from msn_export.runtime.engine import Engine
from msn_export.runtime.runner import Outputs, Runner, element_of, require_fit, split_batch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from msn_export.host import Device
    from msn_export.manifest import Manifest
    from msn_export.runtime.context_pool import ExecutionSlot, Lease, OutputMemory
    from msn_export.runtime.dlpack import Borrowed
    from msn_export.runtime.runner import Chunk
    from msn_export.runtime.versions import CudaDriver, LoadedTensorRT
    from msn_export.spec import TensorSpec


_ALIGNED = 256  # bytes; what cuMemAlloc gives and TensorRT may count on


def run_on_host(
    lane: ExecutionSlot, images: NDArray[Any], pieces: Sequence[Chunk]
) -> dict[str, NDArray[Any]]:
    """Run images of the host; bfloat16 comes and goes as its bytes."""
    engine, staging, stream = lane.engine, lane.staging, lane.stream
    whole = {
        spec.name: np.empty((len(images), *_sizes(spec)), OF_ONNX[spec.dtype].storage)
        for spec in engine.outputs
    }
    for piece in pieces:
        rows = slice(piece.start, piece.start + piece.count)
        staging.upload(engine.input.name, images[rows], stream)
        lane.enqueue(piece.profile, piece.size, staging.addresses)
        for name in whole:
            staging.download(name, piece.count, stream)
        lane.gpu.synchronize(stream)
        for name, array in whole.items():
            staging.read(name, array[rows])
    return whole


def run_on_device(
    arena: OutputMemory, lane: ExecutionSlot, images: Borrowed, pieces: Sequence[Chunk], caller: int
) -> dict[str, Tensor]:
    """Run images that lie on the GPU; the outputs are made where they stay.

    Nothing is copied but what has to be padded or is not aligned.

    Args:
        arena: lends the memory for the outputs.
        lane: where to run.
        images: contiguous.
        pieces: the runs to make.
        caller: the stream on which the images are made and the outputs are used.
    """
    rows = max(piece.start + piece.size for piece in pieces)
    offsets, total = _layout(lane, rows)
    lease = arena.lend(total, caller)
    lane.gpu.record(lane.ready, caller)
    lane.gpu.wait(lane.stream, lane.ready)
    for piece in pieces:
        _run_in_place(lane, images, piece, lease.pointer, offsets)
    lease.written(lane.stream)
    lease.give_to(caller)
    return {
        spec.name: _tensor(spec, images, lease, lease.pointer + offsets[spec.name])
        for spec in lane.engine.outputs
    }


def _layout(lane: ExecutionSlot, rows: int) -> tuple[dict[str, int], int]:
    """Place each output of so many rows in one block: offsets, and the size of the block."""
    offsets, total = {}, 0
    for spec in lane.engine.outputs:
        offsets[spec.name] = total
        total += -(-rows * lane.sizes[spec.name] // _ALIGNED) * _ALIGNED
    return offsets, total


def _run_in_place(
    lane: ExecutionSlot, images: Borrowed, piece: Chunk, block: int, offsets: dict[str, int]
) -> None:
    gpu, engine = lane.gpu, lane.engine
    name = engine.input.name
    source = images.pointer + piece.start * lane.sizes[name]
    addresses = {name: source}
    if piece.count != piece.size or source % _ALIGNED:
        addresses[name] = lane.staging.addresses[name]
        gpu.copy(addresses[name], source, piece.count * lane.sizes[name], lane.stream)
    moved = {}
    for spec in engine.outputs:
        target = block + offsets[spec.name] + piece.start * lane.sizes[spec.name]
        if target % _ALIGNED:
            moved[spec.name] = target
            target = lane.staging.addresses[spec.name]
        addresses[spec.name] = target
    lane.enqueue(piece.profile, piece.size, addresses)
    for name, target in moved.items():
        gpu.copy(target, addresses[name], piece.count * lane.sizes[name], lane.stream)


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


_LEGACY = 1  # CU_STREAM_LEGACY: the default stream by a number that is not 0


@dataclass(frozen=True, slots=True)
class EngineHost:
    """What an engine runs with: the driver API, a TensorRT, and a GPU."""

    cuda: CudaDriver
    loaded: LoadedTensorRT
    device: Device

    def __str__(self) -> str:
        return f"{self.loaded}, {self.device.name}"


@dataclass(frozen=True, slots=True)
class EngineFile:
    """An engine that may be loaded: its bytes, what it is called, and what is known of it.

    ``compatible`` and ``eager_kernels`` are ``Engine``'s.
    """

    content: bytes
    file: str
    manifest: Manifest | None
    compatible: bool = False
    eager_kernels: bool = False


class TrtRunner(Runner):
    """An engine on one GPU. ``open_runner`` checks the file first and makes one.

    Args:
        plan: the engine.
        machine: what to run it with.
        contexts: calls that run at the same time; more wait.
        cuda_graphs: whether runs that come up again are replayed as CUDA graphs.
    """

    def __init__(
        self, plan: EngineFile, machine: EngineHost, *, contexts: int = 2, cuda_graphs: bool = True
    ) -> None:
        self._cuda_graphs = cuda_graphs
        self._closing = threading.Lock()
        self._gpu = Gpu(machine.cuda, machine.device.index)
        self._engine = _load(plan, machine, self._gpu)
        self._arena = OutputMemory(self._gpu)
        self._pool = SlotPool(self._make_lane, max(1, contexts), str(machine))
        engine = self._engine
        super().__init__(
            str(machine), plan.manifest, engine.inputs, engine.outputs, engine.profiles
        )

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
            made = self._on_host(images, profile)
            return Outputs({name: self._for_numpy(name, array) for name, array in made.items()})
        device = dlpack.device_of(images)
        if device is not None:
            return Outputs(self._on_gpu(images, device, stream, profile))
        borrowed = dlpack.borrow(images)
        require_fit(borrowed.shape, borrowed.element, self.inputs[0])
        back = library.take_back(images)
        made = self._on_host(borrowed.array(), profile)
        return Outputs({name: back(self._for_dlpack(name, array)) for name, array in made.items()})

    @property
    def cuda_graphs(self) -> str:
        """Say how runs are replayed, for reports: ``off``, or by whom and how many are kept."""
        if not self._cuda_graphs:
            return "off"
        if not self._engine.loaded.row.captures:
            return "TensorRT-RTX's own"
        graphs = [lane.graphs for lane in self._pool.free() if lane.graphs is not None]
        refusals = {one.refusal for one in graphs if one.refusal}
        return "; ".join([f"{sum(map(len, graphs))} captured", *sorted(refusals)])

    def close(self) -> None:
        """Free the engine, its contexts and their memory, after calls under way have ended.

        Outputs on the GPU stay valid as long as someone uses them.
        """
        with self._closing:
            if not self._is_open:
                return
            self._is_open = False
            with ExitStack() as owned:
                owned.callback(self._arena.close)
                self._gpu.release(self._free)

    def _free(self) -> None:
        with ExitStack() as owned:
            owned.callback(self._engine.close)
            owned.callback(self._pool.close)

    def _make_lane(self) -> ExecutionSlot:
        return ExecutionSlot(self._gpu, self._engine, graphs=self._cuda_graphs)

    def _on_host(self, images: NDArray[Any], profile: int | None) -> dict[str, NDArray[Any]]:
        pieces = split_batch(len(images), self.profiles, profile)
        with self._pool.lane() as lane, self._gpu.current():
            return run_on_host(lane, images, pieces)

    def _on_gpu(self, images: Any, device: int, stream: Any, profile: int | None) -> dict[str, Any]:
        asked = None if stream is None else library.handle_of(stream)
        known = library.current_stream(images, device) if asked is None else asked
        caller = known or _LEGACY
        borrowed = dlpack.borrow(images, caller)
        require_fit(borrowed.shape, borrowed.element, self.inputs[0])
        self._require_here(borrowed)
        pieces = split_batch(borrowed.shape[0], self.profiles, profile)
        with self._pool.lane() as lane, self._gpu.current():
            made = run_on_device(self._arena, lane, borrowed, pieces, caller)
            if known is None:  # nobody orders the images' end after this: wait for it here
                self._gpu.synchronize(lane.stream)
        back = library.take_back(images)
        return {name: back(tensor) for name, tensor in made.items()}

    def _require_here(self, images: Borrowed) -> None:
        if images.device != self._gpu.index:
            raise InputError(
                f"images lie on GPU {images.device}; this runner is on GPU {self._gpu.index}"
            )
        if not images.is_contiguous:
            raise InputError("images are not contiguous; make them so (torch: .contiguous())")

    def _for_numpy(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """Give an output as NumPy can name it."""
        return array if self._element(name).numpy else widen(array)

    def _for_dlpack(self, name: str, array: NDArray[Any]) -> Any:
        element = self._element(name)
        if element.numpy:
            return array
        return Tensor(array.ctypes.data, array.shape, element, None, array)

    def _element(self, name: str) -> Any:
        return next(OF_ONNX[spec.dtype] for spec in self.outputs if spec.name == name)


def _load(plan: EngineFile, machine: EngineHost, gpu: Gpu) -> Engine:
    """Load an engine, or let go of the GPU."""
    engine = None
    try:
        with gpu.current():
            engine = Engine(
                machine.loaded,
                plan.content,
                plan.file,
                compatible=plan.compatible,
                eager_kernels=plan.eager_kernels,
            )
    except Exception as error:  # noqa: BLE001  pybind raises what it likes
        failure = error
    else:
        return engine

    def forget() -> None:  # the traceback's frames hold TensorRT's objects: they go with the GPU
        failure.__traceback__ = failure.__context__ = failure.__cause__ = None
        if engine is not None:
            engine.close()

    with ExitStack() as owned:
        owned.callback(gpu.close)
        gpu.release(forget)
    if isinstance(failure, MsnExportError):
        raise failure
    raise DeviceError(f"{machine.loaded} failed on {plan.file}: {failure}")
