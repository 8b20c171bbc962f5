"""A deserialised engine: its tensors, its profiles, and the contexts that run it."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Any

from msn_export.errors import DeviceError, GraphError
from msn_export.runtime.dlpack import OF_ONNX, OF_TENSORRT
from msn_export.spec import BatchRange, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from msn_export.runtime.cuda import Handle
    from msn_export.runtime.versions import (
        DataType,
        ICudaEngine,
        IExecutionContext,
        ILogger,
        IRuntimeConfig,
        LoadedTensorRT,
        Runtime,
        TensorIOMode,
        TensorRT,
    )
    from msn_export.spec import TensorSpec


class Execution:
    """An execution context: the profile, shape and addresses it is set to, and a run of it.

    Args:
        context: TensorRT's.
        images: the input.
        name: what errors call it.
        heard: quotes TensorRT's errors.
    """

    def __init__(
        self, context: IExecutionContext, images: TensorSpec, name: str, heard: Callable[[], str]
    ) -> None:
        self._images, self._name, self._heard = images, name, heard
        self._context: IExecutionContext | None = context
        self._profile: int | None = None
        self._batch = 0

    def enqueue(
        self, profile: int, batch: int, addresses: Mapping[str, int], stream: Handle
    ) -> None:
        """Give a run to a stream.

        Args:
            profile: index of the profile.
            batch: images.
            addresses: of every input and output on the GPU.
            stream: all runs of a context go to one stream.
        """
        why = ""
        try:
            refused = self._enqueue(profile, batch, addresses, int(stream))
        except Exception as error:  # noqa: BLE001  pybind raises what it likes
            refused, why = "the run", " ".join(str(error).split())
        if refused:  # raised here, not inside: a traceback would keep the context alive
            raise DeviceError(f"{self._name} refuses {refused}: {why or self._heard()}")

    def _enqueue(self, profile: int, batch: int, addresses: Mapping[str, int], stream: int) -> str:
        """Give the run; what TensorRT refuses, or nothing."""
        context: IExecutionContext = self._context
        if profile != self._profile:
            self._profile, self._batch = None, 0
            if not context.set_optimization_profile_async(profile, stream):
                return f"profile {profile}"
            self._profile = profile
        if batch != self._batch:
            self._batch = 0
            shape = (batch, *self._images.shape[1:])
            if not context.set_input_shape(self._images.name, shape) or context.infer_shapes():
                return f"images of {list(shape)}"
            self._batch = batch
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                return f"the address of {name!r}"
        return "" if context.execute_async_v3(stream) else "the run"

    def close(self) -> None:
        """Free the context; its stream must have done what it was given."""
        self._context = None


_KEPT = 8  # of TensorRT's errors, for the message


class Engine:
    """An engine on the current GPU.

    Args:
        loaded: the module to load it with.
        plan: the engine's bytes, already checked against its manifest.
        file: what errors call it.
        compatible: whether it was built with ``--version-compatible``; such an engine brings
            code of the host, which is then allowed to run.
        eager_kernels: whether TensorRT-RTX compiles the kernels of a batch size before it first
            runs one, and not behind runs that use general ones.
    """

    def __init__(
        self,
        loaded: LoadedTensorRT,
        plan: bytes,
        file: str,
        *,
        compatible: bool,
        eager_kernels: bool = False,
    ) -> None:
        trt: TensorRT = loaded.trt
        self.loaded = loaded
        self.file = file
        self._eager_kernels = eager_kernels
        self._heard: deque[str] = deque(maxlen=_KEPT)
        self._log: ILogger = _make_log(trt, self._heard)  # the runtime does not keep it alive
        runtime: Runtime = trt.Runtime(self._log)
        if compatible and not loaded.row.only_compatible:
            runtime.engine_host_code_allowed = True
        engine: ICudaEngine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise DeviceError(f"{loaded} refuses {file}: {self.heard()}")
        self._runtime: Runtime | None = runtime
        self._engine: ICudaEngine | None = engine
        self.inputs, self.outputs = _tensors(engine, file)
        self.profiles = _profiles(engine, self.inputs[0])

    @property
    def input(self) -> TensorSpec:
        """The images."""
        return self.inputs[0]

    @property
    def scratch(self) -> int:
        """Bytes of the GPU that a context needs while it runs, whichever the profile."""
        engine: ICudaEngine = self._engine
        kind = self.loaded.row.contexts
        if kind == "config":
            return 0
        return int(
            engine.device_memory_size_v2 if kind == "strategy" else engine.device_memory_size
        )

    def context(self, scratch: Handle | None, *, graphs: bool) -> Execution:
        """Make a context; several may share ``scratch`` if they run one after the other.

        Args:
            scratch: memory of that many bytes, unless it is 0.
            graphs: whether TensorRT-RTX shall replay its own CUDA graphs.
        """
        why = ""
        try:
            context: IExecutionContext = self._make_context(scratch, graphs=graphs)
        except Exception as error:  # noqa: BLE001  pybind raises what it likes
            context, why = None, " ".join(str(error).split())
        if context is None:
            raise DeviceError(
                f"{self.loaded} makes no context for {self.file}: {why or self.heard()}"
            )
        return Execution(context, self.input, f"{self.loaded} on {self.file}", self.heard)

    def _make_context(self, scratch: Handle | None, *, graphs: bool) -> IExecutionContext:
        trt: TensorRT = self.loaded.trt
        engine: ICudaEngine = self._engine
        kind = self.loaded.row.contexts
        if kind == "config":
            config: IRuntimeConfig = engine.create_runtime_config()
            if config is None:
                return None
            if graphs:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            if self._eager_kernels:
                eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
                config.dynamic_shapes_kernel_specialization_strategy = eager
            return engine.create_execution_context(config)
        if kind == "strategy":
            strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context: IExecutionContext = engine.create_execution_context(strategy)
            if context is not None and scratch is not None:
                context.set_device_memory(int(scratch), self.scratch)
            return context
        bare: IExecutionContext = engine.create_execution_context_without_device_memory()
        if bare is not None and scratch is not None:
            bare.device_memory = int(scratch)
        return bare

    def heard(self) -> str:
        """Quote what TensorRT said of its errors since it was last asked."""
        quoted = "; ".join(self._heard)
        self._heard.clear()
        return quoted or "it does not say why"

    def close(self) -> None:
        """Free the engine; its contexts must be gone."""
        self._engine = None
        self._runtime = None


def row_bytes(spec: TensorSpec) -> int:
    """Size of one image's part of a tensor."""
    return OF_ONNX[spec.dtype].bytes * math.prod(int(size) for size in spec.shape[1:])


