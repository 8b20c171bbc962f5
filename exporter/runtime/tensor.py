"""A tensor that a runner computed, for any library that takes DLPack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msn_export.runtime import dlpack
from msn_export.runtime.elements import widen

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from msn_export.runtime.elements import Element


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
        element: Element,
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
