"""ViT-MSN from a PyTorch checkpoint to a proven ONNX graph and TensorRT engine.

A function for each command, ``load`` for a file that was exported, and the jobs, whose fields are
the options. Each is loaded when it is first asked for: this import takes no time.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would take half of the time that this import takes
if TYPE_CHECKING:
    from typing import Any

    from msn_export.api import (
        BenchJob,
        CalibrateJob,
        DriftJob,
        EmbedJob,
        EvaluateJob,
        Exported,
        FitJob,
        HubJob,
        OnnxJob,
        ReportJob,
        SearchJob,
        TritonJob,
        TrtJob,
        ValidateJob,
        bench,
        calibrate,
        compile,
        doctor,
        drift,
        embed,
        evaluate,
        export,
        fit,
        hub,
        inspect,
        load,
        report,
        search,
        triton,
        validate,
    )

__version__ = "0.1.0"
__all__ = [
    "BenchJob", "CalibrateJob", "DriftJob", "EmbedJob", "EvaluateJob", "Exported", "FitJob",
    "HubJob", "OnnxJob", "ReportJob", "SearchJob", "TritonJob", "TrtJob", "ValidateJob", "bench",
    "calibrate", "compile", "doctor", "drift", "embed", "evaluate", "export", "fit", "hub",
    "inspect", "load", "report", "search", "triton", "validate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "load":  # without what the commands need
        from msn_export.runtime.opening import open_runner

        return open_runner
    if name not in __all__:
        raise AttributeError(f"module 'msn_export' has no attribute {name!r}")
    from msn_export import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
