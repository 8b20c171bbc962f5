"""Checks of a configuration by itself, of its ensemble, and of the files it names."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from msn_export.errors import IN_A_TEXT, SpecError
from msn_export.input_files import TRITON_LABELS, read_text
from msn_export.spec import ComputeCapability
from msn_export.triton_server.config import SIZES, ModelConfig, datatype_name, module
from msn_export.triton_server.model import LOGITS, Platform, Release, ServedArtifact


@dataclass(frozen=True, slots=True)
class Issue:
    """One thing about a repository. ``wrong`` fails the check, ``note`` says what was not known.

    ``where`` is a file under the model's folder and, for a configuration, the field.
    """

    level: Literal["wrong", "note"]
    model: str
    where: str
    what: str


class Note(NamedTuple):
    """A finding that fails nothing: what could not be checked, or only costs speed."""

    where: str
    what: str


Findings: TypeAlias = Iterator[tuple[str, str]]  # where and what; wrong, if it is no Note
ReadArtifact: TypeAlias = Callable[[Path, Platform], ServedArtifact]


@dataclass(frozen=True, slots=True)
class ModelUnderLint:
    """One configuration of one model, with what its versions hold.

    ``versions`` has the artifacts of each version by their file's name, as far as they could be
    read. ``release`` is the Triton it is for, where anyone said.
    """

    folder: Path
    file: str
    config: ModelConfig
    platform: Platform | None
    versions: dict[int, dict[str, ServedArtifact]] = field(default_factory=dict)
    release: Release | None = None

    def issue(self, finding: tuple[str, str]) -> Issue:
        where, what = finding
        level: Literal["wrong", "note"] = "note" if isinstance(finding, Note) else "wrong"
        return Issue(level, self.folder.name, f"{self.file}: {where}", what)

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
        yield "sequence_batching", "the model has no state; leave it out and use dynamic_batching"
    if config.model_transaction_policy.decoupled:
        yield "model_transaction_policy", "a request has one answer; leave it out"
    if config.response_cache.enable:
        yield Note(
            "response_cache",
            "does nothing unless the server has --cache-config local,size=BYTES",
        )


def _check_names(subject: ModelUnderLint) -> Findings:
    config, platform = subject.config, subject.platform
    if config.name and config.name != subject.folder.name:
        yield "name", f"{config.name!r} in folder {subject.folder.name}; Triton wants them the same"
    if platform is None or config.platform == "ensemble":
        return
    if config.backend and config.backend != platform.backend:
        yield (
            "backend",
            f"{config.backend!r} does not serve {platform}; expected {platform.backend}",
        )


def _check_batching(subject: ModelUnderLint) -> Findings:
    config = subject.config
    batching, limit = config.dynamic_batching, config.max_batch_size
    if limit < 0:
        yield "max_batch_size", f"{limit} is below zero"
    if not config.HasField("dynamic_batching"):
        if limit > 1 and config.platform != "ensemble":
            yield (
                "dynamic_batching",
                f"missing: with max_batch_size {limit} requests are still run one by one; "
                "add dynamic_batching { }",
            )
        return
    if limit == 0:
        yield "dynamic_batching", "does nothing with max_batch_size 0: no two requests are joined"
    for size in batching.preferred_batch_size:
        if not 1 <= size <= max(limit, 1):
            yield "dynamic_batching.preferred_batch_size", f"{size} is not in 1 to {limit}"
    if batching.max_queue_delay_microseconds > LONGEST_DELAY:
        seconds = batching.max_queue_delay_microseconds / 1e6
        yield (
            "dynamic_batching.max_queue_delay_microseconds",
            f"a lone request waits {seconds:g} s for others; expected below 1 s",
        )


def _check_instances(subject: ModelUnderLint) -> Findings:
    config = subject.config
    kinds = module().ModelInstanceGroup
    for index, group in enumerate(config.instance_group):
        where = f"instance_group[{index}]"
        if subject.platform is Platform.PLAN and group.kind == kinds.KIND_CPU:
            yield f"{where}.kind", "an engine runs on a GPU only; leave kind out"
        if subject.platform is Platform.ONNX and group.profile:
            yield f"{where}.profile", "only engines have profiles: Triton refuses it here"
        if group.kind == kinds.KIND_CPU and group.gpus:
            yield f"{where}.gpus", "KIND_CPU has no GPUs"
        if group.count < 0:
            yield f"{where}.count", f"{group.count} is below zero"


def _check_cuda_graphs(subject: ModelUnderLint) -> Findings:
    config = subject.config
    cuda = config.optimization.cuda
    if not cuda.graphs and not cuda.graph_spec:
        return
    where, limit = "optimization.cuda.graph_spec", config.max_batch_size
    if subject.platform is not Platform.PLAN:
        yield "optimization.cuda", "CUDA graphs are the TensorRT backend's; this one ignores them"
    elif not cuda.graphs:
        yield where, "does nothing without graphs: true"
    for index, spec in enumerate(cuda.graph_spec):
        sizes = [spec.batch_size]
        if spec.HasField("graph_lower_bound"):
            sizes.append(spec.graph_lower_bound.batch_size)
        if limit == 0 and any(sizes):
            yield f"{where}[{index}].batch_size", "expected 0: max_batch_size is 0"
        if limit > 0 and not all(1 <= size <= limit for size in sizes):
            yield (
                f"{where}[{index}].batch_size",
                f"{', '.join(map(str, sizes))} is not in 1 to max_batch_size, {limit}",
            )


def _check_accelerators(subject: ModelUnderLint) -> Findings:
    for accelerator in subject.config.optimization.execution_accelerators.gpu_execution_accelerator:
        precision = accelerator.parameters.get("precision_mode", "FP32").upper()
        if accelerator.name == "tensorrt" and precision != "FP32":
            yield (
                "optimization.execution_accelerators",
                f"precision_mode {precision} lowers the precision of a graph that was proved as "
                "it is typed; serve a graph typed by --dtype, or an engine",
            )


def check_ensemble(subject: ModelUnderLint, models: Mapping[str, ModelConfig]) -> Findings:
    """Check each step's model, and each tensor that goes from one step to the next.

    ``models`` are the repository's by name, as their ``config.pbtxt`` describes them.
    """
    config = subject.config
    if config.instance_group or config.HasField("optimization") or config.model_warmup:
        yield (
            "ensemble",
            "instance_group, optimization and model_warmup belong to its steps' models",
        )
    steps = config.ensemble_scheduling.step
    if not steps:
        yield "ensemble_scheduling", "has no step"
        return
    tensors = {tensor.name: tensor for tensor in config.input}
    read: set[str] = set()
    for index, step in enumerate(steps):
        where = f"ensemble_scheduling.step[{index}]"
        model = models.get(step.model_name)
        if model is None:
            yield where, f"model {step.model_name!r} is not in the repository"
            return
        yield from _check_step_batch(subject, model, where)
        yield from _check_inputs(step, model, tensors, where)
        read |= set(step.input_map.values())
        outputs = {tensor.name: tensor for tensor in model.output}
        for name, ours in step.output_map.items():
            if name not in outputs:
                yield f"{where}.output_map", f"{step.model_name} gives no {name!r}"
            else:
                tensors[ours] = outputs[name]
    for tensor in config.input:
        if tensor.name not in read:
            yield f"input {tensor.name!r}", "no step reads it"
    for tensor in config.output:
        given = tensors.get(tensor.name)
        where = f"output {tensor.name!r}"
        if given is None:
            yield where, "no step makes it"
        elif _described(given) != _described(tensor):
            yield where, f"{_described(tensor)}; its step gives {_described(given)}"


def _check_step_batch(subject: ModelUnderLint, model: ModelConfig, where: str) -> Findings:
    limit = subject.config.max_batch_size
    if model.max_batch_size < limit or (model.max_batch_size > 0) != (limit > 0):
        yield "max_batch_size", f"{limit}, and {where} ({model.name}) has {model.max_batch_size}"


def _check_inputs(
    step: Any, model: ModelConfig, tensors: Mapping[str, Any], where: str
) -> Findings:
    for tensor in model.input:
        ours = step.input_map.get(tensor.name)
        if ours is None:
            yield f"{where}.input_map", f"{tensor.name!r} gets nothing"
        elif ours not in tensors:
            yield f"{where}.input_map", f"nothing before it makes {ours!r}"
        elif _described(tensors[ours]) != _described(tensor):
            yield (
                f"{where}.input_map",
                f"{tensor.name!r} of {model.name} is {_described(tensor)}, and gets "
                f"{_described(tensors[ours])}",
            )
    for name in sorted(step.input_map.keys() - {tensor.name for tensor in model.input}):
        yield f"{where}.input_map", f"{model.name} takes no {name!r}"


def _described(tensor: Any) -> str:
    return f"{datatype_name(tensor.data_type)} {list(tensor.dims)}"


WARMUP = "warmup"  # Triton looks for warm-up data in this folder of the model's


def check_files(subject: ModelUnderLint, root: Path) -> Findings:
    """Check what lies beside a configuration; no file is opened that leaves ``root``."""
    yield from _check_versions(subject)
    yield from _check_capabilities(subject)
    yield from _check_labels(subject, root)
    yield from _check_warmup(subject, root)


def version_folders(folder: Path) -> dict[int, Path]:
    """List a model's versions as Triton does: folders named by a number without leading zeros."""
    return {
        int(entry.name): entry
        for entry in sorted(folder.iterdir())
        if re.fullmatch(r"[1-9][0-9]{0,17}", entry.name) and entry.is_dir()
    }


