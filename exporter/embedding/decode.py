"""Decode pictures in processes of their own, ahead of the model: in order, and never too many."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from importlib.machinery import ModuleSpec
from itertools import islice
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, TypeAlias, TypeVar

from msn_export import images
from msn_export.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from msn_export.preprocessing import Preprocessing


Decoded: TypeAlias = images.Fitted | str  # or why there is no picture
_SAFE_PATH = "PYTHONSAFEPATH"  # docs.python.org/3/using/cmdline: as -P does
_STARTING = threading.Lock()
LARGEST = 2**30  # bytes of one picture: it is in memory while it is decoded
Source = TypeVar("Source")  # what names a picture to its reader; str() of it names it to people


def decoded_or_reason(file: Path | BinaryIO, name: str, preprocessing: Preprocessing) -> Decoded:
    """Decode one file with the one preprocessing; give the reason where it is no picture."""
    try:
        return images.read_file(file, name, preprocessing)
    except ImageError as error:
        return str(error)


def decoded_content(content: bytes, name: str, preprocessing: Preprocessing) -> Decoded:
    """Decode the bytes of a file, and hash them."""
    found = decoded_or_reason(io.BytesIO(content), name, preprocessing)
    if isinstance(found, str):
        return found
    return found._replace(sha256=hashlib.sha256(content).digest())


def read(path: Path, preprocessing: Preprocessing, name: str | None = None) -> Decoded:
    """Read a file once: what is decoded is what is hashed. ``name`` is what people call it."""
    name = name or str(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > LARGEST:
                return too_large(name, size)
            content = file.read(LARGEST)
    except OSError as error:
        return f"{name} is not a readable picture ({error.strerror or type(error).__name__})"
    return decoded_content(content, name, preprocessing)


def too_large(name: str, size: int) -> str:
    """Give the reason why a file is not read."""
    return f"{name} is not a readable picture (it has {size} bytes; at most {LARGEST} are read)"


class Decoder(Generic[Source]):
    """Processes that decode; they live until ``close``.

    A picture that ends its process is decoded again alone; one that does so twice is broken.

    Args:
        read: decodes one source; runs in a process of its own, so it is picklable.
        workers: processes.
        ahead: pictures that may be decoded and not yet taken; memory follows it.
    """

    def __init__(self, read: Callable[[Source], Decoded], *, workers: int, ahead: int) -> None:
        self._ahead = ahead
        self._pool, self._alone = _Pool(workers, read), _Pool(1, read)

    def __call__(self, sources: Iterable[Source]) -> Generator[Decoded]:
        """Give each source's picture in order; at most ``ahead`` are decoded before being asked."""
        remaining = iter(sources)
        waiting: deque[tuple[Source, Future[Decoded]]] = deque()
        while True:
            for source in islice(remaining, self._ahead - len(waiting)):
                waiting.append((source, self.begin(source)))
            if not waiting:
                return
            source, future = waiting.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:  # by this picture, or by another that was in a worker
                yield self.once_more(source)

    def begin(self, source: Source) -> Future[Decoded]:
        """Have a source decoded; ``BrokenProcessPool`` of its future calls for ``once_more``."""
        return self._pool.submit(source)

    def once_more(self, source: Source) -> Decoded:
        """Decode a source whose process ended, by it or by another; one at a time."""
        try:
            return self._alone.submit(source).result()
        except BrokenProcessPool:
            return f"{source} is not a readable picture (its decoder crashed)"

    def close(self) -> None:
        """End the processes; a picture that one of them has begun is finished first."""
        self._pool.close()
        self._alone.close()


class _Process(SpawnProcess):
    """A process that does not run the script which started it.

    ``multiprocessing`` runs it once more in every process, for functions that lie in it; ours lie
    in this package. A script without ``if __name__ == "__main__"`` would start itself over.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  multiprocessing calls it so
        main = sys.modules["__main__"]
        before = main.__spec__
        # multiprocessing.spawn, _fixup_main_from_name: a main module of a package is not run again
        main.__spec__ = ModuleSpec(f"{__package__}.__main__", None)
        try:
            return SpawnProcess._Popen(process_obj)
        finally:
            main.__spec__ = before


class _Context(SpawnContext):
    Process = _Process


class _Pool(Generic[Source]):
    """Processes that decode; a pool that one of them broke is replaced by a new one."""

    def __init__(self, workers: int, read: Callable[[Source], Decoded]) -> None:
        self._workers, self._read = workers, read
        self._executor: ProcessPoolExecutor | None = None

    def submit(self, source: Source) -> Future[Decoded]:
        with _safe_path():
            if self._executor is not None:
                with suppress(BrokenProcessPool):
                    return self._executor.submit(self._read, source)
                self.close()
            # spawn, not fork: the model's threads and the driver do not survive a fork
            self._executor = ProcessPoolExecutor(self._workers, _Context(), _begin)
            return self._executor.submit(self._read, source)

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)


@contextmanager
def _safe_path() -> Iterator[None]:
    """Let no process that is started meanwhile import from the current folder.

    ``multiprocessing`` starts them with ``python -c``, which looks there first: in a folder of
    pictures a file called ``multiprocessing.py`` would run. The parent's own path they get later.
    """
    with _STARTING:  # the environment is one for all threads
        before = os.environ.get(_SAFE_PATH)
        os.environ[_SAFE_PATH] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_SAFE_PATH]
            else:
                os.environ[_SAFE_PATH] = before


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
