"""Which TensorRT is installed here to compile with; ``msn_export.runtime.versions`` has its row."""

import importlib.util
import subprocess
import sys
from dataclasses import dataclass

from msn_export.errors import BuildError, MissingPackageError, SpecError
from msn_export.host import Driver, NoDriver, find_driver
from msn_export.runtime.versions import INSTALL, VERSIONS, TensorRTVersion, row_for

_NEEDS = {
    "tensorrt-rtx": "95 MB, all from PyPI; compiles without a GPU",
    "tensorrt": (
        "needs a GPU; its tensorrt-cu13-libs on PyPI is a stub "
        "that downloads the libraries from the vendor's own index, so that must be reachable"
    ),
}


@dataclass(frozen=True, slots=True)
class Backend:
    """A TensorRT that is installed here to compile with, in the version found."""

    row: TensorRTVersion
    version: str

    @property
    def name(self) -> str:
        """The name that ``--backend`` takes."""
        return self.row.backend

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


def find_backend(name: str = "auto") -> Backend:
    """Find an installed TensorRT by the name ``--backend`` takes.

    ``auto`` is full TensorRT where it imports and a driver exists (it compiles nothing without a
    GPU), else TensorRT-RTX.

    Raises:
        SpecError: the name is none of auto, tensorrt, tensorrt-rtx.
        MissingPackageError: it cannot be imported; the message has the line that installs it.
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
    """Require what ``backend`` needs to compile: without a driver full TensorRT ends the process.

    Raises:
        BuildError: it needs a GPU and none can be used here.
    """
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
        known = "1.5 or later" if name == "tensorrt-rtx" else "8.6, 10.x and 11.x"
        raise MissingPackageError(
            f"{name} {version} is not supported ({known} are); {_install(name)}"
        )
    return Backend(row, version)


def _import_version(module: str) -> str | None:
    """Import a module in a process of its own: two TensorRTs cannot share one, and some crash.

    Raises:
        MissingPackageError: it is installed and does not import.
    """
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
