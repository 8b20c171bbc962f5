"""Which Triton Inference Server container ships which TensorRT and which onnxruntime.

An engine loads only in the TensorRT that built it, so it needs the container that ships that one.

Sources, one row a container ``nvcr.io/nvidia/tritonserver:XX.YY-py3``:

* TensorRT: docs.nvidia.com/deeplearning/triton-inference-server/release-notes/rel-26-04.html, table
  "NVIDIA Triton Inference Server Container Versions" (newest rows from rel-26-05.html). A row is
  None where that table is silent (25.07, 26.06 on) or contradicts another page of NVIDIA's (24.12:
  10.6 there, 10.7 in the compatibility matrix). The ``-trtllm-python-py3`` images ship others.
* onnxruntime: triton-inference-server/server, docs/introduction/compatibility.md, table
  "ONNX Runtime Versions".

The rules come from what the backends accept under ``--disable-auto-complete-config``, read in
their sources (onnxruntime_backend src/onnxruntime_utils.cc CompareDimsSupported, tensorrt_backend
src/instance_state.cc GetMostOptimizedProfile):

* a batching model's dims leave the batch out, and an ONNX graph's first dimension must then be
  dynamic in every tensor; a graph of a fixed batch is served with ``max_batch_size: 0``;
* an instance chooses among its own profiles only, and Triton gives a request to any instance: so
  one group has all profiles. A group a profile would fail every batch outside its profile.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from msn_export.errors import MissingPackageError, SpecError
from msn_export.spec import TensorSpec
from msn_export.triton_server.model import LOGITS, Platform, ServedArtifact


@dataclass(frozen=True, slots=True)
class Release:
    """One container; a version is None where no source tells it."""

    name: str
    tensorrt: str | None
    onnxruntime: str | None

    @property
    def image(self) -> str:
        """The image that ``docker run`` takes."""
        return f"nvcr.io/nvidia/tritonserver:{self.name}-py3"


RELEASES = tuple(
    Release(*row)
    for row in (
        ("26.07", None, "1.27.0"),
        ("26.06", None, "1.24.4"),
        ("26.05", "10.16.1.11", "1.24.4"),
        ("26.04", "10.16.1.11", "1.24.4"),
        ("26.03", "10.16.0.72", "1.24.2"),
        ("26.02", "10.15.1.29", "1.24.1"),
        ("26.01", "10.14.1.48", "1.23.2"),
        ("25.12", "10.14.1.48", "1.23.2"),
        ("25.11", "10.14.1.48", "1.23.2"),
        ("25.10", "10.13.3.9", "1.23.1"),
        ("25.09", "10.13.3.9", "1.23.0"),
        ("25.08", "10.13.2.6", "1.23.0"),
        ("25.07", None, "1.22.0"),
        ("25.06", "10.11.0.33", "1.22.0"),
        ("25.05", "10.10.0.31", "1.22.0"),
        ("25.04", "10.9.0.34", "1.21.0"),
        ("25.03", "10.9.0.34", "1.21.0"),
        ("25.02", "10.8.0.43", "1.20.1"),
        ("25.01", "10.8.0.43", "1.20.1"),
        ("24.12", None, "1.20.1"),
        ("24.11", "10.6.0.26", "1.19.2"),
        ("24.10", "10.5.0.18", "1.19.2"),
        ("24.09", "10.4.0.26", "1.19.2"),
        ("24.08", "10.3.0.26", "1.18.1"),
        ("24.07", "10.2.0.19", "1.18.1"),
        ("24.06", "10.1.0.27", "1.18.0"),
        ("24.05", "10.0.1.6", "1.18.0"),
        ("24.04", "8.6.3", "1.17.3"),
    )
)
# microsoft/onnxruntime pull request 25156 (label release:1.23.0) brought Attention's CPU kernel;
# 27542 (March 2026, after 1.24) today's CUDA kernels: before it a GPU may run Attention on the CPU.
ATTENTION_OPSET = 23
ATTENTION_SINCE = (1, 23)
ATTENTION_CUDA_SINCE = (1, 25)


def parse_release(text: str) -> Release:
    """Read a release's name, ``YY.MM``; one that is not in the table ships what nobody told us."""
    if re.fullmatch(r"[0-9]{2}\.(0[1-9]|1[0-2])", text) is None:
        raise SpecError(f"Triton release {text!r} is no release; expected YY.MM, as in 25.10")
    known = (release for release in RELEASES if release.name == text)
    return next(known, Release(text, None, None))


def for_tensorrt(version: str) -> Release:
    """Choose the newest release that ships a TensorRT."""
    found = [release for release in RELEASES if same_tensorrt(release.tensorrt, version)]
    if found:
        return found[0]
    known = [release for release in RELEASES if release.tensorrt]
    below = [r for r in known if numbers(r.tensorrt) < numbers(version)]
    above = [r for r in known if numbers(r.tensorrt) > numbers(version)]
    nearest = [*above[-1:], *below[:1]]
    told = " and ".join(f"{release.name} ships {release.tensorrt}" for release in nearest)
    raise SpecError(
        f"no Triton release is known to ship TensorRT {version} ({told}); build the engine with "
        "one of those, or name your release with --release YY.MM"
    )


