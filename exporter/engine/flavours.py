"""One row a TensorRT flavour: all that differs between them.

Nothing elsewhere asks for a version. A row is chosen by module and version; the compiler follows
its fields. Facts: measured on the real modules (tests/test_bindings.py) and, for TensorRT-RTX, on
its builds.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
