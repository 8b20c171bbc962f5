"""The classes of TensorRT and CUDA that running an engine touches, as names for annotations.

The convention of ``msn_export.engine.bindings``, with two additions: the CUDA driver API
(``cuda.bindings.driver``) is a variable annotated ``CudaDriver``, and an attribute that a class
annotates counts like a variable. tests/test_runtime_bindings.py looks every name up.
"""

from typing import Any, TypeAlias

TensorRT: TypeAlias = Any  # the module: tensorrt, tensorrt_lean or tensorrt_rtx
CudaDriver: TypeAlias = Any  # the module cuda.bindings.driver

DataType: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IExecutionContext: TypeAlias = Any
ILogger: TypeAlias = Any
IRuntimeConfig: TypeAlias = Any
Runtime: TypeAlias = Any
TensorIOMode: TypeAlias = Any
