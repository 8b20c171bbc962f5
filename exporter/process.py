"""What a process knows of itself: its memory, and that it ends with its parent."""

import ctypes
import os
import signal
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def peak_rss(process: int | str = "self") -> int:
    """Read a process' highest resident memory so far, in bytes; 0 where it cannot be told.

    Not ``getrusage``: its figure is inherited from the parent at the start.
    """
    return _field("VmHWM:", process)


def rss(process: int | str = "self") -> int:
    """Read a process' resident memory now, in bytes; 0 where it cannot be told."""
    return _field("VmRSS:", process)


def reset_peak() -> None:
    """Let the peak of this process start again from what it holds now, where that is allowed."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5)


def _field(name: str, process: int | str) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = next((line for line in lines if line.startswith(name)), None)
    return int(found.split()[1]) * 1024 if found else 0


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def signal_name(code: int) -> str:
    """Name the signal behind a negative exit code; Python has no name for most real-time ones."""
    return next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
