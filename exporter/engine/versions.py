"""One row a TensorRT that compiles, and which of them is installed here.

Nothing elsewhere asks for a version. A row is chosen by module and version; the compiler follows
its fields. Facts: measured on the real modules (tests/test_bindings.py) and, for TensorRT-RTX, on
its builds.
"""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from msn_export.errors import BuildError, MissingPackageError, SpecError
from msn_export.host import Driver, NoDriver, find_driver

_TARGETS = frozenset(
    {
        "ComputeCapability",
        "IBuilderConfig.num_compute_capabilities",
        "IBuilderConfig.set_compute_capability",
    }
)
_ATTENTION = frozenset(
    {
        "IAttention.decomposable",
        "IAttentionInputLayer",
        "IAttentionInputLayer.attention",
        "LayerType.ATTENTION_INPUT",
    }
)
_MONITOR = frozenset(
    {
        "IBuilderConfig.progress_monitor",
        "IProgressMonitor",
        "IProgressMonitor.phase_finish",
        "IProgressMonitor.phase_start",
        "IProgressMonitor.step_complete",
    }
)
_OWN_GPU_ONLY = "TensorRT compiles for the GPU it runs on; --backend tensorrt-rtx takes a target"


@dataclass(frozen=True, slots=True)
class Flavour:
    """What one range of TensorRT versions can do and how it is told.

    ``since`` is the first version of the row, ``lacks`` the names the code uses that the row's
    modules do not have (each guarded by a field here), ``ignored`` and ``refused`` the options of
    a build that do nothing or cannot be had, with the reason.
    """

    backend: Literal["tensorrt", "tensorrt-rtx"]
    module: str
    since: tuple[int, int]
    opset: int = 23  # the newest its ONNX parser reads, of those written here
    network_flags: tuple[str, ...] = ("STRONGLY_TYPED",)
    # dtype found in the network -> BuilderFlag it needs; where networks are strongly typed: none
    precision_flags: Mapping[str, str] = field(default_factory=dict)
    preview_features: tuple[str, ...] = ()
    builds_without_gpu: bool = False
    targets_capabilities: bool = False
    reports_progress: bool = True
    has_attention: bool = True
    kernels_from: Literal["log", "inspector"] = "inspector"
    ignored: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()

    @property
    def strongly_typed(self) -> bool:
        """Whether the graph's types are the engine's types."""
        return "STRONGLY_TYPED" in self.network_flags

    def named_members(self) -> frozenset[str]:
        """List the enum members that this row names as text."""
        flags = {f"NetworkDefinitionCreationFlag.{flag}" for flag in self.network_flags}
        flags |= {f"BuilderFlag.{flag}" for flag in self.precision_flags.values()}
        return frozenset(flags | {f"PreviewFeature.{name}" for name in self.preview_features})


_RTX_IGNORES = "TensorRT-RTX accepts it and does nothing: it chooses its kernels on the user's GPU"
_RTX_PORTABLE = "without --compute-capability its engines are for any GPU from Ampere on"
_TENSORRT_REFUSES = {"capabilities": _OWN_GPU_ONLY}

FLAVOURS = (
    Flavour(
        "tensorrt-rtx",
        "tensorrt_rtx",
        (1, 5),
        builds_without_gpu=True,
        targets_capabilities=True,
        kernels_from="log",
        ignored={"timing_cache": _RTX_IGNORES, "optimization_level": _RTX_IGNORES},
        refused={
            "version_compatible": "TensorRT-RTX ships without the lean runtime it needs",
            "hardware_compatible": _RTX_PORTABLE,
        },
    ),
    Flavour("tensorrt", "tensorrt", (10, 14), refused=_TENSORRT_REFUSES, lacks=_TARGETS),
    Flavour(
        "tensorrt",
        "tensorrt",
        (10, 0),
        opset=20,
        has_attention=False,
        refused=_TENSORRT_REFUSES,
        lacks=_TARGETS | _ATTENTION,
    ),
    Flavour(
        "tensorrt",
        "tensorrt",
        (8, 6),
        opset=17,
        network_flags=("EXPLICIT_BATCH",),
        precision_flags={"HALF": "FP16", "INT8": "INT8"},
        # several contexts run one profile at the same time; from 10 on they always may
        preview_features=("PROFILE_SHARING_0806",),
        reports_progress=False,
        has_attention=False,
        refused=_TENSORRT_REFUSES,
        lacks=_TARGETS | _ATTENTION | _MONITOR,
    ),
)
_UNSUPPORTED = ((9, 0), (10, 0))  # 9.x was a preview for language models


def flavour_for(module: str, version: str) -> Flavour | None:
    """Choose the row for a version of a module, or None where no row fits."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return None
    found = (int(numbers[1]), int(numbers[2]))
    if module == "tensorrt" and _UNSUPPORTED[0] <= found < _UNSUPPORTED[1]:
        return None
    rows = [row for row in FLAVOURS if row.module == module and row.since <= found]
    return max(rows, key=lambda row: row.since, default=None)


_INSTALL = {
    "tensorrt-rtx": (
        "pip install 'msn-export[rtx]' (95 MB, all from PyPI; compiles without a GPU)"
    ),
    "tensorrt": (
        "pip install 'msn-export[tensorrt]' (needs a GPU; its tensorrt-cu13-libs on PyPI is a stub "
        "that downloads the libraries from the vendor's own index, so that must be reachable)"
    ),
}


@dataclass(frozen=True, slots=True)
class Backend:
    """A flavour that is installed here, in the version found."""

    flavour: Flavour
    version: str

    @property
    def name(self) -> str:
        """The name that ``--backend`` takes."""
        return self.flavour.backend

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
    if name in _INSTALL:
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
    if backend.flavour.builds_without_gpu or isinstance(driver, Driver):
        return
    raise BuildError(
        f"{backend} compiles only where a GPU is, and here: {driver.reason}; "
        "use --backend tensorrt-rtx, which needs none, or compile on the machine with the GPU"
    )


def _require(name: str) -> Backend:
    module = next(row.module for row in FLAVOURS if row.backend == name)
    version = _import_version(module)
    if version is None:
        raise MissingPackageError(f"{name} is not installed; {_INSTALL[name]}")
    flavour = flavour_for(module, version)
    if flavour is None:
        known = "1.5 or later" if name == "tensorrt-rtx" else "8.6, 10.x and 11.x"
        raise MissingPackageError(
            f"{name} {version} is not supported ({known} are); {_INSTALL[name]}"
        )
    return Backend(flavour, version)


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
    name = next(row.backend for row in FLAVOURS if row.module == module)
    raise MissingPackageError(
        f"{name} is installed but does not import ({reason}); {_INSTALL[name]}"
    )
