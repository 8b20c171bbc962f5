"""Compile an ONNX graph into an engine in a child process, and say what came of it."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from msn_export.driver import Driver, NoDriver, find_driver
from msn_export.engine.backend import Backend
from msn_export.engine.census import Census, by_profile
from msn_export.engine.job import BuildSpec, Progress
from msn_export.engine.kernels import Kernel
from msn_export.engine.options import judge
from msn_export.engine.supervise import Limits, run_child
from msn_export.engine_header import read_header
from msn_export.errors import BuildError, OutputError
from msn_export.records import from_plain
from msn_export.spec import AMPERE, Targets


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
    progress: Callable[[Progress], None] | None = None,
) -> BuildResult:
    """Compile ``spec.model`` and write the engine to ``output``, a staging path.

    Whatever interrupts this call (Ctrl-C, an error in ``progress``) ends the compiler's process.

    Args:
        spec: what to compile.
        backend: what to compile with.
        output: where the engine goes; the caller moves it once it has passed its gate.
        log: where all that TensorRT says goes, verbatim; also, and above all, when it fails.
        progress: is told how far the build is.

    Raises:
        BuildError: TensorRT refused or crashed, or a limit of ``spec`` was reached.
        OutputError: ``log`` cannot be written.
    """
    driver = find_driver()
    notes = judge(spec, backend, driver)
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


def _ignore(_progress: Progress) -> None:
    """Tell nobody."""


def _job(spec: BuildSpec, backend: Backend, output: Path) -> dict[str, Any]:
    plain = spec.to_json()
    for option in backend.flavour.ignored.keys() & spec.options_set().keys():
        plain[option] = None  # told above; TensorRT is not even asked
    plain["model"] = str(spec.model.absolute())
    return {"module": backend.flavour.module, "spec": plain, "output": str(output.absolute())}


def _targets(spec: BuildSpec, backend: Backend, output: Path, driver: Driver | NoDriver) -> Targets:
    """Say which GPUs the engine is for, as its header claims where that can be read.

    Raises:
        BuildError: it claims others than were asked for.
    """
    if not backend.flavour.targets_capabilities:
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
