"""An ONNX file compiled to a serialised engine, in TensorRT's own calls, in the child process.

Convention: the module is a parameter called ``trt``; every object it gives is bound to a variable
annotated with one of these names. tests/engine/test_build_bindings.py collects ``trt.X.y`` and each
member used on such a variable from the source and looks them up in the real 10.x and 11.x modules.
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from msn_export.engine.kernels import Kernel, read_inspector, read_log, with_accumulators
from msn_export.engine.options import BuildSpec, no_kernels, require_capable
from msn_export.errors import BuildError, OutputError
from msn_export.files import cache_folder, locked, write_whole
from msn_export.input_files import TIMING_CACHE, read_bytes
from msn_export.runtime.versions import (
    ICudaEngine,
    IHostMemory,
    ILogger,
    Runtime,
    TensorRT,
    TensorRTVersion,
)
from msn_export.spec import BatchRange, ComputeCapability, Dtype

# Errors of the builder and the parser, and what they mean to the user. The texts are those of
# TensorRT 8.6 to 11.4 and TensorRT-RTX 1.5 to 1.7; tests/engine/test_build.py provokes each that
# can be had without a GPU. The first pattern found wins: the particular before the general.
# cudaError 35 comes last because TensorRT-RTX appends it to other errors where there is no GPU.
_MEANINGS = {
    r"Attention operation was not supported by a dedicated kernel": (
        "TensorRT has no fused kernel for this graph's Attention operator (it has them for fp16 "
        "and bf16, head sizes 16 to 256; for a single query only where heads x smallest batch is "
        "4 or more); build an fp16 graph, or --allow-unfused takes it apart"
    ),
    (
        r"Cannot compile for target\(s\) (?P<target>[\w, ]+), because the model contains "
        r"HW-specific datatypes: (?P<dtype>\w+)"
    ): "{target} cannot compute in {dtype} (fp8 takes --compute-capability 8.9 or later, fp4 12.0)",
    r"FP32 GEMM is not supported": (
        "compute capability 7.5 has no fp32 matrix products in TensorRT-RTX; build an fp16 graph, "
        "or for a later GPU"
    ),
    r"Non-zero zero point is not supported": (
        "the graph is quantised with zero points other than 0, which TensorRT does not support; "
        "quantise symmetrically, as msn-export calibrate does"
    ),
    r"no optimization profile has been defined": (
        "the graph has a dynamic input that no profile covers; give a --batch"
    ),
    r"static dimensions that don't match (?P<which>kM\w+|kOPT) dimensions": (
        "a --batch lies outside the graph's fixed shape; export the graph with a dynamic batch"
    ),
    r"Version tag does not match|serialized engine.*different version": (
        "the engine was built by another version of TensorRT; build it again here"
    ),
    r"Plugin not found|No importer (?:is )?registered for op|Unsupported ONNX opera": (
        "TensorRT has no importer for this operator; if onnxruntime optimised the graph "
        "(com.microsoft operators), export it again without that"
    ),
    # .*: it says so twice
    r".*Failed to import initializer: (?P<name>[^\n]+)$": (
        "the weight {name!r} cannot be read; is the graph's external data file beside it?"
    ),
    r"ParseFromCodedStream|Failed to parse the ONNX model": (
        "it is not an ONNX file, or a truncated one; export it again"
    ),
    r"Network must have at least one output": "it holds no graph with an output; export it again",
    r"must have same input types\. But they are of types (?P<a>\w+) and (?P<b>\w+)": (
        "it mixes {a} and {b} operands without a Cast; type the graph as a whole, as "
        "msn-export onnx --dtype does"
    ),
    r"within workspace limit|[Ii]nsufficient workspace": (
        "no kernel fits into --workspace; raise it or leave it out"
    ),
    r"Unable to load library: (?P<library>\S+?):": (
        "a library that this build needs is missing: {library}"
    ),
    r"(?i)out of memory|bad_alloc|OutOfMemory": (
        "there is not enough memory; lower --batch or --workspace, or build on a larger machine"
    ),
    r"Unsupported SM|SM \d+ is not supported|does not support (?:this|the) (?:GPU|device)": (
        "this TensorRT does not support the GPU it was to compile for"
    ),
    r"cudaError 35|CUDA driver version is insufficient|no CUDA-capable device": (
        "it needs an NVIDIA driver, and there is none here; TensorRT-RTX compiles without one "
        "(--backend tensorrt-rtx)"
    ),
}


# What TensorRT-RTX logs beside any other error where there is no GPU
_NO_DRIVER = re.compile(r"cudaError 35|CUDA driver version is insufficient")
_PLACE = re.compile(r"\s*\(?In \w+ at \S+:\d+\)?|^\[\S+\]\s*")  # in TensorRT's own sources
_LONGEST = 300  # characters


def explain(raw: str) -> str | None:
    for pattern, meaning in _MEANINGS.items():
        match = re.search(pattern, raw)
        if match:
            return meaning.format(**match.groupdict())
    return None


def explain_or_quote(raw: Sequence[str]) -> str:
    """Quote TensorRT's own reason, after its meaning where that is known.

    The reason is the first line that is not about a missing driver, unless there is no other.
    """
    lines = [" ".join(line.split()) for text in raw for line in text.splitlines() if line.strip()]
    if not lines:
        return "TensorRT gave no reason; --log FILE keeps all it said"
    relevant = [line for line in lines if not _NO_DRIVER.search(line)] or lines
    meaning = explain("\n".join(relevant))
    explained = [line for line in relevant if explain(line)] if meaning else []
    reason = _PLACE.sub("", (explained or _reasons(relevant))[0])[:_LONGEST].rstrip(" .")
    quoted = f"TensorRT says: {reason}"
    return quoted if meaning is None else f"{meaning} ({quoted})"


def _reasons(lines: Sequence[str]) -> Sequence[str]:
    """Prefer the lines with an error code: others say where in the graph, which is known."""
    return [line for line in lines if "Error Code" in line] or lines


Builder: TypeAlias = Any
EngineInspector: TypeAlias = Any
IAttention: TypeAlias = Any
IAttentionInputLayer: TypeAlias = Any
IBuilderConfig: TypeAlias = Any
ILayer: TypeAlias = Any
INetworkDefinition: TypeAlias = Any
IOptimizationProfile: TypeAlias = Any
IProgressMonitor: TypeAlias = Any
ITensor: TypeAlias = Any
ITimingCache: TypeAlias = Any
OnnxParser: TypeAlias = Any
ParserError: TypeAlias = Any


_ERRORS = frozenset({"ERROR", "INTERNAL_ERROR"})
_RECORDS = "Layers:"  # first line of the message that lists the kernels


@dataclass(slots=True)
class BuilderLog:
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    records: list[str] = field(default_factory=list)


_LOGGERS: dict[Any, ILogger] = {}  # by the module's class


def make_log(trt: TensorRT, builder_log: BuilderLog, raw: TextIO) -> ILogger:
    """Make a logger at VERBOSE, or direct the one there is at another build.

    TensorRT keeps the first logger of a process for ever, whatever later builders are given.
    """
    logger = _LOGGERS.get(trt.ILogger)
    if logger is None:
        logger = _LOGGERS[trt.ILogger] = _new_logger(trt)
    logger.builder_log, logger.raw = builder_log, raw
    return logger


def _new_logger(trt: TensorRT) -> ILogger:
    class BuilderLogger(trt.ILogger):  # type: ignore[misc]  # the modules have no types
        builder_log: BuilderLog
        raw: TextIO

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            name = severity.name
            if name in _ERRORS:
                self.builder_log.errors.append(msg)
            elif name == "WARNING":
                self.builder_log.warnings.append(msg)
            elif msg.startswith(_RECORDS):
                self.builder_log.records.append(msg)
            # a full disk must not raise into TensorRT, nor a message after the build
            with contextlib.suppress(OSError, ValueError):
                self.raw.write(f"[{name[0]}] {msg}\n")

    return BuilderLogger()


def default_path(version: str, gpu: str, capability: ComputeCapability) -> Path | None:
    """Path of the user's cache for a TensorRT version and a GPU: timings fit no other.

    None for a user without a home, as in a container that runs as a number.
    """
    folder = cache_folder()
    if folder is None:
        return None
    model = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    sm = f"sm{capability.major}{capability.minor}"
    return folder / f"timing-{version}-{sm}-{model}"


def attach(config: IBuilderConfig, path: Path) -> str | None:
    """Give the builder the timings in ``path``; return a note where they cannot be used."""
    try:
        content = read_bytes(path, TIMING_CACHE) if path.exists() else b""
    except (OSError, OutputError) as error:
        content = b""
        note = f"{error}; it is started anew"
    else:
        note = f"timing cache {path} is of another TensorRT or GPU, or damaged; it is started anew"
        cache: ITimingCache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return None
    fresh: ITimingCache = config.create_timing_cache(b"")
    config.set_timing_cache(fresh, ignore_mismatch=False)
    return note


def store(config: IBuilderConfig, path: Path) -> str | None:
    """Merge the build's timings into ``path``; return a note where they cannot be kept.

    The engine is compiled by now: it is not lost for the sake of the next one's speed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            _merge(config, path)
    except OSError as error:
        return f"timing cache {path} cannot be written ({error.strerror}); timings are not kept"
    return None


