"""Triton's configurations of a model and of the ensemble in front of it, and that one's graph.

The rules come from what the backends accept under ``--disable-auto-complete-config``, read in
their sources (onnxruntime_backend src/onnxruntime_utils.cc CompareDimsSupported, tensorrt_backend
src/instance_state.cc GetMostOptimizedProfile):

* a batching model's dims leave the batch out, and an ONNX graph's first dimension must then be
  dynamic in every tensor; a graph of a fixed batch is served with ``max_batch_size: 0``;
* an instance chooses among its own profiles only, and Triton gives a request to any instance: so
  one group has all profiles. A group a profile would fail every batch outside its profile.

The ensemble normalises bytes as a decoder gives them, then runs the model. Triton has no
preprocessing backend but Python and DALI; a graph of six nodes in the onnxruntime backend needs
neither. Resizing stays with the client: no served form of it equals Pillow's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.errors import MissingPackageError, SpecError
from msn_export.preprocessing import Preprocessing
from msn_export.spec import InputFormat, TensorSpec
from msn_export.triton_server.model import LOGITS, Platform, Release, ServedArtifact

ModelConfig: TypeAlias = Any  # tritonclient.grpc.model_config_pb2.ModelConfig; it ships no types

# ONNX's spelling (graph.tensor_specs) to Triton's: server docs/user_guide/model_configuration.md
DATATYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float": "TYPE_FP32",
    "double": "TYPE_FP64",
}
SIZES = {"TYPE_BOOL": 1, "TYPE_UINT8": 1, "TYPE_INT8": 1, "TYPE_FP16": 2, "TYPE_BF16": 2,
         "TYPE_INT32": 4, "TYPE_FP32": 4, "TYPE_INT64": 8, "TYPE_FP64": 8}  # fmt: skip


def module() -> Any:
    """Import the generated module of Triton's messages."""
    try:
        from tritonclient.grpc import model_config_pb2
    except (ModuleNotFoundError, RuntimeError) as error:
        raise MissingPackageError(
            "package tritonclient[grpc] is not installed; pip install 'msn-export[triton]'"
        ) from error
    return model_config_pb2


def to_text(config: ModelConfig, comment: str) -> str:
    """Write a configuration as ``config.pbtxt`` holds it, under a comment."""
    from google.protobuf import text_format

    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return lines + str(text_format.MessageToString(config))


def from_text(text: str) -> ModelConfig:
    from google.protobuf import text_format

    config = module().ModelConfig()
    try:
        text_format.Parse(text, config)
    except (text_format.ParseError, RecursionError, UnicodeError) as error:
        raise SpecError(" ".join(str(error).split()) or type(error).__name__) from error
    return config


def datatype_name(config_value: int) -> str:
    """Give ``TYPE_FP32`` for its number; a number that Triton gives no meaning stays one."""
    types = module().DataType
    return str(types.Name(config_value) if config_value in types.values() else config_value)


