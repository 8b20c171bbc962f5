"""A contender's process: its own memory, its own threads, and stopped while it is not its turn."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Self

from msn_export.errors import BenchError
from msn_export.host import signal_name

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_TAIL = 4096  # bytes of its log that are searched for a crash's reason
CONTENDER = "msn_export.bench.worker"
_ENDING = 10  # seconds a process that closed its pipe may take to end
# Each library of linear algebra reads a name of its own
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Process:
    """A process that runs ``msn_export.bench.worker`` and answers one request at a time.

    Args:
        name: of the contender, for messages.
        log: receives all that it and its libraries print.
        threads: it may compute on.
        offline: it may fetch nothing from the hub.
    """

    def __init__(self, name: str, log: Path, threads: int, *, offline: bool) -> None:
        self.name, self._log = name, log
        environment = {**os.environ, **dict.fromkeys(_THREADS, str(threads))}
        if offline:
            environment["HF_HUB_OFFLINE"] = "1"
        reading, writing = os.pipe()
        try:
            with log.open("wb") as file:
                # this interpreter and a module of this package; requests travel on stdin
                self._child = subprocess.Popen(  # noqa: S603
                    [sys.executable, "-P", "-m", CONTENDER, str(writing)],
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    pass_fds=(writing,),
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches the parent, which ends it
                )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self._answers = os.fdopen(reading, encoding="utf-8")

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send a request, let the process run until it has answered, and stop it again.

        A thread pool that waits for work spins: it would take the next contender's cores.

        Raises:
            BenchError: it failed, or the process ended.
        """
        line = json.dumps({"request": request, "parent": os.getpid(), **arguments})
        assert self._child.stdin is not None
        self._child.send_signal(signal.SIGCONT)
        try:
            with contextlib.suppress(BrokenPipeError):  # it is dead: reading its answer will tell
                self._child.stdin.write(line.encode() + b"\n")
                self._child.stdin.flush()
            answer = self._answers.readline()
        finally:
            self._child.send_signal(signal.SIGSTOP)
        if not answer:
            raise BenchError(f"{self.name}: {self._end()}")
        found: dict[str, Any] = json.loads(answer)
        if "failed" in found:
            raise BenchError(f"{self.name}: {found['failed']}")
        return found

    @property
    def id(self) -> int:
        """The process' number."""
        return self._child.pid

    def close(self) -> None:
        """End it."""
        self._child.kill()
        with contextlib.suppress(BrokenPipeError):  # bytes of a request that was not read
            self._child.communicate()
        self._answers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _end(self) -> str:
        # it was stopped, maybe while it was ending: what it does not end by itself is ended
        self._child.send_signal(signal.SIGCONT)
        try:
            code = self._child.wait(timeout=_ENDING)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
            return f"its process answered nothing more and did not end in {_ENDING} s"
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - _TAIL))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
        last = f"; its last line: {lines[-1].strip()[:200]}" if lines else ""
        if code == -signal.SIGKILL:
            return f"its process was killed, most likely because memory ran out{last}"
        if code < 0:
            return f"its process crashed ({signal_name(code)}){last}"
        return f"its process ended (exit {code}){last}"