def for_onnx(opset: int) -> Release:
    """Choose the release for a graph of an opset: the newest, whose onnxruntime knows the most."""
    return next(release for release in RELEASES if runs_opset(release, opset) is not False)


def runs_opset(release: Release, opset: int) -> bool | None:
    """Say whether a release's onnxruntime runs a graph of an opset; None where nobody told us."""
    if opset < ATTENTION_OPSET:
        return True
    if release.onnxruntime is None:
        return None
    return numbers(release.onnxruntime)[:2] >= ATTENTION_SINCE


def same_tensorrt(one: str | None, other: str | None) -> bool:
    """Compare two versions as far as a plan's loadability goes: major, minor and patch."""
    return bool(one and other) and numbers(one)[:3] == numbers(other)[:3]


def numbers(version: str | None) -> tuple[int, ...]:
    """Read the numbers a version begins with: ``10.13.3.9.post1`` is (10, 13, 3, 9)."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", version or "")
    return tuple(int(part) for part in match[0].split(".")[:4]) if match else ()


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
    """Import the generated module ``model_config_pb2``."""
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
    """Read a configuration."""
    from google.protobuf import text_format

    config = module().ModelConfig()
    try:
        text_format.Parse(text, config)
    except (text_format.ParseError, RecursionError, UnicodeError) as error:
        raise SpecError(" ".join(str(error).split()) or type(error).__name__) from error
    return config


def datatype_name(config_value: int) -> str:
    """Give ``TYPE_FP32`` for its number; a number that Triton gives no meaning stays one."""
    known = module().DataType
    return str(known.Name(config_value) if config_value in known.values() else config_value)


LABELS = "labels.txt"
WARMUP_FILE = "input.bin"  # in the folder that Triton calls warmup/
DYNAMIC_BATCH = 32  # what a foreign graph with a dynamic batch is served with


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is served; ``queue_delay`` in microseconds."""

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
    config = base_config(name, first.platform, batch_limit(first, settings.max_batch))
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
    config.parameters["triton_release"].string_value = settings.release.name
    return config


def base_config(name: str, platform: Platform, max_batch: int) -> ModelConfig:
    """Begin a configuration: name, backend, batch, the newest version alone."""
    config = module().ModelConfig(
        name=name, platform=platform, backend=platform.backend, max_batch_size=max_batch
    )
    config.version_policy.latest.num_versions = 1
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
            told = ", ".join(map(str, artifact.profiles)) or "none"
            raise SpecError(
                f"{name} takes no batch of {missing} (its profiles: {told}) and Triton sends every "
                f"size from 1 to {limit}; build it with --batch 1:{min(8, limit)}:{limit}"
                + ("" if missing == 1 else f" or give --max-batch {missing - 1}")
            )
    return limit


def plan_name(artifact: ServedArtifact, among: Sequence[ServedArtifact]) -> str:
    """Name an artifact's file in a version's folder."""
    if len(among) == 1 or artifact.targets.later:
        return artifact.platform.filename
    generation = artifact.targets.named[0]
    return f"model.sm{generation.major}{generation.minor}.plan"


def dims(spec: TensorSpec, *, batching: bool) -> list[int]:
    """Give a tensor's dims as Triton writes them: no batch in a batching model, -1 if dynamic."""
    sizes = [size if isinstance(size, int) else -1 for size in spec.shape]
    return sizes[1:] if batching else sizes


def _add_tensors(config: ModelConfig, artifact: ServedArtifact, *, batching: bool) -> None:
    for spec in artifact.inputs:
        config.input.add(
            name=spec.name,
            data_type=datatype(spec, artifact),
            dims=_fixed(dims(spec, batching=batching), artifact, batching=batching),
        )
    for spec in artifact.outputs:
        output = config.output.add(
            name=spec.name,
            data_type=datatype(spec, artifact),
            dims=_fixed(dims(spec, batching=batching), artifact, batching=batching),
        )
        if spec.name == LOGITS and artifact.labels:
            output.label_filename = LABELS


def _fixed(sizes: list[int], artifact: ServedArtifact, *, batching: bool) -> list[int]:
    """Write the one batch that an engine's profiles allow where its graph leaves it dynamic."""
    if not batching and artifact.fixed_batch is not None and sizes[0] == -1:
        return [artifact.fixed_batch, *sizes[1:]]
    return sizes


def datatype(spec: TensorSpec, artifact: ServedArtifact) -> int:
    """Give Triton's number for a tensor's dtype."""
    known = DATATYPES.get(spec.dtype)
    if known is None:
        raise SpecError(
            f"{artifact.path.name}: tensor {spec.name!r} is {spec.dtype}, which Triton does not "
            f"serve; expected one of {', '.join(DATATYPES)}"
        )
    return int(module().DataType.Value(known))


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