LABELS = "labels.txt"
WARMUP_FILE = "input.bin"  # in the folder that Triton calls warmup/
DYNAMIC_BATCH = 32  # of a foreign graph with a dynamic batch


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a served model; ``queue_delay`` in microseconds."""

    release: Release
    max_batch: int | None = None
    instances: int = 1
    queue_delay: int = 500
    warmup: bool = False
    response_cache: bool = False
    cuda_graphs: bool = False


def model_config(name: str, artifacts: Sequence[ServedArtifact], settings: Settings) -> ModelConfig:
    """Describe one model: an ONNX graph, or engines of one model for several GPU generations."""
    first = artifacts[0]
    config = _platform_config(
        name, first.platform, batch_limit(first, settings.max_batch), settings
    )
    batching = config.max_batch_size > 0
    _add_tensors(config, first, batching=batching)
    if batching:
        config.dynamic_batching.max_queue_delay_microseconds = settings.queue_delay
        if len(first.profiles) > 1:
            config.dynamic_batching.preferred_batch_size.extend(_optima(first, config))
    group = config.instance_group.add(count=settings.instances)
    if len(first.profiles) > 1 and first.platform is Platform.PLAN:
        group.profile.extend(str(index) for index in range(len(first.profiles)))
    if len(artifacts) > 1:
        for artifact in artifacts:
            # one for any GPU from Ampere on is what Triton opens where no other is named
            if not artifact.targets.later:
                capability = str(artifact.targets.named[0])
                config.cc_model_filenames[capability] = plan_name(artifact, artifacts)
    if settings.response_cache:
        config.response_cache.enable = True
    if settings.warmup:
        _add_warmup(config, first)
    return config


def _platform_config(
    name: str, platform: Platform, max_batch: int, settings: Settings
) -> ModelConfig:
    """Begin the configuration of one model: its backend, its batch, the newest version alone."""
    config = module().ModelConfig(
        name=name, platform=platform, backend=platform.backend, max_batch_size=max_batch
    )
    config.version_policy.latest.num_versions = 1
    config.parameters["triton_release"].string_value = settings.release.name
    return config


def gpu_config(config: ModelConfig, artifact: ServedArtifact, *, cuda_graphs: bool) -> ModelConfig:
    """Change a configuration so that it loads on a GPU or not at all.

    Without a kind Triton quietly serves on the CPU where it finds no GPU.
    """
    changed = type(config)()
    changed.CopyFrom(config)
    for group in changed.instance_group:
        group.kind = module().ModelInstanceGroup.KIND_GPU
    if cuda_graphs:
        cuda = changed.optimization.cuda
        cuda.graphs = True
        sizes = sorted({1, *_optima(artifact, config), config.max_batch_size})
        for size in sizes if config.max_batch_size else [0]:
            cuda.graph_spec.add(batch_size=size)
    return changed


def batch_limit(artifact: ServedArtifact, asked: int | None) -> int:
    """Find ``max_batch_size``; 0 serves a graph of a fixed batch."""
    name = artifact.path.name
    if artifact.fixed_batch is not None:
        if asked is not None:
            raise SpecError(
                f"--max-batch {asked}: {name} has a fixed batch of {artifact.fixed_batch}, which "
                f"Triton cannot batch; build it with --batch 1:{min(8, asked)}:{asked}"
            )
        return 0
    largest = max((profile.max for profile in artifact.profiles), default=DYNAMIC_BATCH)
    limit = asked if asked is not None else largest
    if artifact.platform is Platform.PLAN:
        missing = artifact.uncovered(limit)
        if missing is not None:
            profiles = ", ".join(map(str, artifact.profiles)) or "none"
            raise SpecError(
                f"{name} takes no batch of {missing} (its profiles: {profiles}) and Triton sends "
                f"every size from 1 to {limit}; build it with --batch 1:{min(8, limit)}:{limit}"
                + ("" if missing == 1 else f" or give --max-batch {missing - 1}")
            )
    return limit


def plan_name(artifact: ServedArtifact, among: Sequence[ServedArtifact]) -> str:
    if len(among) == 1 or artifact.targets.later:
        return artifact.platform.filename
    generation = artifact.targets.named[0]
    return f"model.sm{generation.major}{generation.minor}.plan"


def dims(spec: TensorSpec, *, batching: bool) -> list[int]:
    """Give a tensor's dims as Triton writes them: no batch in a batching model, -1 if dynamic."""
    sizes = [size if isinstance(size, int) else -1 for size in spec.shape]
    return sizes[1:] if batching else sizes


def _add_tensors(config: ModelConfig, artifact: ServedArtifact, *, batching: bool) -> None:
    for tensors, specs in ((config.input, artifact.inputs), (config.output, artifact.outputs)):
        for spec in specs:
            sizes = dims(spec, batching=batching)
            if not batching and artifact.fixed_batch is not None and sizes[0] == -1:
                # the one batch that an engine's profiles allow where its graph leaves it dynamic
                sizes[0] = artifact.fixed_batch
            tensors.add(name=spec.name, data_type=datatype(spec, artifact), dims=sizes)
    for output in config.output:
        if output.name == LOGITS and artifact.labels:
            output.label_filename = LABELS


def datatype(spec: TensorSpec, artifact: ServedArtifact) -> int:
    name = DATATYPES.get(spec.dtype)
    if name is None:
        raise SpecError(
            f"{artifact.path.name}: tensor {spec.name!r} is {spec.dtype}, which Triton does not "
            f"serve; expected one of {', '.join(DATATYPES)}"
        )
    return int(module().DataType.Value(name))


def _optima(artifact: ServedArtifact, config: ModelConfig) -> list[int]:
    limit = config.max_batch_size
    return sorted({profile.opt for profile in artifact.profiles if profile.opt <= limit})


def _add_warmup(config: ModelConfig, artifact: ServedArtifact) -> None:
    """Let each instance run its sample alone, and at the batches it was tuned for."""
    limit = config.max_batch_size
    for size in sorted({1, *_optima(artifact, config), limit}) if limit else [1]:
        sample = config.model_warmup.add(name=f"batch of {size}", batch_size=size)
        (tensor,) = config.input
        given = sample.inputs[tensor.name]
        given.data_type = tensor.data_type
        given.dims.extend(tensor.dims)
        given.input_data_file = WARMUP_FILE


OPSET = 17  # every onnxruntime in the table of releases knows it
IR_VERSION = 8


