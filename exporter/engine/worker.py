"""The compiler's process: ``python -m msn_export.engine.worker``; ``build.py`` starts it.

It sends events before its answer, and what TensorRT writes to stdout and stderr is the raw log.
After some failures the builder stays broken in its process, others end the process: so it has one
to itself.
"""

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msn_export.engine.compile import BuilderLog, IProgressMonitor, compile_engine, make_log
from msn_export.engine.options import BuildSpec, BuildStep
from msn_export.errors import BuildError
from msn_export.host import Send, peak_rss, serve
from msn_export.runtime.versions import TensorRT, row_for
from msn_export.schema import from_plain, to_plain

_INTERVAL = 0.02  # seconds between two reports of one phase


def main() -> None:
    # by line, so that a crash loses nothing; names in the log may be of any alphabet
    sys.stdout.reconfigure(line_buffering=True, encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    serve(_run, _failure)


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, MemoryError):
        return {"failed": "there is not enough memory; build on a larger machine"}
    if isinstance(error, OSError):
        return {"os_error": [error.errno, error.strerror, error.filename]}
    return {"failed": f"TensorRT's Python module raised {type(error).__name__}: {error}"}


def _run(job: dict[str, Any], send: Send) -> dict[str, Any]:
    trt = importlib.import_module(job["module"])
    row = row_for(job["module"], trt.__version__)
    if row is None:
        raise BuildError(f"{job['module']} {trt.__version__} is not supported")
    builder_log = BuilderLog()
    log = make_log(trt, builder_log, sys.stdout)

    def report(progress: BuildStep) -> bool:
        return send({"progress": to_plain(progress)})

    monitor = make_monitor(trt, report) if row.reports_progress else None
    spec = from_plain(BuildSpec, job["spec"], "spec")
    compiled = compile_engine(trt, row, spec, log, builder_log, monitor)
    Path(job["output"]).write_bytes(memoryview(compiled.plan))
    return {
        "version": trt.__version__,
        "kernels": to_plain(compiled.kernels),
        "notes": list(compiled.notes),
        "warnings": list(dict.fromkeys(builder_log.warnings)),
        "peak_rss": peak_rss(),
    }


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """Nested phases as one fraction: a phase inside another fills the parent's next step."""

    def __init__(self) -> None:
        self._open: dict[str, _Phase] = {}
        self._fraction = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> BuildStep:
        self._open[name] = _Phase(parent, max(steps, 1))
        return self._progress(name)

    def step(self, name: str, step: int) -> BuildStep | None:
        """Note that step ``step``, counted from 0, is complete; None if no such phase is open."""
        phase = self._open.get(name)
        if phase is None:
            return None
        phase.done = min(step + 1, phase.steps)
        return self._progress(name)

    def finish(self, name: str) -> None:
        self._open.pop(name, None)

    def _progress(self, name: str) -> BuildStep:
        phase = self._open[name]
        root = next((key for key, item in self._open.items() if item.parent is None), None)
        if root is not None:
            self._fraction = max(self._fraction, self._share(root))
        return BuildStep(name, phase.done, phase.steps, self._fraction)

    def _share(self, name: str) -> float:
        phase = self._open[name]
        inside = next((key for key, item in self._open.items() if item.parent == name), None)
        part = self._share(inside) if inside is not None and inside != name else 0.0
        return min((phase.done + part) / phase.steps, 1.0)


def make_monitor(trt: TensorRT, report: Callable[[BuildStep], bool]) -> IProgressMonitor:
    """Make a progress monitor; ``report`` returning False cancels the build."""
    phases = Phases()
    last = ("", 0.0)

    def tell(progress: BuildStep | None) -> bool:
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


if __name__ == "__main__":
    main()
