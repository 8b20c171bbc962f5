"""Compile an ONNX graph in a child process, to its end, and say what came of it."""

import contextlib
import json
import os
import selectors
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from msn_export.engine.census import Census, by_profile
from msn_export.engine.kernels import Kernel
from msn_export.engine.options import Backend, BuildSpec, BuildStep, check_options
from msn_export.engine_header import read_header
from msn_export.errors import BuildError, OutputError
from msn_export.host import (
    ChildProcess,
    Driver,
    NoDriver,
    address_space_limit,
    find_driver,
    last_line,
    peak_rss,
    signal_name,
    ticks,
)
from msn_export.schema import from_plain, to_plain
from msn_export.spec import AMPERE, Targets

_POLL = 0.05  # seconds between two looks at clock and memory
_IDLE = 20.0  # seconds without any work: without memory TensorRT-RTX 1.7 ends in a deadlock


def run_child(
    job: Mapping[str, Any],
    raw: IO[bytes],
    progress: Callable[[BuildStep], None],
    *,
    timeout: float | None = None,
    memory: int | None = None,
) -> dict[str, Any]:
    """Run ``job`` in ``worker.py`` and return its result; ``raw`` receives all that is printed.

    ``timeout`` is in seconds, ``memory`` in bytes of resident memory. Not of address space
    (RLIMIT_AS): CUDA reserves hundreds of gigabytes that it never touches. The child is looked at
    20 times a second, so it can pass the limit for a moment.
    """
    with ChildProcess("msn_export.engine.worker", raw) as child:
        child.send(job)
        for event in _events(child, timeout, memory):
            if "progress" in event:
                progress(BuildStep(**event["progress"]))
            elif "done" in event:
                done: dict[str, Any] = event["done"]
                progress(BuildStep("done", 1, 1, 1.0))
                return done
            elif "failed" in event:
                raise BuildError(event["failed"])
            elif "os_error" in event:
                raise OSError(*event["os_error"])
        raise BuildError(_describe_end(child.process.wait(), raw))


def _events(
    child: ChildProcess, timeout: float | None, memory: int | None
) -> Iterator[dict[str, Any]]:
    started = time.monotonic()
    pending, used, idle = b"", (0, 0), 0
    is_limited = address_space_limit() is not None
    with selectors.DefaultSelector() as selector:
        selector.register(child.messages, selectors.EVENT_READ)
        while True:
            if timeout is not None and time.monotonic() - started > timeout:
                raise BuildError(f"the build took longer than its limit of {timeout:g} s")
            if memory is not None and (peak := peak_rss(child.process.pid)) > memory:
                raise BuildError(
                    f"the build needs more than its memory limit of {_gib(memory)} "
                    f"(it was at {_gib(peak)}); raise the limit or lower --batch"
                )
            if not selector.select(_POLL):
                before, used = used, ticks(child.process.pid)
                idle = idle + 1 if used == before else 0
                if is_limited and idle * _POLL > _IDLE:
                    raise BuildError(
                        "the TensorRT compiler waits for itself, most likely because there is not "
                        "enough memory: its address space is limited; allow more (ulimit -v)"
                    )
                continue
            idle = 0
            chunk = os.read(child.messages.fileno(), 1 << 16)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from map(json.loads, lines)


def _describe_end(code: int, raw: IO[bytes]) -> str:
    line = last_line(raw)
    last = f" Its last line: {line}" if line else ""
    if code == -signal.SIGKILL:
        return (
            "the TensorRT compiler was killed (SIGKILL), most likely because memory ran out; build "
            f"on a machine with more, or lower --batch.{last}"
        )
    if code < 0:
        return f"the TensorRT compiler crashed ({signal_name(code)}).{last}"
    return f"the TensorRT compiler ended without a result (exit {code}).{last}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


@dataclass(frozen=True, slots=True)
class BuildResult:
    """An engine that compiled. Nothing has run it.

    ``censuses`` has one census a profile. ``peak_rss`` is the compiler process' highest resident
    memory, in bytes. ``notes`` are for the user, ``warnings`` are TensorRT's own.
    """

    output: Path
    bytes: int
    seconds: float
    peak_rss: int
    backend: Backend
    targets: Targets
    censuses: tuple[Census, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def census(self) -> Census:
        return self.censuses[0]


def build_engine(
    spec: BuildSpec,
    backend: Backend,
    output: Path,
    log: Path | None = None,
    progress: Callable[[BuildStep], None] | None = None,
) -> BuildResult:
    """Compile ``spec.model`` and write the engine to ``output``, a staging path.

    Whatever interrupts this call (Ctrl-C, an error in ``progress``) ends the compiler's process.
    ``log`` receives all that TensorRT prints, verbatim, also when the build fails.
    """
    driver = find_driver()
    notes = check_options(spec, backend, driver)
    if not spec.model.is_file():
        raise BuildError(f"graph {spec.model} does not exist")
    started = time.monotonic()
    with _open_raw(log) as raw:
        done = run_child(
            _job(spec, backend, output),
            raw,
            progress or (lambda _step: None),
            timeout=spec.timeout,
            memory=spec.memory_limit,
        )
    kernels = from_plain(tuple[Kernel, ...], done["kernels"], "kernels")
    return BuildResult(
        output=output,
        bytes=output.stat().st_size,
        seconds=time.monotonic() - started,
        peak_rss=done["peak_rss"],
        backend=backend,
        targets=_targets(spec, backend, output, driver),
        censuses=by_profile(kernels),
        notes=(*notes, *done["notes"]),
        warnings=tuple(done["warnings"]),
    )


def _job(spec: BuildSpec, backend: Backend, output: Path) -> dict[str, Any]:
    # noted by check_options; TensorRT does not get them
    idle: dict[str, Any] = dict.fromkeys(backend.row.ignored)
    asked = replace(spec, model=spec.model.absolute(), **idle)
    module = backend.row.module
    return {"module": module, "spec": to_plain(asked), "output": str(output.absolute())}


def _targets(spec: BuildSpec, backend: Backend, output: Path, driver: Driver | NoDriver) -> Targets:
    """The GPUs the engine is for, as its header claims where that can be read."""
    if not backend.row.targets_capabilities:
        if spec.hardware_compatible:
            return Targets((AMPERE,), later=True)
        return Targets((driver.devices[0].capability,) if isinstance(driver, Driver) else ())
    claimed = read_header(output).targets
    if spec.capabilities and set(claimed.named) != set(spec.capabilities):
        asked = Targets(tuple(sorted(spec.capabilities)))
        raise BuildError(f"asked for {asked}, and the engine claims {claimed}")
    return claimed


@contextlib.contextmanager
def _open_raw(log: Path | None) -> Iterator[IO[bytes]]:
    if log is None:
        with tempfile.TemporaryFile() as raw:
            yield raw
        return
    try:
        descriptor = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    except OSError as error:
        raise OutputError(f"log {log} cannot be written: {error.strerror}") from error
    with os.fdopen(descriptor, "w+b") as raw:
        yield raw