def _merge(config: IBuilderConfig, path: Path) -> None:
    cache: ITimingCache = config.get_timing_cache()
    if path.is_file():
        other: ITimingCache = config.create_timing_cache(read_bytes(path, TIMING_CACHE))
        if other is not None:
            cache.combine(other, ignore_mismatch=False)
    content: IHostMemory = cache.serialize()
    write_whole(path, memoryview(content))


def add_profiles(
    builder: Builder, config: IBuilderConfig, network: INetworkDefinition, spec: BuildSpec
) -> None:
    """Add a profile a batch range; the batch is the first axis of every dynamic input."""
    dynamic: dict[str, tuple[int, ...]] = {}
    for index in range(network.num_inputs):
        tensor: ITensor = network.get_input(index)
        shape = tuple(tensor.shape)
        if -1 in shape[1:]:
            raise BuildError(
                f"input {tensor.name!r} is {list(shape)}: only the batch may be dynamic; export "
                "the graph with a fixed --image-size"
            )
        if shape[:1] == (-1,):
            dynamic[tensor.name] = shape[1:]
        elif shape:
            _require_static(tensor.name, shape, spec.profiles)
    for batch in spec.profiles if dynamic else ():
        profile: IOptimizationProfile = builder.create_optimization_profile()
        for name, rest in dynamic.items():
            profile.set_shape(name, *((size, *rest) for size in (batch.min, batch.opt, batch.max)))
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(f"TensorRT refuses the profile --batch {batch} for this graph")


