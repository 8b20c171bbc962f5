"""Engines: a file that was verified, the engine it holds on a GPU, and contexts that run it."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from msn_export import manifest as manifests
from msn_export.engine_header import EngineHeader, may_target, parse_header, tries_any_gpu
from msn_export.errors import DeviceError, GraphError, ManifestError
from msn_export.host import Device
from msn_export.input_files import ENGINE, read_bytes
from msn_export.manifest import EngineRecord, Manifest, manifest_path
from msn_export.runtime.cuda import Handle
from msn_export.runtime.dlpack import OF_ONNX, OF_TENSORRT
from msn_export.runtime.log import EngineErrors, logger_of
from msn_export.runtime.runtime_cache import RuntimeCache
from msn_export.runtime.versions import (
    DataType,
    ICudaEngine,
    IExecutionContext,
    IRuntimeConfig,
    LoadedTensorRT,
    Runtime,
    TensorIOMode,
    TensorRT,
)
from msn_export.spec import BatchRange, ComputeCapability, Targets, TensorSpec


@dataclass(frozen=True, slots=True)
class VerifiedEngine:
    """An engine that is what its manifest says, or is trusted without one."""

    path: Path
    content: bytes
    header: EngineHeader
    manifest: Manifest | None

    @property
    def record(self) -> EngineRecord | None:
        return self.manifest.engine if self.manifest is not None else None

    @property
    def compatible(self) -> bool:
        """True where it was built to load in later versions of TensorRT too."""
        return self.record is not None and bool(self.record.options.get("version_compatible"))

    @property
    def sha256(self) -> str:
        """The manifest's hash, which ``manifest.read`` compared, or else the file's."""
        described = self.manifest.sha256 if self.manifest is not None else ""
        return described or hashlib.sha256(self.content).hexdigest()

    @property
    def version(self) -> str:
        return self.record.version if self.record is not None else self.header.version

    @property
    def targets(self) -> Targets:
        """The GPU generations it is for; none where neither file nor manifest tells."""
        if self.header.targets or self.record is None:
            return self.header.targets
        return self.record.targets

    def is_for(self, device: Device) -> bool:
        if not self.targets or device.capability in self.targets:
            return True
        # one that names no target: its kernels are made on the GPU
        late = self.targets.later and device.capability > min(self.targets.named)
        return late and tries_any_gpu()

    def __str__(self) -> str:
        gpus = f" for {self.targets}" if self.targets else ""
        return f"{self.header.backend} {self.version}{gpus}"


def verify_engine_file(path: Path, *, trust: bool) -> VerifiedEngine:
    content = read_bytes(path, ENGINE)
    manifest = manifests.read(path, content)
    if manifest is None and not trust:
        raise ManifestError(
            f"engine {path} has no manifest ({manifest_path(path).name} is missing), and loading "
            "an engine runs what is in it; copy the manifest that 'msn-export trt' wrote, or pass "
            "trust=True if you know where the engine comes from"
        )
    if manifest is not None and (manifest.kind != "engine" or manifest.engine is None):
        raise ManifestError(f"{manifest_path(path)} describes no engine; export {path} again")
    header = parse_header(content, path)
    record = manifest.engine if manifest is not None else None
    if record is not None and record.backend != header.backend:
        raise ManifestError(
            f"{path} is an engine of {header.backend}, and its manifest says {record.backend}; "
            f"{rebuild(manifest)}"
        )
    return VerifiedEngine(path, content, header, manifest)


def rebuild(manifest: Manifest | None, capability: ComputeCapability | None = None) -> str:
    """Command that builds an engine for this machine, from what the manifest says."""
    if manifest is None or manifest.engine is None or manifest.source is None:
        return "build it again here with: msn-export trt MODEL.onnx"
    backend, targeted = manifest.engine.backend, manifest.engine.backend == "tensorrt-rtx"
    if targeted and capability is not None and not may_target(capability):
        # a data-centre GPU: no engine of TensorRT-RTX is for it
        backend, targeted = "tensorrt", False
    words = ["msn-export trt", shlex.quote(manifest.source.file)]
    if not manifest.dtype.is_quantised:  # the graph is, and says so
        words.append(f"--{manifest.dtype}")
    words += ["--backend", shlex.quote(backend)]
    if targeted and capability is not None:
        words += ["--compute-capability", str(capability)]
    for profile in manifest.profiles:
        words += ["--batch", str(profile)]
    for name, value in manifest.engine.options.items():
        # text of a stranger's manifest is not to become another command
        if name.isidentifier() and isinstance(value, int) and value is not False:
            words.append(f"--{name.replace('_', '-')}")
            words += [] if value is True else [str(value)]
    return "rebuild it with: " + " ".join([*words, "--force"])


class Execution:
    """An execution context: the profile, shape and addresses it is set to, and a run of it."""

    def __init__(
        self,
        context: IExecutionContext,
        images: TensorSpec,
        name: str,
        quote_errors: Callable[[], str],
    ) -> None:
        self._images, self._name, self._quote_errors = images, name, quote_errors
        self._context: IExecutionContext | None = context
        self._profile: int | None = None
        self._batch = 0

    def enqueue(
        self, profile: int, batch: int, addresses: Mapping[str, int], stream: Handle
    ) -> None:
        """Give a run to a stream; all runs of a context go to one stream."""
        why = ""
        try:
            refused = self._enqueue(profile, batch, addresses, int(stream))
        except Exception as error:  # noqa: BLE001  pybind raises what it likes
            refused, why = "the run", " ".join(str(error).split())
        if refused:  # raised here, not inside: a traceback would keep the context alive
            raise DeviceError(f"{self._name} refuses {refused}: {why or self._quote_errors()}")

    def _enqueue(self, profile: int, batch: int, addresses: Mapping[str, int], stream: int) -> str:
        """Give the run; return what TensorRT refuses, or nothing."""
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
        context: IExecutionContext = self._context
        if context is not None:
            # a report would wait for Python's lock, which the destructor holds while it may wait
            # for the thread that reports
            context.error_recorder = None
        self._context = None


class Engine:
    """An engine on the current GPU; ``plan`` was checked against its manifest.

    One built with ``--version-compatible`` (``compatible``) brings code of the host, which is then
    allowed to run. With ``eager_kernels`` TensorRT-RTX compiles the kernels of a batch size before
    it first runs one, and not behind runs that use general ones. ``cache`` keeps its kernels.
    """

    def __init__(
        self,
        loaded: LoadedTensorRT,
        plan: bytes,
        file: str,
        *,
        compatible: bool,
        eager_kernels: bool = False,
        cache: RuntimeCache | None = None,
    ) -> None:
        trt: TensorRT = loaded.trt
        self.loaded = loaded
        self.file = file
        self.cache = cache
        self._eager_kernels = eager_kernels
        self._errors = EngineErrors(trt)
        runtime: Runtime = trt.Runtime(logger_of(trt))
        runtime.error_recorder = self._errors.recorder
        if compatible:  # in every runtime, as trtexec (NVIDIA/TensorRT samples/common)
            runtime.engine_host_code_allowed = True
        engine: ICudaEngine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise DeviceError(f"{loaded} refuses {file}: {self._errors.quote()}")
        self._runtime: Runtime | None = runtime
        self._engine: ICudaEngine | None = engine
        self.inputs, self.outputs = _tensors(engine, file)
        self.profiles = _profiles(engine, self.inputs[0])

    @property
    def input(self) -> TensorSpec:
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

        ``graphs`` lets TensorRT-RTX replay its own CUDA graphs.
        """
        why = ""
        try:
            context: IExecutionContext = self._make_context(scratch, graphs=graphs)
        except Exception as error:  # noqa: BLE001  pybind raises what it likes
            context, why = None, " ".join(str(error).split())
        if context is None:
            raise DeviceError(
                f"{self.loaded} makes no context for {self.file}: {why or self._errors.quote()}"
            )
        return Execution(context, self.input, f"{self.loaded} on {self.file}", self._errors.quote)

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
            if self.cache is not None:
                self.cache.attach(config)
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

    def close(self) -> None:
        """Free the engine; its contexts must be gone."""
        if self.cache is not None:
            self.cache.store()
            self.cache.close()
        self._engine = None
        self._runtime = None


def row_bytes(spec: TensorSpec) -> int:
    return OF_ONNX[spec.dtype].bytes * math.prod(int(size) for size in spec.shape[1:])


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
