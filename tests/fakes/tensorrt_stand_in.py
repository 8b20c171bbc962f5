"""A stand-in for the TensorRT modules, over ``cuda_stand_in``: no engine runs without a device.

An engine is a small JSON document behind the header that TensorRT writes; what it computes is
``networks.compute``. It keeps TensorRT's rules: a profile, a shape inside it and every address
before a run, scratch memory that no two streams share, a context untouched once it was captured.
tests/runtime/test_tensorrt_bindings.py checks its members against the real modules.
"""

import json
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Any

import numpy as np

from msn_export.runtime.dlpack import OF_ONNX
from tests.builders.networks import Network, compute
from tests.fakes.cuda_stand_in import CudaStandIn

SCRATCH = 1024
HEADER = 64


def plan_of(network: Network, version: str = "11.4.0.106") -> bytes:
    """Write an engine of full TensorRT as its header and the stand-in know it."""
    numbers = bytes(int(part) for part in version.split("."))
    header = b"ftrt" + bytes(20) + numbers
    return header.ljust(HEADER, b"\0") + json.dumps(network.to_json()).encode()


class Severity(IntEnum):
    INTERNAL_ERROR = 0


class _Named(Enum):
    FLOAT = "float"
    HALF = "float16"
    BF16 = "bfloat16"
    UINT8 = "uint8"
    INT64 = "int64"
    INPUT = "input"
    OUTPUT = "output"


class ILogger:
    Severity = Severity
    INTERNAL_ERROR = Severity.INTERNAL_ERROR


class Logger(ILogger):
    def __init__(self, min_severity: Severity) -> None:
        self.min_severity = min_severity


class IErrorRecorder:
    """What a program derives its own from."""


class ErrorCodeTRT(Enum):
    UNSPECIFIED_ERROR = 1
    INVALID_ARGUMENT = 3


class ExecutionContextAllocationStrategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


class CudaGraphStrategy(Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class DynamicShapesKernelSpecializationStrategy(Enum):
    LAZY = 0
    EAGER = 1


class IRuntimeCache:
    """Batches whose kernels are compiled. It wants a current GPU, and takes that GPU's alone."""

    def __init__(self, cuda: CudaStandIn) -> None:
        self._cuda = cuda
        self._batches: set[int] = set()

    def serialize(self) -> bytes | None:
        if not self._cuda._stack:
            self._cuda._problems.append("a runtime cache is serialised without a GPU")
            return None
        return json.dumps([self._cuda._fingerprint, sorted(self._batches)]).encode()

    def deserialize(self, blob: bytes) -> bool:
        try:
            fingerprint, batches = json.loads(blob)
        except ValueError:
            return False
        if not self._cuda._stack or fingerprint != self._cuda._fingerprint:
            return False
        self._batches |= set(batches)
        return True


class IRuntimeConfig:
    cuda_graph_strategy = CudaGraphStrategy.DISABLED
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
    _cache: IRuntimeCache | None = None
    _cuda: Any = None

    def create_runtime_cache(self) -> IRuntimeCache | None:
        return IRuntimeCache(self._cuda)

    def set_runtime_cache(self, cache: IRuntimeCache | None = None) -> bool:
        self._cache = cache
        return True


class _State:
    """What outlives a context while a stream still has its work."""

    def __init__(self) -> None:
        self.pending = self.changes = 0
        self.is_alive = True


class _Context:
    """What every TensorRT's IExecutionContext has."""

    def __init__(self, engine: "_Engine") -> None:
        self._engine = engine
        self.error_recorder = engine._recorder
        self._profile: int | None = None
        self._batch: int | None = None
        self._addresses: dict[str, int] = {}
        self._scratch: int | None = None
        self._cache: Any = None
        self._own: set[int | None] = set()
        self._state = state = _State()
        cuda = engine._cuda

        def gone() -> None:
            state.is_alive = False
            if state.pending:
                cuda._problems.append("a context goes while its work is waiting")

        weakref.finalize(self, gone).atexit = False

    def _compile(self) -> None:
        """Compile the kernels of this batch, where TensorRT does so at run time."""
        compiled = self._own if self._cache is None else self._cache._batches
        if self._engine._compiles and self._batch not in compiled:
            self._engine._cuda._compiled += 1
            compiled.add(self._batch)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self._engine._network.profiles):
            return self._engine._refuse(f"profile {profile_index} does not exist")
        self._state.changes += 1
        self._profile, self._batch = profile_index, None
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        network = self._engine._network
        if self._profile is None:
            return self._engine._refuse("no profile is set")
        low, _, high = network.profiles[self._profile]
        if name != network.input or shape[1:] != network.sizes or not low <= shape[0] <= high:
            return self._engine._refuse(f"shape {shape} is outside profile {self._profile}")
        self._state.changes += 1
        self._batch = shape[0]
        return True

    def infer_shapes(self) -> list[str]:
        return [] if self._batch is not None else [self._engine._network.input]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._names or memory % 256:
            return self._engine._refuse(f"address {memory:#x} of {name}")
        if self._addresses.get(name) != memory:
            self._state.changes += 1
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine, cuda, state = self._engine, self._engine._cuda, self._state
        self._compile()
        if self._batch is None or set(self._addresses) != set(engine._names):
            return engine._refuse("shapes or addresses are missing")
        if self._scratch is None and engine._needs_scratch:
            return engine._refuse("there is no scratch memory")
        batch, addresses, scratch = self._batch, dict(self._addresses), self._scratch
        changes = state.changes
        is_captured = cuda._streams[int(stream_handle)].captured is not None

        def work() -> None:
            state.pending -= not is_captured
            if is_captured and (not state.is_alive or state.changes != changes):
                cuda._problems.append("a graph runs whose context was changed or freed")
            if scratch is not None:
                cuda._at(scratch, SCRATCH)
            engine._run(batch, addresses)

        state.pending += not is_captured
        if scratch is not None:
            memory = cuda._memory[scratch]
            memory.used_by = memory.used_by or int(stream_handle)
            if memory.used_by != int(stream_handle):
                cuda._problems.append("two streams share scratch memory")
        cuda._enqueue(stream_handle, work)
        return True