def model_files(subject: ModelUnderLint) -> list[str]:
    """List the files that a version must have, the default one first."""
    config = subject.config
    names = set(config.cc_model_filenames.values())
    if config.default_model_filename or not names:
        platform = subject.platform
        names.add(config.default_model_filename or (platform.filename if platform else ""))
    return sorted(names - {""})


def _check_versions(subject: ModelUnderLint) -> Findings:
    versions = version_folders(subject.folder)
    if not versions:
        yield "versions", "no version's folder; expected 1/"
    policy = subject.config.version_policy
    for number in policy.specific.versions:
        if number not in versions:
            yield "version_policy.specific", f"version {number} is not there"
    if policy.HasField("latest") and policy.latest.num_versions < 1:
        yield "version_policy.latest", "num_versions 0 serves no version"
    odd = re.compile(r"0[0-9]*|[0-9]+[^0-9].*")
    for entry in subject.folder.iterdir():
        if entry.is_dir() and odd.fullmatch(entry.name):
            yield f"{entry.name}/", "Triton ignores this folder: a version is a number from 1 on"


def _check_capabilities(subject: ModelUnderLint) -> Findings:
    named = subject.config.cc_model_filenames
    if named and subject.platform is Platform.ONNX:
        yield "cc_model_filenames", "only engines differ by GPU: it is ignored here"
        return
    for capability, name in sorted(named.items()):
        where = f"cc_model_filenames {capability!r}"
        if re.fullmatch(r"[0-9]{1,2}\.[0-9]", capability) is None:
            yield where, "is no compute capability; expected as in 8.9"
            continue
        for file, artifact in subject.artifacts:
            built = artifact.targets
            asked = ComputeCapability.parse(capability)
            if Path(file).name == name and built and asked not in built:
                yield where, f"{file} was built for {built}"


