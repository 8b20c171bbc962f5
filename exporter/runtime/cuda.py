"""The CUDA driver API, as far as running an engine needs it: results checked, handles owned.

Handles of the driver are numbers here. Where a call fails, what was made before it is released by
its owner (an ``ExitStack`` in whoever holds several).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

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


_CONTEXTS: WeakKeyDictionary[CudaDriver, dict[int, Any]] = WeakKeyDictionary()
_RETAINING = threading.Lock()


def _primary_context(cuda: CudaDriver, index: int) -> Any:
    """Retain a GPU's primary context, once per process and device, and never release it.

    Whoever releases it last destroys it, with all that is in it: memory of libraries that use it
    without retaining it, and the state that the CUDA runtime inside TensorRT keeps of it and does
    not make anew. It costs some memory of the GPU until the process ends.
    """
    with _RETAINING:
        contexts = _CONTEXTS.setdefault(cuda, {})
        if index not in contexts:
            call(cuda.cuInit, 0)
            contexts[index] = call(cuda.cuDevicePrimaryCtxRetain, call(cuda.cuDeviceGet, index))
        return contexts[index]


class _Capture(threading.local):
    """Frees that wait until the capture under way in this thread has ended; None without one."""

    frees: list[Callable[[], None]] | None = None


_CAPTURE = _Capture()


class Gpu:
    """A GPU's primary context, which CUDA programs in a process share, and what is made in it."""

    def __init__(self, cuda: CudaDriver, index: int) -> None:
        self.cuda: CudaDriver = cuda
        self.index = index
        self._process = os.getpid()
        self._context = _primary_context(cuda, index)

    @property
    def is_inherited(self) -> bool:
        """True in a process that was forked: CUDA does not work there, not even to free."""
        return os.getpid() != self._process

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

        A call may report an error of earlier work, and to free nothing would be worse. While this
        thread captures a graph, CUDA refuses to free and drops the graph: it is done after that.
        """
        if self.is_inherited:
            return
        if _CAPTURE.frees is not None:
            _CAPTURE.frees.append(lambda: self.release(free))
            return
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

    def is_capturing(self, stream: int) -> bool:
        """True where a stream is captured now: what it is given would become part of the graph."""
        try:
            return int(call(self.cuda.cuStreamIsCapturing, stream)) != 0
        except DeviceError:  # the legacy default stream cannot be asked while another is captured
            return True

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
            with _later():
                call(cuda.cuStreamBeginCapture, stream.handle, mode)
                try:
                    enqueue()
                finally:  # also what failed must be ended, or the stream stays unusable
                    captured = call(cuda.cuStreamEndCapture, stream.handle)
                    graph = Handle(captured, cuda.cuGraphDestroy)
                    owned.callback(graph.close)
            launched = Handle(
                call(cuda.cuGraphInstantiate, graph.handle, 0), cuda.cuGraphExecDestroy
            )
            owned.callback(launched.close)
            return Graph(launched, owned.pop_all())

    def launch(self, graph: Graph, stream: Handle) -> None:
        call(self.cuda.cuGraphLaunch, graph.executable.handle, stream.handle)


@contextmanager
def _later() -> Iterator[None]:
    """Put off what the garbage collector frees in this thread, of any runner."""
    frees: list[Callable[[], None]] = []
    _CAPTURE.frees = frees
    try:
        yield
    finally:
        _CAPTURE.frees = None
        for free in frees:
            with suppress(DeviceError):  # of another runner: not this call's
                free()


def bytes_of(pinned: Handle, size: int) -> NDArray[Any]:
    return dlpack.array_at(int(pinned), (size,), OF_ONNX["uint8"], pinned)


def _plain(stream: int | Handle) -> Any:
    return stream.handle if isinstance(stream, Handle) else stream