class _Engine:
    """What every TensorRT's ICudaEngine has."""

    _needs_scratch = True
    _compiles = False

    def __init__(self, cuda: CudaStandIn, recorder: Any, network: Network, run: Any = None) -> None:
        self._cuda, self._recorder, self._network = cuda, recorder, network
        self._compute: Callable[..., Any] = run or compute
        self._names = [network.input, *(name for name, _, _ in network.outputs)]

    @property
    def num_io_tensors(self) -> int:
        return len(self._names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._network.profiles)

    def get_tensor_name(self, index: int) -> str:
        return self._names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return _Named.INPUT if name == self._network.input else _Named.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return _Named(self._network.dtype_of(name))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch = self._network.profiles[0][0] if self._network.is_static else -1
        return (batch, *self._network.sizes_of(name))

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
        sizes = self._network.sizes_of(name)
        return [(batch, *sizes) for batch in self._network.profiles[profile_index]]

    def _refuse(self, why: str) -> bool:
        self._recorder.report_error(ErrorCodeTRT.INVALID_ARGUMENT, f"stand-in: {why}")
        return False

    def _run(self, batch: int, addresses: dict[str, int]) -> None:
        """Compute from and to memory of the GPU; whatever lies there."""

        def at(name: str) -> np.ndarray[Any, Any]:
            storage = OF_ONNX[self._network.dtype_of(name)].storage
            shape = (batch, *self._network.sizes_of(name))
            size = storage.itemsize * int(np.prod(shape))
            return self._cuda._at(addresses[name], size).view(storage).reshape(shape)

        with np.errstate(all="ignore"):
            outputs = self._compute(self._network, at(self._network.input))
        for name, values in outputs.items():
            at(name)[...] = values


class _StrategyContext(_Context):
    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= SCRATCH
        self._scratch = memory


class _StrategyEngine(_Engine):
    device_memory_size_v2 = SCRATCH

    def create_execution_context(self, strategy: Any) -> _Context:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return _StrategyContext(self)


class _BareContext(_Context):
    def _set_scratch(self, memory: int) -> None:
        self._scratch = memory

    device_memory = property(None, _set_scratch)


class _BareEngine(_Engine):
    device_memory_size = SCRATCH

    def create_execution_context_without_device_memory(self) -> _Context:
        return _BareContext(self)


class _ConfigEngine(_Engine):
    _needs_scratch = False
    _compiles = True

    def create_runtime_config(self) -> IRuntimeConfig:
        config = IRuntimeConfig()
        config._cuda = self._cuda
        return config

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> _Context:
        assert isinstance(runtime_config, IRuntimeConfig)
        self._cuda._configs.append(runtime_config)
        context = _Context(self)
        context._cache = runtime_config._cache
        return context


class Runtime:
    engine_host_code_allowed = False
    error_recorder: Any = None
    _home: Any = None  # set by tensorrt_stand_in

    def __init__(self, logger: Any) -> None:
        assert isinstance(logger, Logger)  # one of Python's takes its lock in every thread

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> _Engine | None:
        cuda, kind, network, run = self._home
        if not cuda._stack:
            cuda._problems.append("an engine is loaded without a GPU")
        if network is None:
            try:
                network = Network.from_json(json.loads(serialized_engine[HEADER:]))
            except ValueError:
                why = "stand-in: Magic tag does not match"
                self.error_recorder.report_error(ErrorCodeTRT.UNSPECIFIED_ERROR, why)
                return None
        engine: _Engine = kind(cuda, self.error_recorder, network, run)
        return engine


COMMON = (ILogger, Logger, IErrorRecorder, ErrorCodeTRT)  # in every module


@dataclass(frozen=True)
class Row:
    """A row of the loaders' table: its version, and the classes as it has them."""

    version: str
    engine: type[_Engine]
    context: type[_Context]
    names: tuple[type, ...]


ROWS = {
    "strategy": Row(
        "11.4.0.106", _StrategyEngine, _StrategyContext, (ExecutionContextAllocationStrategy,)
    ),
    "bare": Row("8.6.0", _BareEngine, _BareContext, ()),
    "config": Row(
        "1.7.1.116",
        _ConfigEngine,
        _Context,
        (CudaGraphStrategy, DynamicShapesKernelSpecializationStrategy),
    ),
}


def tensorrt_stand_in(
    cuda: CudaStandIn, contexts: str, network: Network | None = None, run: Any = None
) -> types.ModuleType:
    """Make a module as one row of the loaders' table has it.

    Args:
        cuda: the device.
        contexts: the row's way of making contexts.
        network: what every engine is, whatever its bytes; None reads the stand-in's own plans.
        run: what computes instead of ``networks.compute``.
    """
    row = ROWS[contexts]
    module = types.ModuleType("tensorrt_stand_in_module")
    home = (cuda, row.engine, network, run)
    names = {kind.__name__: kind for kind in (*COMMON, *row.names)}
    runtime = type("Runtime", (Runtime,), {"_home": home})
    vars(module).update(names, Runtime=runtime, __version__=row.version)
    return module
