"""An array on disk whose rows are written one part after another, in any order."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from msn_export.errors import OutputError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


class GrowingArray:
    """Rows on disk under a header that promises ``total`` of them from the start.

    When all are written the file is, byte for byte, what ``numpy.save`` would have written. Written
    with plain writes: a full disk is an error of theirs, and ends a process that maps the file.
    """

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total = path, total

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Put rows [k, ...] at ``start`` and see them to disk; rows skipped are zeros so far."""
        if not self.path.exists():
            self._begin(rows)
        with self.path.open("r+b") as file:
            shape, dtype = self._header(file)
            if (shape[1:], dtype) != (rows.shape[1:], rows.dtype):
                raise OutputError(
                    f"{self.path} holds rows of {dtype}{list(shape[1:])}, these are "
                    f"{rows.dtype}{list(rows.shape[1:])}; start over with --force"
                )
            file.seek(start * dtype.itemsize * math.prod(shape[1:]), os.SEEK_CUR)
            file.write(np.ascontiguousarray(rows).data)
            file.flush()
            os.fsync(file.fileno())

    def read(self, start: int, stop: int) -> NDArray[Any]:
        with self.path.open("rb") as file:
            shape, dtype = self._header(file)
            row = math.prod(shape[1:])
            file.seek(start * row * dtype.itemsize, os.SEEK_CUR)
            rows = np.fromfile(file, dtype, (stop - start) * row)
        return rows.reshape(-1, *shape[1:])

    def holds(self, rows: int) -> bool:
        """True where the file reaches over the first ``rows`` rows."""
        if not self.path.exists():
            return rows == 0
        with self.path.open("rb") as file:
            shape, dtype = self._header(file)
            end = file.tell() + rows * dtype.itemsize * math.prod(shape[1:])
        return shape[0] == self.total and self.path.stat().st_size >= end

    def _begin(self, rows: NDArray[Any]) -> None:
        header = {
            "descr": npy.dtype_to_descr(rows.dtype),
            "fortran_order": False,
            "shape": (self.total, *rows.shape[1:]),
        }
        with self.path.open("xb") as file:
            npy.write_array_header_1_0(file, header)

    def _header(self, file: BinaryIO) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Read the promised shape and the type of a number; then the rows begin."""
        try:
            npy.read_magic(file)
            shape, _, dtype = npy.read_array_header_1_0(file)
        except ValueError as error:
            raise OutputError(
                f"{self.path} is damaged ({error}); start over with --force"
            ) from error
        return shape, dtype
