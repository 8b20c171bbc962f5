"""A stand-in for ``cuda.bindings.driver``: there is no CUDA device where these tests run.

It keeps what the driver promises and no more. Memory of the GPU is memory of the host at addresses
of its own; a stream does nothing before somebody waits for it, so that code which does not wait, or
waits for the wrong stream, reads garbage here every time. It refuses what CUDA refuses: calls
without a current context, allocation and waiting while this thread captures, work on memory that is
freed. tests/runtime/test_tensorrt_bindings.py checks its functions against the real module.
"""
# ruff: noqa: N802, N803  the names are CUDA's

import threading
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np

GARBAGE = 0xAB  # what new memory holds
ALIGNED = 256


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


class CUstreamCaptureMode(IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class CUstreamCaptureStatus(IntEnum):
    CU_STREAM_CAPTURE_STATUS_NONE = 0
    CU_STREAM_CAPTURE_STATUS_ACTIVE = 1
    CU_STREAM_CAPTURE_STATUS_INVALIDATED = 2


class Handle:
    """A driver handle: a number, and nothing to count with."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number

    def __hash__(self) -> int:
        return hash(self._number)

    def __eq__(self, other: object) -> bool:
        return int(other) == self._number  # type: ignore[call-overload]


Work = Callable[[], None]


class Stream:
    def __init__(self) -> None:
        self.queue: deque[Work] = deque()
        self.issued = self.done = 0
        self.captured: list[Work] | None = None
        self.captured_by: int | None = None
        self.is_invalid = False


class Memory:
    def __init__(self, size: int) -> None:
        whole = np.full(size + ALIGNED, GARBAGE, np.uint8)
        start = -whole.ctypes.data % ALIGNED
        self.bytes = whole[start : start + size]
        self.pointer = self.bytes.ctypes.data
        self.size = size
        self.used_by: int | None = None  # as scratch: the one stream that does


class CudaStandIn:
    """One device. ``problems`` lists misuse that the real driver would not report."""

    CUresult = CUresult
    CUstreamCaptureMode = CUstreamCaptureMode
    CUstreamCaptureStatus = CUstreamCaptureStatus

    def __init__(self, memory: int = 1 << 30) -> None:
        self._room = memory
        self._lock = threading.RLock()
        self._streams: dict[int, Stream] = {1: Stream()}  # the legacy default stream
        self._events: dict[int, tuple[Stream, int] | None] = {}
        self._graphs: dict[int, list[Work]] = {}
        self._memory: dict[int, Memory] = {}
        self._number = 1000
        self._threads = threading.local()
        self._problems: list[str] = []
        self._configs: list[Any] = []  # of TensorRT's contexts, where they have one
        self._compiled = 0  # kernels that TensorRT compiled for this GPU
        self._fingerprint = "driver 580, SM 8.9"

    # what the tests and the TensorRT stand-in see

    @property
    def _stack(self) -> list[Any]:
        if not hasattr(self._threads, "stack"):
            self._threads.stack = []
        stack: list[Any] = self._threads.stack
        return stack

    def _at(self, pointer: int, size: int) -> np.ndarray[Any, Any]:
        """See memory; an address outside of what is allocated is an error as on the GPU."""
        pointer = int(pointer)
        for memory in self._memory.values():
            if memory.pointer <= pointer and pointer + size <= memory.pointer + memory.size:
                return memory.bytes[pointer - memory.pointer : pointer - memory.pointer + size]
        raise AssertionError(f"illegal address: {size} bytes at {pointer:#x}")

    def _enqueue(self, stream: Any, work: Work) -> None:
        with self._lock:
            found = self._streams[int(stream) or 1]
            if found.captured is not None:
                found.captured.append(work)
            else:
                found.queue.append(work)
                found.issued += 1

    def _catch_up(self, stream: Stream, until: int) -> None:
        while stream.done < until:
            work = stream.queue.popleft()
            stream.done += 1
            work()

    def _catch_up_all(self) -> None:
        for stream in list(self._streams.values()):
            self._catch_up(stream, stream.issued)

    # the driver API

    def cuInit(self, Flags: int) -> tuple[Any, ...]:
        return (CUresult.CUDA_SUCCESS,)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, Handle(ordinal)

    def cuDevicePrimaryCtxRetain(self, dev: Any) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, Handle(77)  # nobody releases it: there is no call for that

    def cuCtxPushCurrent(self, ctx: Any) -> tuple[Any, ...]:
        self._stack.append(ctx)
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:
        return CUresult.CUDA_SUCCESS, self._stack.pop()

    def cuMemAlloc(self, bytesize: int) -> tuple[Any, ...]:
        return self._allocate(bytesize)

    def cuMemFree(self, dptr: Any) -> tuple[Any, ...]:
        return self._free(dptr)

    def cuMemHostAlloc(self, bytesize: int, Flags: int) -> tuple[Any, ...]:
        code, *handle = self._allocate(bytesize)
        return code, *map(int, handle)  # the real one gives a plain address

    def cuMemFreeHost(self, p: Any) -> tuple[Any, ...]:
        return self._free(p)

    def cuStreamCreate(self, Flags: int) -> tuple[Any, ...]:
        return self._make(self._streams, Stream())

    def cuStreamDestroy(self, hStream: Any) -> tuple[Any, ...]:
        with self._lock:
            stream = self._streams.pop(int(hStream))
            if stream.captured is not None:
                self._problems.append("a stream goes while it captures")
            self._catch_up(stream, stream.issued)  # CUDA frees it once it is done
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamSynchronize(self, hStream: Any) -> tuple[Any, ...]:
        with self._lock:
            if (code := self._refusal()) is not None:
                return (code,)
            stream = self._streams[int(hStream)]
            self._catch_up(stream, stream.issued)
        return (CUresult.CUDA_SUCCESS,)

    def cuEventCreate(self, Flags: int) -> tuple[Any, ...]:
        return self._make(self._events, None)

    def cuEventDestroy(self, hEvent: Any) -> tuple[Any, ...]:
        with self._lock:
            del self._events[int(hEvent)]
        return (CUresult.CUDA_SUCCESS,)

    def cuEventRecord(self, hEvent: Any, hStream: Any) -> tuple[Any, ...]:
        with self._lock:
            if (code := self._refusal(capturing=True)) is not None:
                return (code,)
            stream = self._streams[int(hStream)]
            if stream.captured is not None:
                self._problems.append("an event becomes part of a graph")
            self._events[int(hEvent)] = (stream, stream.issued)
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamWaitEvent(self, hStream: Any, hEvent: Any, Flags: int) -> tuple[Any, ...]:
        with self._lock:
            if (code := self._refusal(capturing=True)) is not None:
                return (code,)
            recorded = self._events[int(hEvent)]
            if recorded is not None:
                self._enqueue(hStream, lambda: self._catch_up(*recorded))
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyHtoDAsync(
        self, dstDevice: Any, srcHost: Any, ByteCount: int, hStream: Any
    ) -> tuple[Any, ...]:
        return self._copy(dstDevice, srcHost, ByteCount, hStream)

    def cuMemcpyDtoHAsync(
        self, dstHost: Any, srcDevice: Any, ByteCount: int, hStream: Any
    ) -> tuple[Any, ...]:
        return self._copy(dstHost, srcDevice, ByteCount, hStream)

    def cuMemcpyDtoDAsync(
        self, dstDevice: Any, srcDevice: Any, ByteCount: int, hStream: Any
    ) -> tuple[Any, ...]:
        return self._copy(dstDevice, srcDevice, ByteCount, hStream)

    def cuStreamBeginCapture(self, hStream: Any, mode: Any) -> tuple[Any, ...]:
        assert mode is CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        with self._lock:
            stream = self._streams[int(hStream)]
            stream.captured, stream.is_invalid = [], False
            stream.captured_by = threading.get_ident()
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamIsCapturing(self, hStream: Any) -> tuple[Any, ...]:
        stream = self._streams[int(hStream)]  # one that is gone: what CUDA does is undefined
        status = CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE
        if stream.captured is not None:
            status = CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
        return CUresult.CUDA_SUCCESS, status

    def cuStreamEndCapture(self, hStream: Any) -> tuple[Any, ...]:
        with self._lock:
            stream = self._streams[int(hStream)]
            captured, stream.captured, stream.captured_by = stream.captured, None, None
            assert captured is not None
            if stream.is_invalid:
                return (CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None)
            return self._make(self._graphs, captured)

    def cuGraphDestroy(self, hGraph: Any) -> tuple[Any, ...]:
        with self._lock:
            del self._graphs[int(hGraph)]
        return (CUresult.CUDA_SUCCESS,)

    def cuGraphInstantiate(self, hGraph: Any, flags: int) -> tuple[Any, ...]:
        return self._make(self._graphs, list(self._graphs[int(hGraph)]))

    def cuGraphExecDestroy(self, hGraphExec: Any) -> tuple[Any, ...]:
        return self.cuGraphDestroy(hGraphExec)

    def cuGraphLaunch(self, hGraphExec: Any, hStream: Any) -> tuple[Any, ...]:
        if (code := self._refusal(capturing=True)) is not None:
            return (code,)
        for work in self._graphs[int(hGraphExec)]:
            self._enqueue(hStream, work)
        return (CUresult.CUDA_SUCCESS,)

    def cuMemGetInfo(self) -> tuple[Any, ...]:
        used = sum(memory.size for memory in self._memory.values())
        return CUresult.CUDA_SUCCESS, self._room - used, self._room

    # what they share

    def _refusal(self, *, capturing: bool = False) -> CUresult | None:
        """Say what CUDA answers to a call now; ``capturing``: whether it may be captured."""
        if not self._stack:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT
        mine = [
            stream
            for stream in self._streams.values()
            if stream.captured_by == threading.get_ident()
        ]
        if mine and not capturing:
            for stream in mine:
                stream.is_invalid = True
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        return None

    def _make(self, where: dict[int, Any], made: Any) -> tuple[Any, ...]:
        with self._lock:
            if (code := self._refusal()) is not None:
                return (code, None)
            self._number += 1
            where[self._number] = made
            return CUresult.CUDA_SUCCESS, Handle(self._number)

    def _allocate(self, size: int) -> tuple[Any, ...]:
        with self._lock:
            if (code := self._refusal()) is not None:
                return (code, None)
            if size < 1:
                return CUresult.CUDA_ERROR_INVALID_VALUE, None
            if size > int(self.cuMemGetInfo()[1]):
                return CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
            memory = Memory(size)
            self._memory[memory.pointer] = memory
            return CUresult.CUDA_SUCCESS, Handle(memory.pointer)

    def _free(self, pointer: Any) -> tuple[Any, ...]:
        with self._lock:
            if (code := self._refusal()) is not None:
                return (code,)
            self._catch_up_all()  # freeing waits for the device
            self._memory.pop(int(pointer)).bytes.fill(0xEF)
            return (CUresult.CUDA_SUCCESS,)

    def _copy(self, target: Any, source: Any, size: int, stream: Any) -> tuple[Any, ...]:
        if (code := self._refusal(capturing=True)) is not None:
            return (code,)
        self._enqueue(stream, lambda: np.copyto(self._at(target, size), self._at(source, size)))
        return (CUresult.CUDA_SUCCESS,)
