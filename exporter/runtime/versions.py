"""One row a TensorRT: all that differs between them, for compiling and for running engines.

Nothing elsewhere asks for a version: a row is chosen by module and version, and the compiler and
the runtime follow its fields. Facts: the members of the real modules (test_build_bindings.py and
test_tensorrt_bindings.py), TensorRT-RTX's builds, and NVIDIA's documentation of engine
compatibility.

The convention of ``msn_export.engine.compile``, with two additions: the CUDA driver API
(``cuda.bindings.driver``) is a variable annotated ``CudaDriver``, and an attribute that a class
annotates counts like a variable. tests/runtime/test_tensorrt_bindings.py looks every name up.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from msn_export.errors import MissingPackageError, RunnerError
from msn_export.version_table import numbers

TensorRT: TypeAlias = Any  # the module: tensorrt, tensorrt_lean or tensorrt_rtx
CudaDriver: TypeAlias = Any  # the module cuda.bindings.driver

DataType: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IErrorRecorder: TypeAlias = Any
IExecutionContext: TypeAlias = Any
IHostMemory: TypeAlias = Any
ILogger: TypeAlias = Any
IRuntimeCache: TypeAlias = Any
IRuntimeConfig: TypeAlias = Any
Runtime: TypeAlias = Any
TensorIOMode: TypeAlias = Any


# How an execution context gets its scratch memory and its CUDA graphs. "strategy": the slot's
# memory, our graphs; "bare": the same as TensorRT 8.6 spells it; "config": TensorRT-RTX has its own
# graphs, which follow shapes and addresses, and then its own memory too.
Contexts = Literal["strategy", "bare", "config"]


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


@dataclass(frozen=True, slots=True)
class TensorRTVersion:
    """Differences of one range of a module's versions.

    ``since`` is the first version of the row, ``lacks`` the names the compiler's code uses that the
    row's modules do not have (each guarded by a field here), ``ignored`` and ``refused`` the
    options of a build that do nothing or cannot be had, with the reason. ``contexts`` is None where
    engines are not run.
    """

    backend: Literal["tensorrt", "tensorrt-rtx"]
    module: str
    since: tuple[int, int]
    contexts: Contexts | None
    only_compatible: bool = False  # the lean runtime: runs --version-compatible engines alone
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
        return "STRONGLY_TYPED" in self.network_flags

    @property
    def captures(self) -> bool:
        """True where CUDA graphs are ours to capture."""
        return self.contexts != "config"


_RTX_IGNORES = "TensorRT-RTX accepts it and does nothing: it chooses its kernels on the user's GPU"
_RTX_PORTABLE = "without --compute-capability its engines are for any GPU from Ampere on"
_TENSORRT = TensorRTVersion(
    "tensorrt",
    "tensorrt",
    (10, 14),
    "strategy",
    refused={
        "capabilities": (
            "TensorRT compiles for the GPU it runs on; --backend tensorrt-rtx takes a target"
        )
    },
    lacks=_TARGETS,
)
_TENSORRT_10 = replace(
    _TENSORRT, since=(10, 2), opset=20, has_attention=False, lacks=_TARGETS | _ATTENTION
)
# Of one backend the full module stands first: it compiles, and is the first choice to run.
VERSIONS = (
    TensorRTVersion(
        "tensorrt-rtx",
        "tensorrt_rtx",
        (1, 5),
        "config",
        builds_without_gpu=True,
        targets_capabilities=True,
        kernels_from="log",
        ignored={"optimization_level": _RTX_IGNORES, "timing_cache": _RTX_IGNORES},
        refused={
            "version_compatible": "TensorRT-RTX ships without the lean runtime it needs",
            "hardware_compatible": _RTX_PORTABLE,
        },
    ),
    _TENSORRT,
    _TENSORRT_10,
    replace(_TENSORRT_10, since=(10, 0), contexts=None),  # running 10.0 and 10.1 is untested
    replace(
        _TENSORRT_10,
        since=(8, 6),
        contexts="bare",
        opset=17,
        network_flags=("EXPLICIT_BATCH",),
        precision_flags={"HALF": "FP16", "INT8": "INT8"},
        # several contexts run one profile at the same time; from 10 on they always may
        preview_features=("PROFILE_SHARING_0806",),
        reports_progress=False,
        lacks=_TARGETS | _ATTENTION | _MONITOR,
    ),
    TensorRTVersion("tensorrt", "tensorrt_lean", (10, 2), "strategy", only_compatible=True),
)
INSTALL = {
    "tensorrt": "pip install 'msn-export[tensorrt]'",
    "tensorrt-rtx": "pip install 'msn-export[rtx]'",
}
_PREVIEW = ((9, 0), (10, 0))  # 9.x was a preview for language models


@dataclass(frozen=True, slots=True)
class LoadedTensorRT:
    trt: TensorRT
    row: TensorRTVersion
    version: str

    def __str__(self) -> str:
        lean = " (lean)" if self.row.only_compatible else ""
        return f"{self.row.backend}{lean} {self.version}"


def load(backend: str, *, compatible: bool) -> LoadedTensorRT:
    """Import a module that runs engines of ``backend``: the full one, else the lean one.

    The lean one only for ``compatible`` engines, built with ``--version-compatible``. Only where a
    driver was found: without one, what follows ends the process.
    """
    modules = dict.fromkeys(
        row.module
        for row in VERSIONS
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
    found = numbers(version)[:2]
    if len(found) < 2 or (module == "tensorrt" and _PREVIEW[0] <= found < _PREVIEW[1]):
        return None
    rows = [row for row in VERSIONS if row.module == module and row.since <= found]
    return max(rows, key=lambda row: row.since, default=None)


def may_run(loaded: LoadedTensorRT, built: str, *, compatible: bool) -> bool:
    """True where an engine built with version ``built`` loads in ``loaded``.

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
    row = row_for(module, trt.__version__)
    if row is None or row.contexts is None:
        raise RunnerError(f"{module} {trt.__version__} is not supported; see docs/runtime.md")
    return LoadedTensorRT(trt, row, trt.__version__)
