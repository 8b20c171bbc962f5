"""Decode pictures in processes of their own, ahead of the model: in order, and never too many."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from msn_export import images
from msn_export.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from concurrent.futures import Future
    from pathlib import Path

    from msn_export.preprocessing import Preprocessing

Decoded: TypeAlias = NDArray[np.uint8] | str  # [h, w, c], or why there is no picture


def read(path: Path, preprocessing: Preprocessing) -> Decoded:
    """Decode one file with the one preprocessing; say why where it is no picture."""
    try:
        return images.read(path, preprocessing)
    except ImageError as error:
        return str(error)


def decode(
    paths: Iterable[Path], read: Callable[[Path], Decoded], *, workers: int, ahead: int
) -> Generator[Decoded]:
    """Give each path's picture in order, decoding at most ``ahead`` of them before they are asked.

    A picture that ends its process is decoded again alone; one that does so twice is broken.

    Args:
        paths: what to decode.
        read: runs in a process of its own, so it is picklable.
        workers: processes.
        ahead: pictures that may be decoded and not yet taken; memory follows it.
    """
    remaining = iter(paths)
    waiting: deque[tuple[Path, Future[Decoded]]] = deque()
    pool, alone = _Pool(workers, read), _Pool(1, read)
    try:
        while True:
            for path in islice(remaining, ahead - len(waiting)):
                waiting.append((path, pool.submit(path)))
            if not waiting:
                return
            path, future = waiting.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:  # by this picture, or by another that was in a worker
                yield _alone(alone, path)
    finally:
        pool.close()
        alone.close()


def _alone(pool: _Pool, path: Path) -> Decoded:
    try:
        return pool.submit(path).result()
    except BrokenProcessPool:
        return f"{path} is not a readable picture (its decoder crashed)"


class _Pool:
    """Processes that decode; a pool that one of them broke is replaced by a new one."""

    def __init__(self, workers: int, read: Callable[[Path], Decoded]) -> None:
        self._workers, self._read = workers, read
        self._executor: ProcessPoolExecutor | None = None

    def submit(self, path: Path) -> Future[Decoded]:
        """Have a picture decoded."""
        if self._executor is not None:
            with suppress(BrokenProcessPool):
                return self._executor.submit(self._read, path)
            self.close()
        # spawn, not fork: the model's threads and the driver do not survive a fork
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(self._workers, context, _begin)
        return self._executor.submit(self._read, path)

    def close(self) -> None:
        """End the processes; a picture that one of them has begun is finished first."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


def _begin() -> None:
    """Prepare a worker: Ctrl-C is its parent's business, and it does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's remarks on a picture's metadata
    parent = multiprocessing.parent_process()
    if parent is not None:
        # the queue a worker waits at stays open when the parent is killed: it would wait for ever
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()
    os._exit(1)
