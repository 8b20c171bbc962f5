"""``python -m msn_export``, and what the command ``msn-export`` runs."""

import io
import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn


class _Lossy(io.TextIOWrapper):
    """Standard error whose disk may be full: what cannot be printed is lost, and nothing else."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def run() -> None:
    """Be the command line of a process: its streams may be closed, an interrupt may come early."""
    _open_streams()
    signals: list[int] = []
    own: Any = None

    def stop(number: int, _frame: Any) -> NoReturn:
        signals.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup and shells have it
            signal.signal(number, stop)
    code: Any = 1
    try:
        from msn_export.cli import main
        from msn_export.cli.options import OwnProcess

        own = OwnProcess(signals)
        main(prog_name="msn-export", obj=own)
    except SystemExit as end:
        code = end.code
    except OSError as error:  # of click's own output, as of --help
        print(f"error: {error.strerror or error}", file=sys.stderr)  # noqa: T201
    except BaseException as error:  # while packages are imported an interrupt becomes any error
        if signals:
            print("error: interrupted; nothing was written", file=sys.stderr)  # noqa: T201
            code = 130
        elif _is_out_of_memory(error):
            print("error: there is not enough memory to begin", file=sys.stderr)  # noqa: T201
        else:
            raise
    try:
        sys.stdout.flush()
    except OSError as error:
        if not code:
            print(f"error: standard output: {error.strerror}", file=sys.stderr)  # noqa: T201
        code = code or 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter flushes once more
    if own is not None:
        own.tell(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):  # where the import below would fail too
        return True
    from msn_export.errors import out_of_memory

    return out_of_memory(error) is not None


def _open_streams() -> None:
    """Have a file behind each standard stream: else the next that is opened would be taken for it.

    What is written to a closed standard output fails, as the exit code has to tell.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)  # the lowest number
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    errors = os.fdopen(2, "wb", buffering=0, closefd=False)
    sys.stderr = _Lossy(errors, encoding="utf-8", errors="backslashreplace", line_buffering=True)


if __name__ == "__main__":
    run()
