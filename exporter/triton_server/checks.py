"""What a configuration says about itself and its ensemble, before any file is opened."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from msn_export.triton_server import config as messages
from msn_export.triton_server.config import ModelConfig, Release
from msn_export.triton_server.model import Platform, ServedArtifact


@dataclass(frozen=True, slots=True)
class Issue:
    """One thing about a repository. ``wrong`` fails the check, ``note`` says what was not known.

    ``where`` is a file under the model's folder and, for a configuration, the field.
    """

    level: Literal["wrong", "note"]
    model: str
    where: str
    what: str


Findings: TypeAlias = Iterator[Issue]
ReadArtifact: TypeAlias = Callable[[Path, Platform], ServedArtifact]


@dataclass(frozen=True, slots=True)
class ModelUnderLint:
    """One configuration of one model, with what its versions hold.

    ``versions`` has the artifacts of each version by their file's name, as far as they could be
    read. ``release`` is the Triton it is for, where anyone said.
    """

    folder: Path
    place: str
    config: ModelConfig
    platform: Platform | None
    versions: dict[int, dict[str, ServedArtifact]] = field(default_factory=dict)
    release: Release | None = None

    def wrong(self, where: str, what: str) -> Issue:
        """Report what Triton would refuse or serve wrongly."""
        return Issue("wrong", self.folder.name, f"{self.place}: {where}", what)

    def note(self, where: str, what: str) -> Issue:
        """Report what could not be checked, or only costs speed."""
        return Issue("note", self.folder.name, f"{self.place}: {where}", what)

    @property
    def artifacts(self) -> Iterator[tuple[str, ServedArtifact]]:
        """Each version's files that could be read, by their path in the folder."""
        for version, files in self.versions.items():
            for name, artifact in files.items():
                yield f"{version}/{name}", artifact


def safe_file(folder: Path, name: str, root: Path) -> Path | str:
    """Find a file that a configuration names; the reason as text where it must not be opened.

    A name is one file of ``folder``: what a configuration says is hostile, and Triton joins it to
    the folder as it is. A link may not lead out of ``root``.
    """
    if not name or "/" in name or "\\" in name or name in {".", ".."} or "\0" in name:
        return f"{name!r} is not the name of a file in {folder.name}/"
    path = folder / name
    try:
        there = path.exists()
    except OSError as error:
        return f"{name[:40]!r}… cannot be looked up: {error.strerror}"
    if not there:
        return f"{name} does not exist" + (" (a broken link)" if path.is_symlink() else "")
    if not path.resolve().is_relative_to(root.resolve()):
        return f"{name} is a link that leads out of the repository"
    return path if path.is_file() else f"{name} is no file"


LONGEST_DELAY = 1_000_000  # microseconds; a request that waits longer for company looks hung


def check_config(subject: ModelUnderLint) -> Findings:
    """Check names, batching, instances and what a model without a state must not have."""
    yield from _check_names(subject)
    yield from _check_batching(subject)
    yield from _check_instances(subject)
    yield from _check_cuda_graphs(subject)
    yield from _check_accelerators(subject)
    config = subject.config
    if config.HasField("sequence_batching"):
        yield subject.wrong(
            "sequence_batching", "the model has no state; leave it out and use dynamic_batching"
        )
    if config.model_transaction_policy.decoupled:
        yield subject.wrong("model_transaction_policy", "a request has one answer; leave it out")
    if config.response_cache.enable:
        yield subject.note(
            "response_cache", "does nothing unless the server has --cache-config local,size=BYTES"
        )


def _check_names(subject: ModelUnderLint) -> Findings:
    config, platform = subject.config, subject.platform
    if config.name and config.name != subject.folder.name:
        yield subject.wrong(
            "name", f"{config.name!r} in folder {subject.folder.name}; Triton wants them the same"
        )
    if platform is None or config.platform == "ensemble":
        return
    if config.backend and config.backend != platform.backend:
        yield subject.wrong(
            "backend", f"{config.backend!r} does not serve {platform}; expected {platform.backend}"
        )


def _check_batching(subject: ModelUnderLint) -> Findings:
    config = subject.config
    batching, limit = config.dynamic_batching, config.max_batch_size
    if limit < 0:
        yield subject.wrong("max_batch_size", f"{limit} is below zero")
    if not config.HasField("dynamic_batching"):
        if limit > 1 and config.platform != "ensemble":
            yield subject.wrong(
                "dynamic_batching",
                f"missing: with max_batch_size {limit} requests are still run one by one; "
                "add dynamic_batching { }",
            )
        return
    if limit == 0:
        yield subject.wrong(
            "dynamic_batching", "does nothing with max_batch_size 0: no two requests are joined"
        )
    for size in batching.preferred_batch_size:
        if not 1 <= size <= max(limit, 1):
            yield subject.wrong(
                "dynamic_batching.preferred_batch_size", f"{size} is not in 1 to {limit}"
            )
    if batching.max_queue_delay_microseconds > LONGEST_DELAY:
        seconds = batching.max_queue_delay_microseconds / 1e6
        yield subject.wrong(
            "dynamic_batching.max_queue_delay_microseconds",
            f"a lone request waits {seconds:g} s for others; expected below 1 s",
        )


