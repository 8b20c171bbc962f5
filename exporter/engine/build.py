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
    find_driver,
    last_line,
    peak_rss,
    signal_name,
)
from msn_export.schema import from_plain, to_plain
from msn_export.spec import AMPERE, Targets

_POLL = 0.05  # seconds between two looks at clock and memory


@dataclass(frozen=True, slots=True)
class Limits:
    """When to give up: ``timeout`` in seconds, ``memory`` in bytes of resident memory.

    Resident, not address space (RLIMIT_AS): CUDA reserves hundreds of gigabytes that it never
    touches. The child is looked at 20 times a second, so it can pass the ceiling for a moment.
    """

    timeout: float | None = None
    memory: int | None = None


def run_child(
    job: Mapping[str, Any],
    raw: IO[bytes],
    limits: Limits,
    progress: Callable[[BuildStep], None],
) -> dict[str, Any]:
    """Run ``job`` in a child process and give what it says when it is done.

    Args:
        job: what ``worker.py`` reads.
        raw: receives all that the child and TensorRT print.
        limits: when to end it.
        progress: is told how far it is.
    """
    with ChildProcess("msn_export.engine.worker", raw) as child:
        child.send(job)
        for event in _events(child, limits):
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


def _events(child: ChildProcess, limits: Limits) -> Iterator[dict[str, Any]]:
    """Give the child's events until it closes the pipe, watching clock and memory."""
    started = time.monotonic()
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.messages, selectors.EVENT_READ)
        while True:
            _check(limits, child.process.pid, time.monotonic() - started)
            if not selector.select(_POLL):
                continue
            chunk = os.read(child.messages.fileno(), 1 << 16)
            if not chunk:
                return
            *lines, pending = (pending + chunk).split(b"\n")
            yield from map(json.loads, lines)


def _check(limits: Limits, process: int, seconds: float) -> None:
    if limits.timeout is not None and seconds > limits.timeout:
        raise BuildError(f"the build took longer than its limit of {limits.timeout:g} s")
    if limits.memory is None:
        return
    used = peak_rss(process)
    if used > limits.memory:
        raise BuildError(
            f"the build needs more than its memory limit of {_gib(limits.memory)} "
            f"(it was at {_gib(used)}); raise the limit or lower --batch"
        )


def _describe_end(code: int, raw: IO[bytes]) -> str:
    """Say how a child ended that said neither done nor failed."""
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
        """The kernels of the first profile."""
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

    Args:
        spec: what to compile.
        backend: what to compile with.
        output: where the engine goes; the caller moves it once it has passed its gate.
        log: where all that TensorRT says goes, verbatim; also, and above all, when it fails.
        progress: is told how far the build is.
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
            Limits(spec.timeout, spec.memory_limit),
            progress or _ignore,
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


def _ignore(_progress: BuildStep) -> None:
    """Tell nobody."""


def _job(spec: BuildSpec, backend: Backend, output: Path) -> dict[str, Any]:
    # told above; TensorRT is not even asked
    idle: dict[str, Any] = dict.fromkeys(backend.row.ignored)
    asked = replace(spec, model=spec.model.absolute(), **idle)
    module = backend.row.module
    return {"module": module, "spec": to_plain(asked), "output": str(output.absolute())}


def _targets(spec: BuildSpec, backend: Backend, output: Path, driver: Driver | NoDriver) -> Targets:
    """Say which GPUs the engine is for, as its header claims where that can be read."""
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
