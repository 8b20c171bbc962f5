"""The TensorRT classes this package touches, as names for annotations: the modules ship no types.

Convention: the module is a parameter called ``trt``; every object it gives is bound to a variable
annotated with one of these names. tests/test_bindings.py collects ``trt.X.y`` and each member used
on such a variable from the source and looks them up in the real 10.x and 11.x modules.
"""

from typing import Any, TypeAlias

TensorRT: TypeAlias = Any  # the module: tensorrt or tensorrt_rtx

Builder: TypeAlias = Any
EngineInspector: TypeAlias = Any
IAttention: TypeAlias = Any
IAttentionInputLayer: TypeAlias = Any
IBuilderConfig: TypeAlias = Any
ICudaEngine: TypeAlias = Any
IHostMemory: TypeAlias = Any
ILayer: TypeAlias = Any
ILogger: TypeAlias = Any
INetworkDefinition: TypeAlias = Any
IOptimizationProfile: TypeAlias = Any
IProgressMonitor: TypeAlias = Any
ITensor: TypeAlias = Any
ITimingCache: TypeAlias = Any
OnnxParser: TypeAlias = Any
ParserError: TypeAlias = Any
Runtime: TypeAlias = Any
