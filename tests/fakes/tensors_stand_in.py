"""A stand-in for a GPU array library (torch, cupy): tensors of ``cuda_stand_in``'s device.

Work is given to the library's current stream and done when somebody waits, as everything on that
device. A tensor that goes has its memory overwritten in stream order, as a caching allocator would
give it to the next.
"""

import sys
import types
from typing import Any

import numpy as np

from msn_export.runtime import dlpack
from msn_export.runtime.dlpack import LEGACY, OF_NUMPY, TensorType
from tests.fakes.cuda_stand_in import CudaStandIn, Memory

NAME = "tensors_stand_in_module"


class Stream:
    """A stream as an object that owns it; ``ptr`` is its number, as in cupy."""

    def __init__(self, cuda: CudaStandIn, number: int) -> None:
        self._cuda, self.ptr = cuda, number

    def __del__(self) -> None:
        if self.ptr != LEGACY:
            self._cuda.cuStreamDestroy(self.ptr)


class Library:
    """Tensors on the device; ``stream`` is the number of the current one."""

    def __init__(self, cuda: CudaStandIn) -> None:
        self.cuda = cuda
        self.stream = LEGACY
        module = types.ModuleType(NAME)
        vars(module)["from_dlpack"] = self.from_dlpack
        sys.modules[NAME] = module
        self._kind = type("Tensor", (_Tensor,), {"__module__": NAME})
        self._streams = {LEGACY: Stream(cuda, LEGACY)}

    def new_stream(self) -> int:
        self.cuda.cuCtxPushCurrent(77)
        _, stream = self.cuda.cuStreamCreate(0)
        self.cuda.cuCtxPopCurrent()
        self._streams[int(stream)] = Stream(self.cuda, int(stream))
        return int(stream)

    def stream_object(self, number: int) -> Stream:
        return self._streams[number]

    def forget_stream(self, number: int) -> None:
        """Let go of a stream, as cupy does: it is destroyed where nothing else keeps it."""
        del self._streams[number]

    def to_gpu(self, array: np.ndarray[Any, Any], *, offset: int = 0) -> Any:
        """Copy an array to the GPU, in stream order; ``offset`` bytes behind an aligned address."""
        memory = Memory(array.nbytes + offset)
        self.cuda._memory[memory.pointer] = memory
        start = memory.pointer + offset
        source = np.ascontiguousarray(array)
        self.cuda._enqueue(
            self.stream,
            lambda: np.copyto(
                self.cuda._at(start, source.nbytes), source.view(np.uint8).reshape(-1)
            ),
        )
        return self._kind(self, start, array.shape, OF_NUMPY[array.dtype], memory)

    def from_dlpack(self, tensor: Any) -> Any:
        borrowed = dlpack.borrow(tensor, self.stream)
        assert borrowed.device == 0
        return self._kind(self, borrowed.pointer, borrowed.shape, borrowed.element, borrowed)

    def take(self, tensor: Any) -> Any:
        """Take a tensor of another library."""
        return self.from_dlpack(tensor)

    def copy(self, tensor: Any) -> Any:
        """Copy on the GPU, in stream order: what a caller's kernel would do."""
        copied = self.to_gpu(np.zeros(tensor.shape, tensor.element.storage))
        copied.element = tensor.element
        size, target, source = tensor.nbytes, copied.pointer, tensor.pointer
        at = self.cuda._at
        self.cuda._enqueue(self.stream, lambda: np.copyto(at(target, size), at(source, size)))
        return copied

    def to_host(self, tensor: Any) -> np.ndarray[Any, Any]:
        """Wait for the current stream, and read; bfloat16 as float32."""
        stream = self.cuda._streams[self.stream]
        with self.cuda._lock:
            self.cuda._catch_up(stream, stream.issued)
            values = self.cuda._at(tensor.pointer, tensor.nbytes).view(tensor.element.storage)
            values = values.reshape(tensor.shape).copy()
        if tensor.element.numpy is None:
            return (values.astype(np.uint32) << 16).view(np.float32)
        return values

    def pointer(self, tensor: Any) -> int:
        return int(tensor.pointer)

    def strided(self, tensor: Any) -> Any:
        """See every second image."""
        view = self._kind(
            self, tensor.pointer, (tensor.shape[0] // 2, *tensor.shape[1:]), tensor.element, tensor
        )
        row = int(np.prod(tensor.shape[1:]))
        view.steps = (2 * row, *tensor.steps[1:])
        return view


class _Tensor:
    steps: tuple[int, ...]

    def __init__(
        self,
        library: Library,
        pointer: int,
        shape: tuple[int, ...],
        element: TensorType,
        owner: Any,
    ) -> None:
        self.library, self.pointer, self.shape = library, pointer, tuple(shape)
        self.element, self.owner = element, owner
        self.nbytes = element.bytes * int(np.prod(self.shape))
        self.steps = tuple(int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape)))

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, 0

    def __dlpack__(self, *, stream: int | None = None, max_version: Any = None) -> object:
        cuda, mine = self.library.cuda, self.library.stream
        position = cuda._streams[mine].issued
        waiting = stream or 1
        if waiting not in {mine, -1}:
            made = cuda._streams[mine]
            cuda._enqueue(waiting, lambda: cuda._catch_up(made, position))
        strides = tuple(step * self.element.bytes for step in self.steps)
        array = dlpack.array_at(self.pointer, self.shape, self.element, self, strides)
        versioned = max_version is not None
        return dlpack.lend(array, self.element, (dlpack.CUDA, 0), versioned=versioned)

    def __del__(self) -> None:
        if not isinstance(self.owner, Memory):
            return
        cuda, memory = self.library.cuda, self.owner

        def overwrite() -> None:
            memory.bytes.fill(0xCD)
            cuda._memory.pop(memory.pointer, None)

        cuda._enqueue(self.library.stream, overwrite)
