"""One row a module that runs engines: all that differs between them.

The convention of ``msn_export.engine.compile``, with two additions: the CUDA driver API
(``cuda.bindings.driver``) is a variable annotated ``CudaDriver``, and an attribute that a class
annotates counts like a variable. tests/test_runtime_bindings.py looks every name up.

The counterpart of ``msn_export.engine.versions`` for running. Facts: the members of the real
modules (tests/test_runtime_bindings.py), and NVIDIA's documentation of engine compatibility.
"""

import importlib
import importlib.util
import re
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from msn_export.errors import MissingPackageError, RunnerError

TensorRT: TypeAlias = Any  # the module: tensorrt, tensorrt_lean or tensorrt_rtx
CudaDriver: TypeAlias = Any  # the module cuda.bindings.driver

DataType: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IExecutionContext: TypeAlias = Any
ILogger: TypeAlias = Any
IRuntimeConfig: TypeAlias = Any
Runtime: TypeAlias = Any
TensorIOMode: TypeAlias = Any


# How an execution context gets its scratch memory and its CUDA graphs. "strategy": the lane's
# memory, our graphs; "bare": the same as TensorRT 8.6 spells it; "config": TensorRT-RTX has its own
# graphs, which follow shapes and addresses, and then its own memory too.
Contexts = Literal["strategy", "bare", "config"]


@dataclass(frozen=True, slots=True)
class TensorRTVersion:
    """What one range of a module's versions can run, and how it is told."""

    backend: str
    module: str
    since: tuple[int, int]
    contexts: Contexts
    only_compatible: bool = False  # runs engines built with --version-compatible alone

    @property
    def captures(self) -> bool:
        """Whether CUDA graphs are ours to capture."""
        return self.contexts != "config"


LOADERS = (
    TensorRTVersion("tensorrt-rtx", "tensorrt_rtx", (1, 5), "config"),
    TensorRTVersion("tensorrt", "tensorrt", (10, 2), "strategy"),
    TensorRTVersion("tensorrt", "tensorrt", (8, 6), "bare"),
    TensorRTVersion("tensorrt", "tensorrt_lean", (10, 2), "strategy", only_compatible=True),
)
INSTALL = {
    "tensorrt": "pip install 'msn-export[tensorrt]'",
    "tensorrt-rtx": "pip install 'msn-export[rtx]'",
}
_PREVIEW = ((9, 0), (10, 2))  # 9.x was a preview for language models; 10.0 and 10.1 are untested


@dataclass(frozen=True, slots=True)
class LoadedTensorRT:
    """A module that was imported, with its row."""

    trt: TensorRT
    loader: TensorRTVersion
    version: str

    def __str__(self) -> str:
        lean = " (lean)" if self.loader.only_compatible else ""
        return f"{self.loader.backend}{lean} {self.version}"


def load(backend: str, *, compatible: bool) -> LoadedTensorRT:
    """Import what runs engines of ``backend``: the full module first, the lean one if it may.

    Only where a driver was found: without one, what follows ends the process.

    Args:
        backend: as the manifest names it.
        compatible: whether the engine was built with ``--version-compatible``.

    Raises:
        MissingPackageError: none is installed; the message has the line that does.
        RunnerError: the one that is installed does not import, or is of an unknown version.
    """
    modules = dict.fromkeys(
        row.module
        for row in LOADERS
        if row.backend == backend and compatible >= row.only_compatible
    )
    if not modules:
        raise RunnerError(f"engines of {backend!r} are not supported; {', '.join(INSTALL)} are")
    for module in modules:
        if importlib.util.find_spec(module) is not None:
            return _import(module)
    hint = " (or pip install tensorrt-lean, which is smaller)" if len(modules) > 1 else ""
    raise MissingPackageError(f"{backend} is not installed; {INSTALL[backend]}{hint}")


def row_for(module: str, version: str) -> TensorRTVersion | None:
    """Choose the row for a version of a module, or None where no row fits."""
    found = numbers(version)[:2]
    if len(found) < 2 or (module != "tensorrt_rtx" and _PREVIEW[0] <= found < _PREVIEW[1]):
        return None
    rows = [row for row in LOADERS if row.module == module and row.since <= found]
    return max(rows, key=lambda row: row.since, default=None)


def numbers(version: str) -> tuple[int, ...]:
    """Read the numbers a version begins with: ``10.16.1.11`` is (10, 16, 1, 11)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def may_run(loaded: LoadedTensorRT, built: str, *, compatible: bool) -> bool:
    """Tell whether an engine built with version ``built`` loads here.

    By default in that very version only; a version-compatible one in later ones, up to the next
    major version (docs.nvidia.com/deeplearning/tensorrt, Engine Compatibility).
    """
    here, there = numbers(loaded.version), numbers(built)
    shorter = min(len(here), len(there))
    if here[:shorter] == there[:shorter]:
        return shorter > 0
    next_major = 10 if there[:1] == (8,) else there[0] + 1 if there else 0
    return compatible and there < here and here[0] <= next_major


def _import(module: str) -> LoadedTensorRT:
    try:
        trt: TensorRT = importlib.import_module(module)
    except Exception as error:
        raise RunnerError(
            f"{module} is installed but does not import ({error}); see 'msn-export doctor'"
        ) from error
    loader = row_for(module, trt.__version__)
    if loader is None:
        raise RunnerError(f"{module} {trt.__version__} is not supported; see docs/runtime.md")
    return LoadedTensorRT(trt, loader, trt.__version__)