def _check_labels(subject: ModelUnderLint, root: Path) -> Findings:
    for output in subject.config.output:
        where = f"output {output.name!r} label_filename"
        if output.label_filename:
            yield from _check_label_file(subject, output, where, root)
        elif output.name == LOGITS and any(a.labels for _, a in subject.artifacts):
            yield Note(where, "missing: the classification extension answers without names")


def _check_label_file(subject: ModelUnderLint, output: Any, where: str, root: Path) -> Findings:
    name: str = output.label_filename
    path = safe_file(subject.folder, name, root)
    if isinstance(path, str):
        yield where, path
        return
    try:
        text = read_text(path, TRITON_LABELS)
    except SpecError as error:
        yield where, str(error)
        return
    labels = text.split("\n")[: -1 if text.endswith("\n") else None]
    classes = output.dims[-1] if output.dims else 0
    if classes > 0 and len(labels) != classes:
        yield where, f"{name} has {len(labels)} lines and the output {classes} classes"
    if "\r" in text:
        yield where, f"{name} has Windows line ends, and each label would keep one"
    for file, artifact in subject.artifacts:
        own = [one_line(label) for label in artifact.labels]
        if own and output.name == LOGITS and labels != own:
            yield where, f"{name} is not what the manifest of {file} calls its classes"


def one_line(label: str) -> str:
    """Write a class's name on one line, as a file of labels needs it."""
    return " ".join(label.split()).translate(IN_A_TEXT)


def _check_warmup(subject: ModelUnderLint, root: Path) -> Findings:
    config = subject.config
    inputs = {tensor.name: tensor for tensor in config.input}
    for sample in config.model_warmup:
        where = f"model_warmup {sample.name!r}"
        if not 1 <= sample.batch_size <= max(config.max_batch_size, 1):
            yield (
                f"{where} batch_size",
                f"{sample.batch_size} is not in 1 to {max(config.max_batch_size, 1)}",
            )
        for name in sorted(inputs.keys() ^ sample.inputs.keys()):
            what = "no such input" if name in sample.inputs else "an input without data"
            yield f"{where} inputs {name!r}", what
        for name in sorted(inputs.keys() & sample.inputs.keys()):
            given, tensor = sample.inputs[name], inputs[name]
            if given.data_type != tensor.data_type or not _same_dims(given.dims, tensor.dims):
                yield (
                    f"{where} inputs {name!r}",
                    f"{datatype_name(given.data_type)} {list(given.dims)}; the input is "
                    f"{datatype_name(tensor.data_type)} {list(tensor.dims)}",
                )
            elif given.WhichOneof("input_data_type") == "input_data_file":
                yield from _check_data(subject, given, f"{where} inputs {name!r}", root)


def _same_dims(sizes: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(sizes) == len(wanted) and all(
        size == want or (want == -1 and size > 0) for size, want in zip(sizes, wanted, strict=True)
    )


def _check_data(subject: ModelUnderLint, given: Any, where: str, root: Path) -> Findings:
    name = given.input_data_file
    path = safe_file(subject.folder / WARMUP, name, root)
    if isinstance(path, str):
        yield where, f"{WARMUP}/: {path}"
        return
    size = prod(given.dims) * SIZES.get(datatype_name(given.data_type), 0)
    if size and path.stat().st_size != size:
        yield where, f"{WARMUP}/{name} has {path.stat().st_size} bytes; expected {size}"
