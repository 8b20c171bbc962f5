"""A contender's process: its own memory, its own threads, and stopped while it is not its turn."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from typing import TYPE_CHECKING, Any

from msn_export.child_process import ChildProcess, last_line
from msn_export.errors import BenchError
from msn_export.host import signal_name

if TYPE_CHECKING:
    from pathlib import Path

CONTENDER = "msn_export.bench.worker"
_ENDING = 10  # seconds a process that closed its pipe may take to end
# Each library of linear algebra reads a name of its own
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Process(ChildProcess):
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
        with log.open("wb") as file:
            super().__init__(CONTENDER, file, environment)

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """Send a request, let the process run until it has answered, and stop it again.

        A thread pool that waits for work spins: it would take the next contender's cores.

        Raises:
            BenchError: it failed, or the process ended.
        """
        self.process.send_signal(signal.SIGCONT)
        try:
            self.send({"request": request, **arguments})
            answer = self.messages.readline()
        finally:
            self.process.send_signal(signal.SIGSTOP)
        if not answer:
            raise BenchError(f"{self.name}: {self._end()}")
        found: dict[str, Any] = json.loads(answer)
        if "failed" in found:
            raise BenchError(f"{self.name}: {found['failed']}")
        return found

    def _end(self) -> str:
        # it was stopped, maybe while it was ending: what it does not end by itself is ended
        self.process.send_signal(signal.SIGCONT)
        try:
            code = self.process.wait(timeout=_ENDING)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return f"its process answered nothing more and did not end in {_ENDING} s"
        with self._log.open("rb") as file:
            line = last_line(file)
        last = f"; its last line: {line}" if line else ""
        if code == -signal.SIGKILL:
            return f"its process was killed, most likely because memory ran out{last}"
        if code < 0:
            return f"its process crashed ({signal_name(code)}){last}"
        return f"its process ended (exit {code}){last}"