def _require_static(name: str, shape: tuple[int, ...], profiles: tuple[BatchRange, ...]) -> None:
    for batch in profiles:
        if not batch.is_static or batch.min != shape[0]:
            raise BuildError(
                f"--batch {batch} lies outside the graph: the batch of input {name!r} is fixed at "
                f"{shape[0]}; give --batch {shape[0]}, or export the graph with a dynamic batch"
            )


def set_types(
    trt: TensorRT,
    row: TensorRTVersion,
    config: IBuilderConfig,
    network: INetworkDefinition,
    spec: BuildSpec,
) -> None:
    """Set what the row always wants, and precision flags where types are not the graph's."""
    dtypes = _dtypes(network)
    for feature in row.preview_features:
        config.set_preview_feature(getattr(trt.PreviewFeature, feature), True)
    if row.targets_capabilities:
        require_capable(dtypes, spec.capabilities)
        _set_capabilities(trt, config, spec.capabilities)
    if row.strongly_typed:
        return
    if spec.precision is Dtype.BF16:
        raise BuildError("this TensorRT has no bf16; use --fp16, or TensorRT 10 or later")
    if spec.precision is Dtype.FP16:
        dtypes.add("HALF")
    for dtype, flag in row.precision_flags.items():
        if dtype in dtypes:
            config.set_flag(getattr(trt.BuilderFlag, flag))


def _dtypes(network: INetworkDefinition) -> set[str]:
    """Collect the dtypes of all tensors that layers write, in TensorRT's spelling."""
    found: set[str] = set()
    for index in range(network.num_layers):
        layer: ILayer = network.get_layer(index)
        for output in range(layer.num_outputs):
            tensor: ITensor = layer.get_output(output)
            if tensor is not None:  # an optional output that nothing reads
                found.add(tensor.dtype.name)
    return found


