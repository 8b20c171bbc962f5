"""An .npy file whose rows are written as they come and that is whole when all have."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from msn_export.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class GrowingArray:
    """Rows on disk under a header that promises ``total`` of them from the start.

    When all are written the file is, byte for byte, what ``numpy.save`` would have written. Written
    with plain writes: the pages of a mapped file would count as this process' memory.
    """

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total = path, total

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Put rows [k, ...] at ``start`` and see them to the disk; what is skipped is zeros so far.

        Raises:
            OutputError: rows of another shape or type are there already.
        """
        if not self.path.exists():
            self._begin(rows)
        offset, shape, dtype = self._layout()
        if (shape[1:], dtype) != (rows.shape[1:], rows.dtype):
            raise OutputError(
                f"{self.path} holds rows of {dtype}{list(shape[1:])}, these are "
                f"{rows.dtype}{list(rows.shape[1:])}; start over with --force"
            )
        size = dtype.itemsize * math.prod(shape[1:])
        with self.path.open("r+b") as file:
            file.seek(offset + start * size)
            file.write(np.ascontiguousarray(rows).data)
            file.flush()
            os.fsync(file.fileno())

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Give rows ``start`` to ``stop``."""
        offset, shape, dtype = self._layout()
        row = math.prod(shape[1:])
        with self.path.open("rb") as file:
            file.seek(offset + start * row * dtype.itemsize)
            rows = np.fromfile(file, dtype, (stop - start) * row)
        return rows.reshape(-1, *shape[1:])

    def holds(self, rows: int) -> bool:
        """Say whether the file reaches over the first ``rows`` rows."""
        if not self.path.exists():
            return rows == 0
        offset, shape, dtype = self._layout()
        size = dtype.itemsize * math.prod(shape[1:])
        return shape[0] == self.total and self.path.stat().st_size >= offset + rows * size

    def _begin(self, rows: NDArray[Any]) -> None:
        header = {
            "descr": npy.dtype_to_descr(rows.dtype),
            "fortran_order": False,
            "shape": (self.total, *rows.shape[1:]),
        }
        with self.path.open("xb") as file:
            npy.write_array_header_1_0(file, header)

    def _layout(self) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
        """Read the header: where the rows begin, the promised shape, the type of a number."""
        try:
            with self.path.open("rb") as file:
                npy.read_magic(file)
                shape, _, dtype = npy.read_array_header_1_0(file)
                return file.tell(), shape, dtype
        except ValueError as error:
            raise OutputError(
                f"{self.path} is damaged ({error}); start over with --force"
            ) from error
