"""What TensorRT calls back while it compiles: its log and its progress monitor."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from msn_export.engine.bindings import ILogger, IProgressMonitor, TensorRT
from msn_export.engine.job import Phases, Progress

_ERRORS = frozenset({"ERROR", "INTERNAL_ERROR"})
_RECORDS = "Layers:"  # first line of the message that lists the kernels
_INTERVAL = 0.02  # seconds between two reports of one phase


@dataclass(slots=True)
class Heard:
    """What is kept of the log: the raw text goes to a file."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)


def make_log(trt: TensorRT, heard: Heard, raw: TextIO) -> ILogger:
    """Make a logger at VERBOSE; keep a reference to it as long as the builder lives."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the modules have no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            name = severity.name
            if name in _ERRORS:
                heard.errors.append(msg)
            elif name == "WARNING":
                heard.warnings.append(msg)
            elif msg.startswith(_RECORDS):
                heard.records.append(msg)
            with contextlib.suppress(OSError):  # a full disk must not raise into TensorRT
                raw.write(f"[{name[0]}] {msg}\n")

    return Log()


def make_monitor(trt: TensorRT, report: Callable[[Progress], bool]) -> IProgressMonitor:
    """Make a progress monitor; ``report`` returning False cancels the build."""
    phases = Phases()
    last = ("", 0.0)

    def tell(progress: Progress | None) -> bool:
        nonlocal last
        now = time.monotonic()
        if progress is None or (progress.phase == last[0] and now - last[1] < _INTERVAL):
            return True
        last = (progress.phase, now)
        return report(progress)

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the modules have no types
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            tell(phases.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            return tell(phases.step(phase_name, step))

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
