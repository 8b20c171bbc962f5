"""A module of this package in a process of its own, which sends lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping

_TAIL = 4096  # bytes of a log that are searched for its last line


class ChildProcess:
    """``python -m module PIPE``; on the way out of its ``with`` it is dead, whatever happened.

    Messages to it are lines of JSON on its stdin, those it sends lines of JSON on a pipe of their
    own, for libraries print on stdout and stderr as they like.

    Args:
        module: what runs.
        log: receives all that it and its libraries print.
        environment: instead of this process' own.
    """

    def __init__(
        self, module: str, log: IO[bytes], environment: Mapping[str, str] | None = None
    ) -> None:
        reading, writing = os.pipe()
        self.messages = os.fdopen(reading, "rb")
        try:
            # this interpreter and a module of this package; what it works on travels on stdin
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", "-m", module, str(writing)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(writing,),
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process only, which ends the child
            )
        except BaseException:
            self.messages.close()
            raise
        finally:
            os.close(writing)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message and this process' number; one that is dead takes none."""
        assert self.process.stdin is not None
        line = json.dumps({**message, "parent": os.getpid()}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line)
            self.process.stdin.flush()

    @property
    def id(self) -> int:
        """The process' number."""
        return self.process.pid

    def close(self) -> None:
        """End it."""
        self.process.kill()
        with contextlib.suppress(BrokenPipeError):  # bytes of a message that was not read
            self.process.communicate()
        self.messages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def last_line(log: IO[bytes]) -> str:
    """Give the last line of a log, 200 characters of it at most."""
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - _TAIL))
    lines = log.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[:200] if lines else ""