def _make_log(trt: TensorRT, heard: deque[str]) -> ILogger:
    class Log(trt.ILogger):  # type: ignore[misc]  # the modules have no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in {"ERROR", "INTERNAL_ERROR"}:
                heard.append(" ".join(msg.split()))

    return Log()


def _tensors(
    engine: ICudaEngine, file: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs: list[TensorSpec] = []
    outputs: list[TensorSpec] = []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        dtype: DataType = engine.get_tensor_dtype(name)
        mode: TensorIOMode = engine.get_tensor_mode(name)
        element = OF_TENSORRT.get(dtype.name)
        batch, *sizes = tuple(engine.get_tensor_shape(name)) or (0,)
        if element is None or -1 in sizes:
            raise GraphError(
                f"{file}: tensor {name!r} is {dtype.name} {[batch, *sizes]}; expected a plain "
                "dtype and a batch as the only dynamic size"
            )
        spec = TensorSpec(name, element.onnx, ("batch" if batch == -1 else batch, *sizes))
        (inputs if mode.name == "INPUT" else outputs).append(spec)
    if len(inputs) != 1 or not outputs:
        names = ", ".join(repr(spec.name) for spec in inputs) or "nothing"
        raise GraphError(f"{file} takes {names}; expected one image input")
    return tuple(inputs), tuple(outputs)


def _profiles(engine: ICudaEngine, images: TensorSpec) -> tuple[BatchRange, ...]:
    fixed = images.shape[0]
    if isinstance(fixed, int):
        return (BatchRange(fixed, fixed, fixed),)
    shapes = (
        engine.get_tensor_profile_shape(images.name, index)
        for index in range(engine.num_optimization_profiles)
    )
    return tuple(BatchRange(*(int(shape[0]) for shape in three)) for three in shapes)
