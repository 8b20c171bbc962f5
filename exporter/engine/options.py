"""Compilers that are installed, and what they are to compile."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterable, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from msn_export.engine_header import CAPABILITIES, may_target
from msn_export.errors import BuildError, MissingPackageError, SpecError
from msn_export.host import Device, Driver, NoDriver, find_driver
from msn_export.runtime.versions import INSTALL, VERSIONS, TensorRTVersion, row_for
from msn_export.schema import Count, Job, Within
from msn_export.spec import AMPERE, BatchRange, ComputeCapability, Dtype

_NEEDS = {
    "tensorrt-rtx": "95 MB, all from PyPI; compiles without a GPU",
    "tensorrt": (
        "needs a GPU; its tensorrt-cu13-libs on PyPI is a stub "
        "that downloads the libraries from the vendor's own index, so that must be reachable"
    ),
}


@dataclass(frozen=True, slots=True)
class Backend:
    """An installed TensorRT to compile with."""

    row: TensorRTVersion
    version: str

    @property
    def name(self) -> str:
        return self.row.backend

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def find_backend(name: str = "auto") -> Backend:
    """Find an installed TensorRT by the name ``--backend`` takes.

    ``auto`` is full TensorRT where it imports and a driver exists (it compiles nothing without a
    GPU), else TensorRT-RTX.
    """
    if name in INSTALL:
        return _require(name)
    if name != "auto":
        raise SpecError(f"backend {name!r} is unknown; expected auto, tensorrt or tensorrt-rtx")
    misses = []
    for candidate in ("tensorrt", "tensorrt-rtx"):
        if candidate == "tensorrt" and isinstance(find_driver(), NoDriver):
            continue
        try:
            return _require(candidate)
        except MissingPackageError as error:
            misses.append(str(error))
    raise MissingPackageError("; ".join(misses))


def require_buildable(backend: Backend, driver: Driver | NoDriver) -> None:
    """Require what ``backend`` compiles with: without a driver full TensorRT ends the process."""
    if backend.row.builds_without_gpu or isinstance(driver, Driver):
        return
    raise BuildError(
        f"{backend} compiles only where a GPU is, and here: {driver.reason}; "
        "use --backend tensorrt-rtx, which needs none, or compile on the machine with the GPU"
    )


def _require(name: str) -> Backend:
    module = next(row.module for row in VERSIONS if row.backend == name)
    version = _import_version(module)
    if version is None:
        raise MissingPackageError(f"{name} is not installed; {_install(name)}")
    row = row_for(module, version)
    if row is None:
        supported = "1.5 or later" if name == "tensorrt-rtx" else "8.6, 10.x and 11.x"
        raise MissingPackageError(
            f"{name} {version} is not supported ({supported} are); {_install(name)}"
        )
    return Backend(row, version)


def _import_version(module: str) -> str | None:
    """Import a module in a process of its own: two TensorRTs cannot share one, and some crash."""
    if importlib.util.find_spec(module) is None:
        return None
    command = [sys.executable, "-P", "-c", f"import {module}; print({module}.__version__)"]
    # the command is this interpreter and a module name out of the table above
    run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if run.returncode == 0:
        return run.stdout.split()[-1]
    reason = (run.stderr.strip().splitlines() or [f"exit {run.returncode}"])[-1]
    name = next(row.backend for row in VERSIONS if row.module == module)
    raise MissingPackageError(
        f"{name} is installed but does not import ({reason}); {_install(name)}"
    )


def _install(name: str) -> str:
    return f"{INSTALL[name]} ({_NEEDS[name]})"


@dataclass(frozen=True, slots=True)
class BuildSpec(Job):
    """A graph to compile, for which GPUs and within which limits.

    ``profiles`` are the batch ranges to tune for, in order. No ``capabilities``: TensorRT-RTX
    then claims every GPU from Ampere on. ``precision`` matters only where the network is not
    strongly typed. ``workspace`` (a kernel's scratch memory) and ``memory_limit`` (of the compiler
    process, resident) are in bytes, ``timeout`` is in seconds. ``allow_unfused`` lets
    TensorRT take an Attention operator apart where it has no fused kernel for it; without it such
    a graph does not compile, so that a build proves the fusion. ``tf32`` lets fp32 products round
    their inputs to 10 bits of mantissa, which TensorRT does by default and this package does not.
    ``hardware_compatible`` is for every GPU from Ampere on, not only for the builder's own.
    """

    model: Path
    profiles: tuple[BatchRange, ...]
    capabilities: tuple[ComputeCapability, ...] = ()
    precision: Dtype | None = None
    workspace: Count | None = None
    optimization_level: Annotated[int, Within(0, 5)] | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    tf32: bool = False
    allow_unfused: bool = False
    timeout: Annotated[float, Within(0, above=True)] | None = None
    memory_limit: Count | None = None

    def require_consistent(self) -> None:
        if not self.profiles:
            raise SpecError("no batch range; give at least one --batch")
        for option, items in (("batch", self.profiles), ("compute-capability", self.capabilities)):
            texts = [str(item) for item in items]
            for text in texts:
                if texts.count(text) > 1:
                    raise SpecError(f"--{option} {text} is given twice")


@dataclass(frozen=True, slots=True)
class BuildStep:
    """Step ``step`` of ``steps`` of a named phase; ``fraction`` of the build, 0 to 1.

    Phases nest; ``fraction`` never goes back.
    """

    phase: str
    step: int
    steps: int
    fraction: float


# The first GPU generation that computes in a dtype; TensorRT-RTX refuses a named older one, and
# where none is named writes an engine that claims GPUs which cannot run it: those from Ampere on.
_FIRST_CAPABILITY = {
    "BF16": ComputeCapability(8, 0),
    "FP8": ComputeCapability(8, 9),
    "FP4": ComputeCapability(12, 0),
}


def check_options(spec: BuildSpec, backend: Backend, driver: Driver | NoDriver) -> tuple[str, ...]:
    """Refuse what cannot be built here; return notes on options that do nothing.

    It needs no graph, so that a command can ask before it begins its work.
    """
    require_buildable(backend, driver)
    row = backend.row
    given = {each.name for each in fields(spec) if getattr(spec, each.name) != each.default}
    for option in given & row.refused.keys():
        raise BuildError(f"{backend} cannot take {_flag(option)}: {row.refused[option]}")
    for capability in spec.capabilities:
        if not may_target(capability):
            raise no_kernels(capability, CAPABILITIES)
    if spec.hardware_compatible and isinstance(driver, Driver):
        _require_ampere(driver.devices[0])
    notes = [
        f"{_flag(option)} has no effect: {reason}"
        for option, reason in row.ignored.items()
        if option in given
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


def require_capable(dtypes: Set[str], capabilities: tuple[ComputeCapability, ...]) -> None:
    """Refuse targets that do not compute in all of ``dtypes``, in TensorRT's spelling."""
    for dtype, first in _FIRST_CAPABILITY.items():
        if dtype not in dtypes:
            continue
        if not capabilities and first > AMPERE:
            raise BuildError(
                f"the graph computes in {dtype.lower()}, which GPUs before {first} cannot; name "
                f"the target: --compute-capability {first}"
            )
        for capability in capabilities:
            if capability < first:
                raise BuildError(
                    f"the graph computes in {dtype.lower()}, which --compute-capability "
                    f"{capability} cannot; it takes {first} or later"
                )


def no_kernels(capability: ComputeCapability, supported: Iterable[ComputeCapability]) -> BuildError:
    return BuildError(
        f"TensorRT-RTX cannot compile for compute capability {capability}; it can for "
        f"{', '.join(map(str, supported))}"
    )


def _flag(option: str) -> str:
    return {"capabilities": "--compute-capability"}.get(option, f"--{option.replace('_', '-')}")