def _set_capabilities(
    trt: TensorRT, config: IBuilderConfig, capabilities: tuple[ComputeCapability, ...]
) -> None:
    if not capabilities:
        return
    members = {
        name: value for name, value in trt.ComputeCapability.__members__.items() if name[:2] == "SM"
    }
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        name = f"SM{capability.major}{capability.minor}"
        if name not in members:
            raise no_kernels(
                capability, [ComputeCapability(int(key[2:-1]), int(key[-1])) for key in members]
            )
        config.set_compute_capability(members[name], index)


def set_options(trt: TensorRT, config: IBuilderConfig, spec: BuildSpec) -> tuple[str, ...]:
    """Set what the user asked for and the row takes; return notes on it."""
    if spec.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace)
    if spec.optimization_level is not None:
        config.builder_optimization_level = spec.optimization_level
    if not spec.tf32:
        # TensorRT sets it by itself: an fp32 engine would multiply with 10 bits of mantissa
        config.clear_flag(trt.BuilderFlag.TF32)
    if spec.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if spec.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    note = attach(config, spec.timing_cache) if spec.timing_cache else None
    return (note,) if note else ()


@dataclass(frozen=True, slots=True)
class Compiled:
    plan: IHostMemory
    kernels: tuple[Kernel, ...]
    notes: tuple[str, ...]


def compile_engine(
    trt: TensorRT,
    row: TensorRTVersion,
    spec: BuildSpec,
    log: ILogger,
    builder_log: BuilderLog,
    monitor: IProgressMonitor | None,
) -> Compiled:
    """Compile ``spec.model`` as ``row`` describes; ``log`` fills ``builder_log``."""
    builder: Builder = trt.Builder(log)
    flags = sum(
        1 << int(getattr(trt.NetworkDefinitionCreationFlag, flag)) for flag in row.network_flags
    )
    network: INetworkDefinition = builder.create_network(flags)
    parser: OnnxParser = trt.OnnxParser(network, log)  # owns the weights: lives until the end
    _parse(parser, spec.model)
    if spec.allow_unfused and row.has_attention:
        _decompose_attention(trt, network)
    config: IBuilderConfig = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # kernels are listed one by one
    add_profiles(builder, config, network, spec)
    set_types(trt, row, config, network, spec)
    notes = set_options(trt, config, spec)
    if monitor is not None:
        config.progress_monitor = monitor
    plan: IHostMemory = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(
            f"cannot compile {spec.model.name}: {explain_or_quote(builder_log.errors)}"
        )
    unkept = store(config, spec.timing_cache) if spec.timing_cache else None
    from_log = row.kernels_from == "log"
    kernels = read_log(builder_log.records) if from_log else _inspect(trt, plan, log)
    kernels = with_accumulators(kernels, memoryview(plan))
    return Compiled(plan, kernels, (*notes, unkept) if unkept else notes)


def _parse(parser: OnnxParser, model: Path) -> None:
    if parser.parse_from_file(str(model)):
        return
    reasons = []
    for index in range(parser.num_errors):
        error: ParserError = parser.get_error(index)
        reasons.append(_describe(error))
    raise BuildError(f"cannot read {model.name}: {'; '.join(reasons[:3]) or 'no reason given'}")


def _describe(error: ParserError) -> str:
    raw: str = error.desc()
    meaning = explain_or_quote([raw])
    name = getattr(error, "node_name", None)  # not in 8.6, which has only the node's index
    operator = getattr(error, "node_operator", None)
    if name is None or operator is None:
        return f"node {error.node()}: {meaning}" if error.node() >= 0 else meaning
    return f"node {name()!r} ({operator()}): {meaning}" if operator() else meaning


def _decompose_attention(trt: TensorRT, network: INetworkDefinition) -> None:
    """Allow TensorRT to take Attention apart where it has no fused kernel."""
    for index in range(network.num_layers):
        layer: ILayer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # how the bindings cast down
            boundary: IAttentionInputLayer = layer
            attention: IAttention = boundary.attention
            attention.decomposable = True


def _inspect(trt: TensorRT, plan: IHostMemory, log: ILogger) -> tuple[Kernel, ...]:
    """Read the kernels off the engine; a driver exists, or it would not have compiled."""
    runtime: Runtime = trt.Runtime(log)
    engine: ICudaEngine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError("the engine just compiled cannot be loaded; --log FILE keeps all it said")
    inspector: EngineInspector = engine.create_engine_inspector()
    return read_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
