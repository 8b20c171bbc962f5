"""Commands on a graph that another tool wrote go on in a child: it may hang, or end its process."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from msn_export.errors import RunnerError

_GRACE = 5.0  # seconds between the request to end and the end


def graphs_of_others(values: Iterable[Any]) -> list[Path]:
    """List those of a command's values that are graphs without a manifest of ours."""
    found = []
    for value in values:
        for one in value if isinstance(value, tuple) else (value,):
            path = Path(one) if isinstance(one, str | Path) else None
            if path is None or path.suffix != ".onnx" or not _is_file(path):
                continue
            if not os.path.lexists(f"{path}.json"):
                found.append(path)
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no path at all; the command says so
        return False


def go_on_in_child(graphs: list[Path], limit: float, outputs: Path) -> None:
    """Return in a new process; this one waits for it, ends it after ``limit`` s, and ends as it.

    Args:
        graphs: what has to be run, for the message.
        limit: seconds.
        outputs: the folder that the command writes to, where a child that is killed leaves files.

    Raises:
        RunnerError: in this process: the child took too long, or crashed.
    """
    from msn_export.host import end_with, signal_name

    parent = os.getpid()
    child = os.fork()  # nothing is loaded yet, and there is one thread
    if child == 0:
        os.setpgid(0, 0)  # Ctrl-C is for the parent, which ends this one
        end_with(parent)
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    names = " and ".join(str(graph) for graph in graphs)
    try:
        code = _wait(child, limit)
    except KeyboardInterrupt:
        code = _end(child)
        if code < 0:
            _remove_left(outputs)
            raise
    if code is not None and code >= 0:
        os._exit(code)  # the child has printed all that there is
    if code is None:
        _end(child)
    _remove_left(outputs)
    if code is None:
        raise RunnerError(
            f"{names} took longer than --timeout {limit:g} s and was stopped; it has no manifest "
            "of ours, so its run is limited: give more seconds where you trust it"
        )
    raise RunnerError(
        f"the run of {names} crashed ({signal_name(code)}); msn-export did not write it: export "
        "it again, or check the file with onnx.checker"
    )


def _wait(child: int, limit: float) -> int | None:
    """Wait for a child's exit code, negative for a signal; None where ``limit`` s pass before."""
    descriptor = os.pidfd_open(child)
    try:
        if not select.select([descriptor], [], [], limit)[0]:
            return None
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _end(child: int) -> int:
    """Ask a child to end, and end it where it does not: a library may be at work."""
    os.kill(child, signal.SIGTERM)
    code = _wait(child, _GRACE)
    if code is not None:
        return code
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _remove_left(outputs: Path) -> None:
    from msn_export.files import sweep

    sweep(outputs)