def require_floats(artifact: ServedArtifact) -> TensorSpec:
    """Require that a model has one image input that wants floats, and give it."""
    (spec, *others) = artifact.inputs
    if spec.dtype == "uint8":
        raise SpecError(
            f"--ensemble: {artifact.path.name} takes uint8 images itself (its normalisation is "
            "inside the graph); leave --ensemble out"
        )
    if others or len(spec.shape) != 4 or spec.dtype not in {"float", "float16"}:
        raise SpecError(
            f"--ensemble: {artifact.path.name} takes {spec.name!r} {spec.dtype} "
            f"[{', '.join(map(str, spec.shape))}]; expected one image input [b, c, h, w] of floats"
        )
    if not all(isinstance(size, int) for size in spec.shape[1:]):
        raise SpecError(
            f"--ensemble: {artifact.path.name} has a dynamic height or width; export it with "
            "--image-size"
        )
    return spec


def save_graph(
    spec: TensorSpec, preprocessing: Preprocessing, batch: int | str, path: Path
) -> None:
    """Write the graph ``images`` uint8 [b, h, w, c] -> ``spec``, floats [b, c, h, w].

    The operations are those of ``images.normalize``, in its order and its rounding (a byte times
    the scale is a double first): the floats are the same to the last bit.
    """
    channels, height, width = spec.shape[1:]
    if channels != preprocessing.channels:
        raise SpecError(
            f"the model takes {channels} channels, its preprocessing normalises "
            f"{preprocessing.channels}; export it again"
        )
    images = ir.val(InputFormat.UINT8.tensor, ir.DataType.UINT8, [batch, height, width, channels])
    scale = _constant("scale", np.asarray(preprocessing.scale, np.float64))
    mean = _constant("mean", np.asarray(preprocessing.mean, np.float32))
    std = _constant("std", np.asarray(preprocessing.std, np.float32))
    nodes = [ir.node("Cast", [images], {"to": ir.DataType.DOUBLE})]
    nodes.append(ir.node("Mul", [nodes[-1].outputs[0], scale]))
    nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": ir.DataType.FLOAT}))
    for op, constant in (("Sub", mean), ("Div", std)):
        nodes.append(ir.node(op, [nodes[-1].outputs[0], constant]))
    nodes.append(ir.node("Transpose", [nodes[-1].outputs[0]], {"perm": [0, 3, 1, 2]}))
    if spec.dtype == "float16":
        nodes.append(ir.node("Cast", [nodes[-1].outputs[0]], {"to": ir.DataType.FLOAT16}))
    result = nodes[-1].outputs[0]
    result.name = spec.name
    result.type = ir.TensorType(ir.DataType[spec.dtype.upper()])
    result.shape = ir.Shape([batch, *spec.shape[1:]])
    graph = ir.Graph(
        [images], [result], nodes=nodes, initializers=[scale, mean, std],
        opset_imports={"": OPSET}, name="preprocess",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="msn-export")
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _constant(name: str, array: NDArray[Any]) -> ir.Value:
    return ir.val(name, const_value=ir.tensor(array, name=name))


def preprocess_config(
    name: str, spec: TensorSpec, model: ModelConfig, settings: Settings
) -> ModelConfig:
    config = _platform_config(name, Platform.ONNX, model.max_batch_size, settings)
    (target,) = model.input
    *batch, channels, height, width = target.dims
    config.input.add(
        name=InputFormat.UINT8.tensor,
        data_type=module().DataType.Value("TYPE_UINT8"),
        dims=[*batch, height, width, channels],
    )
    config.output.add(name=spec.name, data_type=target.data_type, dims=target.dims)
    if model.max_batch_size:
        # no delay: the model behind it waits for company already
        config.dynamic_batching.SetInParent()
    config.instance_group.add(count=settings.instances)
    return config


def ensemble_config(name: str, preprocess: ModelConfig, model: ModelConfig) -> ModelConfig:
    """Describe the ensemble of both: what clients call with bytes."""
    config = module().ModelConfig(
        name=name, platform="ensemble", max_batch_size=model.max_batch_size
    )
    config.version_policy.latest.num_versions = 1
    config.input.extend(preprocess.input)
    config.output.extend(model.output)
    (source,), (target,) = preprocess.input, model.input
    for step, ins, outs in (
        (preprocess, [source.name], [target.name]),
        (model, [target.name], [output.name for output in model.output]),
    ):
        added = config.ensemble_scheduling.step.add(model_name=step.name, model_version=-1)
        added.input_map.update({tensor: tensor for tensor in ins})
        added.output_map.update({tensor: tensor for tensor in outs})
    config.parameters["triton_release"].CopyFrom(model.parameters["triton_release"])
    return config
