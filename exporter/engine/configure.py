"""Put a job's profiles, targets, types and options into a builder's configuration."""

from msn_export.engine import timing_cache
from msn_export.engine.bindings import (
    Builder,
    IBuilderConfig,
    ILayer,
    INetworkDefinition,
    IOptimizationProfile,
    ITensor,
    TensorRT,
)
from msn_export.engine.flavours import Flavour
from msn_export.engine.job import BuildSpec
from msn_export.engine.options import no_kernels, require_capable
from msn_export.errors import BuildError
from msn_export.spec import BatchRange, ComputeCapability, Dtype


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
    flavour: Flavour,
    config: IBuilderConfig,
    network: INetworkDefinition,
    spec: BuildSpec,
) -> None:
    """Set what the flavour always wants, and precision flags where types are not the graph's."""
    dtypes = _dtypes(network)
    for feature in flavour.preview_features:
        config.set_preview_feature(getattr(trt.PreviewFeature, feature), True)
    if flavour.targets_capabilities:
        require_capable(dtypes, spec.capabilities)
        _set_capabilities(trt, config, spec.capabilities)
    if flavour.strongly_typed:
        return
    if spec.precision is Dtype.BF16:
        raise BuildError("this TensorRT has no bf16; use --fp16, or TensorRT 10 or later")
    if spec.precision is Dtype.FP16:
        dtypes.add("HALF")
    for dtype, flag in flavour.precision_flags.items():
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
    known = {
        name: value for name, value in trt.ComputeCapability.__members__.items() if name[:2] == "SM"
    }
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        name = f"SM{capability.major}{capability.minor}"
        if name not in known:
            raise no_kernels(
                capability, [ComputeCapability(int(key[2:-1]), int(key[-1])) for key in known]
            )
        config.set_compute_capability(known[name], index)


def set_options(trt: TensorRT, config: IBuilderConfig, spec: BuildSpec) -> tuple[str, ...]:
    """Set what the user asked for, and give notes on it.

    What the flavour ignores or refuses does not get here.
    """
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
    note = timing_cache.attach(config, spec.timing_cache) if spec.timing_cache else None
    return (note,) if note else ()