def _check_instances(subject: ModelUnderLint) -> Findings:
    config = subject.config
    kinds = messages.module().ModelInstanceGroup
    for index, group in enumerate(config.instance_group):
        where = f"instance_group[{index}]"
        if subject.platform is Platform.PLAN and group.kind == kinds.KIND_CPU:
            yield subject.wrong(f"{where}.kind", "an engine runs on a GPU only; leave kind out")
        if subject.platform is Platform.ONNX and group.profile:
            yield subject.wrong(
                f"{where}.profile", "only engines have profiles: Triton refuses it here"
            )
        if group.kind == kinds.KIND_CPU and group.gpus:
            yield subject.wrong(f"{where}.gpus", "KIND_CPU has no GPUs")
        if group.count < 0:
            yield subject.wrong(f"{where}.count", f"{group.count} is below zero")


def _check_cuda_graphs(subject: ModelUnderLint) -> Findings:
    config = subject.config
    cuda = config.optimization.cuda
    if not cuda.graphs and not cuda.graph_spec:
        return
    where, limit = "optimization.cuda.graph_spec", config.max_batch_size
    if subject.platform is not Platform.PLAN:
        yield subject.wrong(
            "optimization.cuda", "CUDA graphs are the TensorRT backend's; this one ignores them"
        )
    elif not cuda.graphs:
        yield subject.wrong(where, "does nothing without graphs: true")
    for index, spec in enumerate(cuda.graph_spec):
        sizes = [spec.batch_size]
        if spec.HasField("graph_lower_bound"):
            sizes.append(spec.graph_lower_bound.batch_size)
        if limit == 0 and any(sizes):
            yield subject.wrong(f"{where}[{index}].batch_size", "expected 0: max_batch_size is 0")
        if limit > 0 and not all(1 <= size <= limit for size in sizes):
            yield subject.wrong(
                f"{where}[{index}].batch_size",
                f"{', '.join(map(str, sizes))} is not in 1 to max_batch_size, {limit}",
            )


def _check_accelerators(subject: ModelUnderLint) -> Findings:
    for accelerator in subject.config.optimization.execution_accelerators.gpu_execution_accelerator:
        precision = accelerator.parameters.get("precision_mode", "FP32").upper()
        if accelerator.name == "tensorrt" and precision != "FP32":
            yield subject.wrong(
                "optimization.execution_accelerators",
                f"precision_mode {precision} lowers the precision of a graph that was proved as "
                "it is typed; serve a graph typed by --dtype, or an engine",
            )


def duplicates(names: Sequence[str], where: str, subject: ModelUnderLint) -> list[Issue]:
    """Report names that occur twice."""
    twice = sorted({name for name in names if names.count(name) > 1})
    return [subject.wrong(where, f"{name!r} is there twice") for name in twice]


def check_ensemble(subject: ModelUnderLint, models: Mapping[str, ModelConfig]) -> Findings:
    """Check each step's model, and each tensor that goes from one step to the next.

    Args:
        subject: the ensemble.
        models: the repository's models by name, as their ``config.pbtxt`` describes them.
    """
    config = subject.config
    if config.instance_group or config.HasField("optimization") or config.model_warmup:
        yield subject.wrong(
            "ensemble", "instance_group, optimization and model_warmup belong to its steps' models"
        )
    steps = config.ensemble_scheduling.step
    if not steps:
        yield subject.wrong("ensemble_scheduling", "has no step")
        return
    tensors = {tensor.name: tensor for tensor in config.input}
    read: set[str] = set()
    for index, step in enumerate(steps):
        where = f"ensemble_scheduling.step[{index}]"
        model = models.get(step.model_name)
        if model is None:
            yield subject.wrong(where, f"model {step.model_name!r} is not in the repository")
            return
        yield from _check_step_batch(subject, model, where)
        yield from _check_inputs(subject, step, model, tensors, where)
        read |= set(step.input_map.values())
        outputs = {tensor.name: tensor for tensor in model.output}
        for name, ours in step.output_map.items():
            if name not in outputs:
                yield subject.wrong(f"{where}.output_map", f"{step.model_name} gives no {name!r}")
            else:
                tensors[ours] = outputs[name]
    for tensor in config.input:
        if tensor.name not in read:
            yield subject.wrong(f"input {tensor.name!r}", "no step reads it")
    for tensor in config.output:
        made = tensors.get(tensor.name)
        if made is None:
            yield subject.wrong(f"output {tensor.name!r}", "no step makes it")
        elif _described(made) != _described(tensor):
            yield subject.wrong(
                f"output {tensor.name!r}",
                f"{_described(tensor)}; its step gives {_described(made)}",
            )


def _check_step_batch(subject: ModelUnderLint, model: ModelConfig, where: str) -> Findings:
    limit = subject.config.max_batch_size
    if model.max_batch_size < limit or (model.max_batch_size > 0) != (limit > 0):
        yield subject.wrong(
            "max_batch_size", f"{limit}, and {where} ({model.name}) has {model.max_batch_size}"
        )


def _check_inputs(
    subject: ModelUnderLint, step: Any, model: ModelConfig, tensors: Mapping[str, Any], where: str
) -> Findings:
    for tensor in model.input:
        ours = step.input_map.get(tensor.name)
        if ours is None:
            yield subject.wrong(f"{where}.input_map", f"{tensor.name!r} gets nothing")
        elif ours not in tensors:
            yield subject.wrong(f"{where}.input_map", f"nothing before it makes {ours!r}")
        elif _described(tensors[ours]) != _described(tensor):
            yield subject.wrong(
                f"{where}.input_map",
                f"{tensor.name!r} of {model.name} is {_described(tensor)}, and gets "
                f"{_described(tensors[ours])}",
            )
    for name in sorted(step.input_map.keys() - {tensor.name for tensor in model.input}):
        yield subject.wrong(f"{where}.input_map", f"{model.name} takes no {name!r}")


def _described(tensor: Any) -> str:
    return f"{messages.datatype_name(tensor.data_type)} {list(tensor.dims)}"
