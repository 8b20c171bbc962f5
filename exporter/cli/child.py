"""Commands that may hang or end their process go on in a child.

Those are commands on a graph that another tool wrote, and all of them where the address space is
limited: libraries then end the process, or crash.
"""

from __future__ import annotations

import math
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from msn_export.errors import RunnerError

_GRACE = 5.0  # seconds between the request to end and the end
# Seconds in which a child that has used its address space up does nothing, or little else than ask
# the system: OpenBLAS of SciPy 1.17 asks for 32 MiB for ever, and a pool waits for a thread that
# could not start
_STUCK = 20
_ASKED = 64 * 2**20  # bytes


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


def too_little(memory: int) -> str:
    """Give the end of the message for a failure in ``memory`` bytes of address space."""
    return (
        f"most likely there is not enough memory: the address space is limited to "
        f"{memory / 2**20:.0f} MiB; allow more (ulimit -v)"
    )


def go_on_in_child(
    graphs: list[Path],
    limit: float | None,
    outputs: Iterable[Path],
    memory: int | None = None,
) -> Callable[[int], object]:
    """Return in a new process; this one waits for it, and ends as it says it did.

    Args:
        graphs: what has to be run, for the message.
        limit: seconds after which it is ended.
        outputs: folders that the command may write to, where a child that is killed leaves files.
        memory: bytes of address space that there are, for the message; None for no limit.

    Returns:
        The function that takes the exit code of the command. An end without it is a crash.

    Raises:
        RunnerError: in this process: the child took too long, or crashed.
    """
    from msn_export.host import end_with

    parent = os.getpid()
    receiver, sender = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    child = os.fork()  # nothing is loaded yet, and there is one thread
    if child == 0:
        os.close(receiver)
        os.setpgid(0, 0)  # Ctrl-C is for the parent, which ends this one
        end_with(parent)
        return lambda code: os.write(sender, bytes([code]))
    os.close(sender)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    stopped, until = False, math.inf if limit is None else time.monotonic() + limit
    try:
        code = _wait(child, limit) if memory is None else _watch(child, until, memory)
    except KeyboardInterrupt:
        stopped, code = True, _end(child)
    if code is None:
        _end(child)
    elif (ended := _received(receiver)) is not None:
        raise SystemExit(ended)  # the child has printed all that there is
    for folder in outputs:
        _remove_left(folder)
    if stopped:
        raise KeyboardInterrupt
    raise RunnerError(_reason(code, graphs, limit, until, memory))


def _received(descriptor: int) -> int | None:
    """Read the exit code that a child told before its end."""
    try:
        return next(iter(os.read(descriptor, 1)), None)
    except BlockingIOError:  # a process that the child started lives on
        return None


def _reason(
    code: int | None, graphs: list[Path], limit: float | None, until: float, memory: int | None
) -> str:
    from msn_export.host import signal_name

    names = " and ".join(str(graph) for graph in graphs)
    if code is None and memory is not None and time.monotonic() < until:
        return f"the command stands still; {too_little(memory)}"
    if code is None:
        return (
            f"{names} took longer than --timeout {limit:g} s and was stopped; it has no manifest "
            "of ours, so its run is limited: give more seconds where you trust it"
        )
    end = signal_name(code) if code < 0 else f"exit code {code}"
    if memory is not None:
        return f"a library ended the process ({end}); {too_little(memory)}"
    return (
        f"the run of {names} crashed ({end}); msn-export did not write it: export it again, or "
        "check the file with onnx.checker"
    )


def _wait(child: int, limit: float | None) -> int | None:
    """Wait for a child's exit code, negative for a signal; None where ``limit`` s pass before."""
    descriptor = os.pidfd_open(child)
    try:
        if not select.select([descriptor], [], [], limit)[0]:
            return None
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _watch(child: int, until: float, memory: int) -> int | None:
    """Wait as ``_wait`` does; None also where the child is stuck for want of memory."""
    from msn_export.host import address_space_used, ticks

    before, stuck = (0, 0), 0
    while stuck < _STUCK and time.monotonic() < until:
        code = _wait(child, 1.0)
        if code is not None:
            return code
        now = ticks(child)
        idle = now[1] - before[1] >= now[0] - before[0] and not _children(child)
        stuck = stuck + 1 if idle and address_space_used(child) > memory - _ASKED else 0
        before = now
    return None


def _children(process: int) -> bool:
    try:
        return bool(Path(f"/proc/{process}/task/{process}/children").read_text(encoding="ascii"))
    except OSError:
        return False


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
