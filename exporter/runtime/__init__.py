"""Run what was exported: ``open_runner("model.onnx")`` or ``open_runner("model.engine")``.

Importing this loads NumPy and the standard library. onnxruntime, TensorRT and CUDA's bindings are
loaded when a runner is opened, Pillow when pictures are preprocessed.
"""

from msn_export.errors import DeviceError, InputError, RunnerError
from msn_export.runtime.opening import open_runner
from msn_export.runtime.runner import Outputs, Runner

__all__ = [
    "DeviceError",
    "InputError",
    "Outputs",
    "Runner",
    "RunnerError",
    "open_runner",
]
