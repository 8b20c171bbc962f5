"""The CUDA driver API, as far as running an engine needs it: results checked, handles owned.

Handles of the driver are numbers here. Where a call fails, what was made before it is released by
its owner (an ``ExitStack`` in whoever holds several).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from numpy.typing import NDArray

from msn_export.errors import DeviceError
from msn_export.runtime import dlpack
from msn_export.runtime.dlpack import OF_ONNX
from msn_export.runtime.versions import CudaDriver

# cuda.h
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy default stream
_NO_TIMING = 2  # CU_EVENT_DISABLE_TIMING
_HINTS = {
    "CUDA_ERROR_OUT_OF_MEMORY": "; free GPU memory, open the runner with fewer contexts, or build "
    "the engine with a smaller --batch",
}


def call(function: Callable[..., tuple[Any, ...]], *arguments: Any) -> Any:
    try:
        code, *values = function(*arguments)
    except RuntimeError as error:  # cuda-bindings, of what this driver lacks
        raise DeviceError(
            f"{function.__name__} failed: {' '.join(str(error).split())}; the NVIDIA driver is too "
            "old for these cuda-bindings: update it, or install cuda-bindings of its CUDA version"
        ) from error
    if int(code) != 0:
        name = getattr(code, "name", f"error {int(code)}")
        raise DeviceError(f"{function.__name__} failed: {name}{_HINTS.get(name, '')}")
    return values[0] if values else None


class Handle:
    """A handle, and what gives it back; giving it back again does nothing."""

    __slots__ = ("_release", "handle")

    def __init__(self, handle: Any, release: Callable[..., tuple[Any, ...]]) -> None:
        self.handle = handle
        self._release: Callable[..., tuple[Any, ...]] | None = release

    def __int__(self) -> int:
        return int(self.handle)

    def close(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            call(release, self.handle)


class Graph:
    """A captured graph that can be launched."""

    def __init__(self, executable: Handle, owned: ExitStack) -> None:
        self.executable = executable
        self.close = owned.close


class Gpu:
    """A GPU's primary context, which CUDA programs in a process share, and what is made in it."""

    def __init__(self, cuda: CudaDriver, index: int) -> None:
        self.cuda: CudaDriver = cuda
        self.index = index
        call(cuda.cuInit, 0)
        device = call(cuda.cuDeviceGet, index)
        context = call(cuda.cuDevicePrimaryCtxRetain, device)
        self._retained = Handle(device, cuda.cuDevicePrimaryCtxRelease)
        self._context = context

    def close(self) -> None:
        """Give the primary context back; others in the process may go on using it."""
        self._retained.close()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make this the calling thread's GPU for the length of a block; then what it was."""
        call(self.cuda.cuCtxPushCurrent, self._context)
        try:
            yield
        finally:
            call(self.cuda.cuCtxPopCurrent)

    def release(self, free: Callable[[], None]) -> None:
        """Free things with this GPU current, whatever CUDA says to that.

        A call may report an error of earlier work, and to free nothing would be worse.
        """
        failure = None
        with ExitStack() as owned:
            try:
                owned.enter_context(self.current())
            except DeviceError as error:
                failure = error
                with suppress(DeviceError):
                    owned.enter_context(self.current())
            free()
        if failure is not None:
            raise failure

    def memory(self, size: int) -> Handle:
        return Handle(call(self.cuda.cuMemAlloc, max(size, 1)), self.cuda.cuMemFree)

    def pinned(self, size: int) -> Handle:
        """Allocate bytes of the host that the GPU copies to and from by itself."""
        return Handle(call(self.cuda.cuMemHostAlloc, max(size, 1), 0), self.cuda.cuMemFreeHost)

    def stream(self) -> Handle:
        return Handle(call(self.cuda.cuStreamCreate, _NON_BLOCKING), self.cuda.cuStreamDestroy)

    def event(self) -> Handle:
        return Handle(call(self.cuda.cuEventCreate, _NO_TIMING), self.cuda.cuEventDestroy)

    def record(self, event: Handle, stream: int | Handle) -> None:
        """Note in an event all that was given to a stream so far."""
        call(self.cuda.cuEventRecord, event.handle, _plain(stream))

    def wait(self, waiting: int | Handle, event: Handle) -> None:
        """Make a stream wait for what an event noted."""
        call(self.cuda.cuStreamWaitEvent, _plain(waiting), event.handle, 0)

    def synchronize(self, stream: Handle) -> None:
        """Wait, in this thread, until a stream has done all it was given."""
        call(self.cuda.cuStreamSynchronize, stream.handle)

    def upload(self, target: int, source: Handle, size: int, stream: Handle) -> None:
        call(self.cuda.cuMemcpyHtoDAsync, target, int(source), size, stream.handle)

    def download(self, target: Handle, source: int, size: int, stream: Handle) -> None:
        call(self.cuda.cuMemcpyDtoHAsync, int(target), source, size, stream.handle)

    def copy(self, target: int, source: int, size: int, stream: Handle) -> None:
        call(self.cuda.cuMemcpyDtoDAsync, target, source, size, stream.handle)

    def capture(self, stream: Handle, enqueue: Callable[[], None]) -> Graph:
        """Capture what ``enqueue`` gives to a stream as a graph, instead of running it."""
        cuda: CudaDriver = self.cuda
        mode = cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with ExitStack() as owned:
            call(cuda.cuStreamBeginCapture, stream.handle, mode)
            try:
                enqueue()
            finally:  # also what failed must be ended, or the stream stays unusable
                graph = Handle(call(cuda.cuStreamEndCapture, stream.handle), cuda.cuGraphDestroy)
                owned.callback(graph.close)
            launched = Handle(
                call(cuda.cuGraphInstantiate, graph.handle, 0), cuda.cuGraphExecDestroy
            )
            owned.callback(launched.close)
            return Graph(launched, owned.pop_all())

    def launch(self, graph: Graph, stream: Handle) -> None:
        call(self.cuda.cuGraphLaunch, graph.executable.handle, stream.handle)


def bytes_of(pinned: Handle, size: int) -> NDArray[Any]:
    return dlpack.array_at(int(pinned), (size,), OF_ONNX["uint8"], pinned)


def _plain(stream: int | Handle) -> Any:
    return stream.handle if isinstance(stream, Handle) else stream
