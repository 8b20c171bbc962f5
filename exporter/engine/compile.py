"""From an ONNX file to a serialised engine, in TensorRT's own calls. Runs in the child process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msn_export.engine import timing_cache
from msn_export.engine.accumulators import with_accumulators
from msn_export.engine.bindings import (
    Builder,
    EngineInspector,
    IAttention,
    IAttentionInputLayer,
    IBuilderConfig,
    ICudaEngine,
    IHostMemory,
    ILayer,
    ILogger,
    INetworkDefinition,
    OnnxParser,
    ParserError,
    Runtime,
    TensorRT,
)
from msn_export.engine.configure import add_profiles, set_options, set_types
from msn_export.engine.failures import explain_or_quote
from msn_export.engine.flavours import Flavour
from msn_export.engine.job import BuildSpec, Progress
from msn_export.engine.kernels import Kernel, read_inspector, read_log
from msn_export.engine.listeners import Heard, make_monitor
from msn_export.errors import BuildError


@dataclass(frozen=True, slots=True)
class Compiled:
    """A serialised engine, what it is made of, and what is worth telling about its making."""

    plan: IHostMemory
    kernels: tuple[Kernel, ...]
    notes: tuple[str, ...]


def compile_engine(
    trt: TensorRT,
    flavour: Flavour,
    spec: BuildSpec,
    log: ILogger,
    heard: Heard,
    report: Callable[[Progress], bool],
) -> Compiled:
    """Compile ``spec.model``.

    Args:
        trt: the module that ``flavour`` describes.
        flavour: the row of the table that says how it is told.
        spec: what to compile.
        log: a logger that fills ``heard``.
        heard: what the builder logs.
        report: receives progress; returning False cancels the build.

    Raises:
        BuildError: the parser or the builder refused, or the job contradicts the graph.
    """
    builder: Builder = trt.Builder(log)
    flags = sum(
        1 << int(getattr(trt.NetworkDefinitionCreationFlag, flag)) for flag in flavour.network_flags
    )
    network: INetworkDefinition = builder.create_network(flags)
    parser: OnnxParser = trt.OnnxParser(network, log)  # owns the weights: lives until the end
    _parse(parser, spec.model)
    if spec.decompose_attention and flavour.has_attention:
        _decompose_attention(trt, network)
    config: IBuilderConfig = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # kernels are told one by one
    add_profiles(builder, config, network, spec)
    set_types(trt, flavour, config, network, spec)
    notes = set_options(trt, config, spec)
    if flavour.reports_progress:
        config.progress_monitor = make_monitor(trt, report)
    plan: IHostMemory = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"cannot compile {spec.model.name}: {explain_or_quote(heard.errors)}")
    unkept = timing_cache.store(config, spec.timing_cache) if spec.timing_cache else None
    from_log = flavour.kernels_from == "log"
    kernels = read_log(heard.records) if from_log else _inspect(trt, plan, log)
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
    """Allow TensorRT to take Attention operators apart where it has no fused kernel."""
    for index in range(network.num_layers):
        layer: ILayer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # how the bindings cast down
            boundary: IAttentionInputLayer = layer
            attention: IAttention = boundary.attention
            attention.decomposable = True


def _inspect(trt: TensorRT, plan: IHostMemory, log: ILogger) -> tuple[Kernel, ...]:
    """Read the kernels off the engine itself; a driver is there, or it would not have compiled."""
    runtime: Runtime = trt.Runtime(log)
    engine: ICudaEngine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BuildError("the engine just compiled cannot be loaded; --log FILE keeps all it said")
    inspector: EngineInspector = engine.create_engine_inspector()
    return read_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
