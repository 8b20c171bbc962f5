"""Compile an ONNX graph into an engine in a child process, and say what came of it."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from msn_export.driver import Device, Driver, NoDriver, find_driver
from msn_export.engine.backend import Backend, require_buildable
from msn_export.engine.census import Census, by_profile
from msn_export.engine.job import BuildSpec, Progress
from msn_export.engine.kernels import Kernel
from msn_export.engine.supervise import Limits, run_child
from msn_export.engine_header import CAPABILITIES, may_target, read_header
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
    require_buildable(backend, driver)
    notes = judge_options(spec, backend, driver)
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


def judge_options(spec: BuildSpec, backend: Backend, driver: Driver | NoDriver) -> tuple[str, ...]:
    """Refuse the options the backend cannot have, and tell of those it ignores.

    Raises:
        BuildError: an option cannot be had, or TensorRT-RTX has no kernels for a target.
    """
    flavour, options = backend.flavour, spec.options_set()
    for option in options.keys() & flavour.refused.keys():
        raise BuildError(f"{backend} cannot take {_flag(option)}: {flavour.refused[option]}")
    for capability in spec.capabilities:
        if not may_target(capability):
            raise BuildError(
                f"TensorRT-RTX cannot compile for compute capability {capability}; it can for "
                f"{', '.join(map(str, CAPABILITIES))}"
            )
    if spec.hardware_compatible and isinstance(driver, Driver):
        _require_ampere(driver.devices[0])
    notes = [
        f"{_flag(option)} has no effect: {flavour.ignored[option]}"
        for option in options
        if option in flavour.ignored
    ]
    if len(spec.capabilities) > 1:
        # measured: an engine for 8.9 and 12.0 has the kernels of the one for 8.9 alone
        notes.append(
            f"one set of kernels serves all targets, that of {min(spec.capabilities)}; an engine "
            "for each target may be faster"
        )
    return tuple(notes)


def _require_ampere(device: Device) -> None:
    # NvInfer.h, HardwareCompatibilityLevel: from Ampere on, and built on Ampere or later
    if device.capability < AMPERE:
        raise BuildError(
            f"--hardware-compatible needs a GPU of SM {AMPERE} or later to build on, and "
            f"{device.name} is SM {device.capability}; leave it out, or build where such a GPU is"
        )


def _flag(option: str) -> str:
    """Spell an option as the command line does."""
    return {"capabilities": "--compute-capability"}.get(option, f"--{option.replace('_', '-')}")


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
