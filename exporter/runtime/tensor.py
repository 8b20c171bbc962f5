"""A tensor that a runner computed, for any library that takes DLPack; the library of one given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from msn_export.runtime import dlpack
from msn_export.runtime.dtypes import widen

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from msn_export.runtime.dtypes import TensorType


# How a library is asked for the stream that a thread works on, given the GPU's index. For others
# the caller names the stream, or the call waits until its work is done.
CURRENT_STREAM: dict[str, Callable[[Any, int], int]] = {
    "torch": lambda torch, device: torch.cuda.current_stream(device).cuda_stream,
    "cupy": lambda cupy, device: cupy.cuda.get_current_stream(device).ptr,
}
# How a library is told to finish what it computes, where its reader cannot wait in a stream.
FINISH: dict[str, Callable[[Any, Any, int], object]] = {
    "torch": lambda torch, _, device: torch.cuda.current_stream(device).synchronize(),
    "cupy": lambda cupy, _, device: cupy.cuda.get_current_stream(device).synchronize(),
    "jaxlib": lambda _, tensor, __: tensor.block_until_ready(),
}


def take_back(tensor: Any) -> Callable[[Any], Any]:
    """Find what turns a DLPack tensor into one of the library of ``tensor``.

    Nothing is imported: the library that made ``tensor`` is loaded. One that takes no DLPack
    gets what the runner has.
    """
    namespace = getattr(tensor, "__array_namespace__", None)
    if namespace is not None:  # the array API: cupy, jax
        found: Callable[[Any], Any] = namespace().from_dlpack
        return found
    module = _module_of(tensor)
    return module.from_dlpack if module is not None else lambda made: made


def current_stream(tensor: Any, device: int) -> int | None:
    """Ask the library of a GPU tensor for its current stream; None where that is not known."""
    root = _root_in(CURRENT_STREAM, tensor)
    return None if root is None else int(CURRENT_STREAM[root](sys.modules[root], device))


def finish(tensor: Any, device: int, stream: Any = None) -> None:
    """Wait, in this thread, until the library of a GPU tensor has computed it.

    Args:
        tensor: the tensor.
        device: the GPU's index.
        stream: on which it is made, where that is not the library's current one.
    """
    if callable(wait := getattr(stream, "synchronize", None)):
        wait()
    root = _root_in(FINISH, tensor)
    if root is not None:
        FINISH[root](sys.modules[root], tensor, device)


def handle_of(stream: Any) -> int:
    """Take a stream as a number or an object: CUDA's protocol, torch, cupy, cuda-bindings."""
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        return int(protocol()[1])
    for name in ("cuda_stream", "ptr"):
        handle = getattr(stream, name, None)
        if handle is not None:
            return int(handle)
    return int(stream)


def _root_in(table: Mapping[str, object], tensor: Any) -> str | None:
    """Find the package, of the tensor's type or a base of it, that has a row in a table."""
    roots = (kind.__module__.partition(".")[0] for kind in type(tensor).__mro__)
    return next((root for root in roots if root in table and root in sys.modules), None)


def _module_of(tensor: Any) -> ModuleType | None:
    """Find the top-level package, of the tensor's type or a base of it, that takes DLPack."""
    for kind in type(tensor).__mro__:
        module = sys.modules.get(kind.__module__.partition(".")[0])
        if callable(getattr(module, "from_dlpack", None)):
            return module
    return None


class Tensor:
    """Memory of ``shape`` and ``dtype``, row after row, that lives as long as someone uses it.

    ``torch.from_dlpack(tensor)``, ``cupy.from_dlpack(tensor)`` and their like take it without a
    copy.

    Args:
        pointer: its address.
        shape: sizes.
        element: dtype.
        device: the GPU's index, None on the host.
        owner: what keeps the memory.
        wait: makes a stream wait until the values are there; None where they are.
    """

    def __init__(
        self,
        pointer: int,
        shape: tuple[int, ...],
        element: TensorType,
        device: int | None,
        owner: object,
        wait: Callable[[int], None] | None = None,
    ) -> None:
        self.pointer = pointer
        self.shape = shape
        self.dtype = str(element)
        self._element = element
        self._device = (dlpack.CPU, 0) if device is None else (dlpack.CUDA, device)
        self._owner = owner
        self._wait = wait

    def __repr__(self) -> str:
        where = "cpu" if self._device[0] == dlpack.CPU else f"cuda:{self._device[1]}"
        return f"Tensor({list(self.shape)}, {self.dtype}, {where})"

    def array(self) -> NDArray[Any]:
        """Give a host tensor as NumPy can name it: bfloat16 is widened to float32."""
        array = dlpack.array_at(self.pointer, self.shape, self._element, self._owner)
        return array if self._element.numpy else widen(array)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Give DLPack's device type and index."""
        return self._device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """Lend the memory (array API: ``__dlpack__``).

        Args:
            stream: on a GPU, the stream that will use it, which is made to wait; None is the
                legacy default stream, -1 does not wait.
            max_version: the newest DLPack the taker knows.
            dl_device: where the taker wants it; it is lent only where it lies.
            copy: True is refused: nothing is copied.

        Raises:
            BufferError: a copy, or another device, is asked for.
        """
        if copy or (dl_device is not None and tuple(map(int, dl_device)) != self._device):
            raise BufferError(f"{self!r} is lent where it lies, without a copy")
        if self._wait is not None and stream != -1:
            self._wait(1 if stream is None else int(stream))
        array = dlpack.array_at(self.pointer, self.shape, self._element, self._owner)
        versioned = max_version is not None and max_version[0] >= 1
        return dlpack.lend(array, self._element, self._device, versioned=versioned)
