"""Check a repository, and its configurations against the artifacts that they serve."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from msn_export.errors import MsnExportError, SpecError
from msn_export.input_files import TRITON_CONFIG, read_text
from msn_export.spec import Dtype, TensorSpec
from msn_export.triton_server.checks import (
    Findings,
    Issue,
    ModelUnderLint,
    Note,
    ReadArtifact,
    check_config,
    check_ensemble,
    check_files,
    model_files,
    safe_file,
    version_folders,
)
from msn_export.triton_server.config import DATATYPES, ModelConfig, datatype_name, dims, from_text
from msn_export.triton_server.model import (
    Platform,
    Release,
    ServedArtifact,
    first_uncovered,
    for_tensorrt,
    parse_release,
    same_tensorrt,
    takes,
)
from msn_export.version_table import Client

CONFIG = "config.pbtxt"
# Types that nobody serves on a CPU; the version table says what onnxruntime does there
_FOR_GPUS = frozenset({Dtype.BF16, Dtype.FP8})
VARIANTS = "configs"


def lint(repository: Path, read: ReadArtifact, release: Release | None = None) -> tuple[Issue, ...]:
    """Check every model of a repository, each of its configurations against each version.

    Args:
        repository: the folder that ``tritonserver --model-repository`` takes.
        read: reads one artifact.
        release: the Triton that will serve it; None takes what a configuration states.
    """
    configs: dict[str, ModelConfig] = {}
    subjects: list[ModelUnderLint] = []
    found: list[Issue] = []
    for folder in _model_folders(repository):
        for file, config in _configurations(folder, repository, found):
            if file == CONFIG:
                configs[folder.name] = config
            subjects.append(_subject(folder, file, config, release, found))
    read = cache(read)  # several configurations of a model share what was read
    for subject in subjects:
        found.extend(map(subject.issue, _check(subject, configs, repository, read)))
    return tuple(dict.fromkeys(found))


def _model_folders(repository: Path) -> list[Path]:
    if not repository.is_dir():
        raise SpecError(f"repository {repository} is no folder; give what -o wrote")
    if (repository / CONFIG).exists():
        raise SpecError(
            f"{repository} is one model's folder; give the repository around it, "
            f"{repository.absolute().parent}"
        )
    folders = sorted(entry for entry in repository.iterdir() if entry.is_dir())
    if not folders:
        raise SpecError(f"repository {repository} holds no model's folder; give what -o wrote")
    return folders


def _configurations(
    folder: Path, root: Path, found: list[Issue]
) -> Iterator[tuple[str, ModelConfig]]:
    """Parse a model's configurations, the default one first; report those that cannot be."""
    files = [CONFIG]
    if (folder / VARIANTS).is_dir():
        variants = sorted(path.name for path in (folder / VARIANTS).glob("*.pbtxt"))
        files += [f"{VARIANTS}/{name}" for name in variants]
    for file in files:
        path = safe_file((folder / file).parent, Path(file).name, root)
        if isinstance(path, Path):
            try:
                yield file, from_text(read_text(path, TRITON_CONFIG))
                continue
            except SpecError as error:
                reason = f"is no model configuration ({error})"
        else:
            reason = path
        if not os.path.lexists(folder / file):
            reason += "; without one Triton makes its own up, with a batch of 4 at most"
        found.append(Issue("wrong", folder.name, file, reason))


def _subject(
    folder: Path, file: str, config: ModelConfig, release: Release | None, found: list[Issue]
) -> ModelUnderLint:
    stated = config.parameters["triton_release"].string_value if config.parameters else ""
    if release is None and stated:
        try:
            release = parse_release(stated)
        except SpecError as error:
            found.append(Issue("wrong", folder.name, f"{file}: triton_release", str(error)))
    return ModelUnderLint(folder, file, config, _platform(config), release=release)


def _platform(config: ModelConfig) -> Platform | None:
    """Find which of our backends serves a model; None for an ensemble, or one not ours."""
    for platform in Platform:
        if config.platform == platform or (
            not config.platform and config.backend == platform.backend
        ):
            return platform
    return None


def _check(
    subject: ModelUnderLint, configs: dict[str, ModelConfig], root: Path, read: ReadArtifact
) -> Findings:
    config = subject.config
    if config.platform == "ensemble" or config.HasField("ensemble_scheduling"):
        yield from check_config(subject)
        yield from check_files(subject, root)
        yield from check_ensemble(subject, configs)
        return
    if subject.platform is None:
        named = config.platform or config.backend or "none"
        yield Note("platform", f"{named}: only onnxruntime_onnx and tensorrt_plan are checked")
        return
    yield from _read_versions(subject, root, read)
    yield from check_config(subject)
    yield from check_tensors(subject)
    yield from check_files(subject, root)


def _read_versions(subject: ModelUnderLint, root: Path, read: ReadArtifact) -> Findings:
    """Read each version's files into ``subject``; report those that are missing or damaged."""
    assert subject.platform is not None
    for version, folder in version_folders(subject.folder).items():
        for name in model_files(subject):
            path = safe_file(folder, name, root)
            if isinstance(path, str):
                yield f"{version}/", path
                continue
            try:
                artifact = read(path, subject.platform)
            except MsnExportError as error:
                yield f"{version}/{name}", str(error)
            else:
                subject.versions.setdefault(version, {})[name] = artifact


def check_tensors(subject: ModelUnderLint) -> Findings:
    for kind in ("input", "output"):
        names = Counter(tensor.name for tensor in getattr(subject.config, kind))
        for name in sorted(name for name, count in names.items() if count > 1):
            yield kind, f"{name!r} is there twice"
    for file, artifact in subject.artifacts:
        if not artifact.inputs:
            yield Note(file, "no manifest beside it: its tensors and profiles were not checked")
        else:
            yield from _check_kind(subject, "input", artifact.inputs, file)
            yield from _check_kind(subject, "output", artifact.outputs, file)
            yield from _check_batch(subject, artifact, file)
            yield from _check_profiles(subject, artifact, file)
        yield from _check_release(subject, artifact, file)


def _check_kind(
    subject: ModelUnderLint, kind: str, specs: Sequence[TensorSpec], file: str
) -> Findings:
    tensors = {tensor.name: tensor for tensor in getattr(subject.config, kind)}
    expected = {spec.name: spec for spec in specs}
    names = ", ".join(expected)
    if not tensors:
        yield kind, f"section missing; {file} has {names}"
        return
    for name, tensor in tensors.items():
        if name not in expected:
            yield f"{kind} {name!r}", f"{file} has no such {kind}; it has {names}"
        else:
            yield from _check_tensor(subject, f"{kind} {name!r}", tensor, expected[name])
    for name in expected.keys() - tensors.keys():
        if kind == "input":
            yield kind, f"{name!r} of {file} is missing"
        else:  # Triton serves the rest: a client that asks for it gets an error
            yield kind, f"{name!r} of {file} is missing: no client can ask for it"


def _check_tensor(subject: ModelUnderLint, where: str, tensor: Any, spec: TensorSpec) -> Findings:
    dtype, expected = datatype_name(tensor.data_type), DATATYPES.get(spec.dtype, spec.dtype)
    if dtype != expected:
        yield f"{where} data_type", f"{dtype}; the artifact's is {expected}"
    if getattr(tensor, "optional", False):
        yield f"{where} optional", "the artifact cannot run without it"
    if getattr(tensor, "allow_ragged_batch", False):
        yield f"{where} allow_ragged_batch", "images of one batch have one shape"
    batching = subject.config.max_batch_size > 0
    if tensor.HasField("reshape"):
        sizes, what = list(tensor.reshape.shape), "reshape"
    else:
        sizes, what = list(tensor.dims), "dims"
    wanted = dims(spec, batching=batching)
    if _fits(sizes, wanted):
        return
    hint = ""
    if batching and _fits(sizes, dims(spec, batching=False)):
        hint = "; leave the batch out: max_batch_size stands for it"
    elif not batching and _fits(sizes, dims(spec, batching=True)):
        hint = "; with max_batch_size 0 the batch belongs into dims"
    yield f"{where} {what}", f"{sizes}; the artifact's are {wanted}{hint}"


def _fits(sizes: list[int], wanted: list[int]) -> bool:
    """True where dims are the artifact's; where one of its is dynamic, any size is."""
    return len(sizes) == len(wanted) and all(
        want in {size, -1} for size, want in zip(sizes, wanted, strict=True)
    )


def _check_batch(subject: ModelUnderLint, artifact: ServedArtifact, file: str) -> Findings:
    limit = subject.config.max_batch_size
    fixed = artifact.fixed_batch
    if limit > 0 and fixed is not None:
        yield (
            "max_batch_size",
            f"{limit}, and {file} takes a batch of {fixed} alone; "
            f"expected 0, with the batch in dims",
        )
    elif limit == 0 and fixed is None:
        yield "max_batch_size", f"0, and {file} has a dynamic batch: no requests are joined"
    elif limit > 0 and artifact.profiles:
        missing = artifact.uncovered(limit)
        profiles = ", ".join(map(str, artifact.profiles))
        if missing is None:
            return
        if artifact.platform is Platform.PLAN:
            yield (
                "max_batch_size",
                f"{limit}, and no profile of {file} takes a batch of {missing} "
                f"(profiles: {profiles})",
            )
        else:
            yield Note(
                "max_batch_size",
                f"{limit} is more than {file} was checked with ({profiles})",
            )


def _check_profiles(subject: ModelUnderLint, artifact: ServedArtifact, file: str) -> Findings:
    if artifact.platform is not Platform.PLAN:
        return
    limit = subject.config.max_batch_size
    for number, group in enumerate(subject.config.instance_group):
        where = f"instance_group[{number}].profile"
        chosen = []
        for text in group.profile or ["0"]:
            index = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else -1
            if not 0 <= index < len(artifact.profiles):
                count = len(artifact.profiles)
                yield where, f"{text!r} is out of range: {file} has {count} profiles"
            else:
                chosen.append(artifact.profiles[index])
        missing = first_uncovered(chosen, limit)
        if chosen and missing is not None and artifact.uncovered(limit) is None:
            yield (
                where,
                f"these instances take no batch of {missing}, and Triton gives any request to any "
                f"instance; list all profiles in one group: "
                f"{[str(i) for i in range(len(artifact.profiles))]}",
            )


def _check_release(subject: ModelUnderLint, artifact: ServedArtifact, file: str) -> Findings:
    release = subject.release
    if artifact.built_with is not None:
        flavour, version = artifact.built_with
        if flavour != "tensorrt":
            yield file, RTX.format(version=version)
        elif release is not None and not artifact.version_compatible:
            yield from _check_tensorrt(subject, version, file)
    elif artifact.row is not None and release is not None and takes(release, artifact.row) is False:
        cell, has = artifact.row[Client.ONNXRUNTIME], f"{release.name} has {release.onnxruntime}"
        needs = f"onnxruntime {cell.least or f'after {cell.newest}'}, and Triton {has}"
        if artifact.stated is not None and artifact.stated.dtype in _FOR_GPUS:
            yield Note(file, f"on a CPU it needs {needs}")
        else:
            yield file, f"it needs {needs}; use a later release"


def _check_tensorrt(subject: ModelUnderLint, version: str, file: str) -> Findings:
    release = subject.release
    assert release is not None
    if release.tensorrt is None:
        yield Note(
            file,
            f"which TensorRT is in Triton {release.name} is not known; it needs {version}",
        )
    elif not same_tensorrt(release.tensorrt, version):
        try:
            fitting = f"Triton {for_tensorrt(version).name} has that one"
        except SpecError:
            fitting = ""
        yield (
            file,
            f"built by TensorRT {version}, and Triton {release.name} has {release.tensorrt}; "
            f"{fitting or 'build it with that one'}",
        )


RTX = (
    "a TensorRT-RTX {version} engine: Triton's tensorrt backend loads those of full TensorRT only; "
    "serve the .onnx, or compile with --backend tensorrt on the machine with the GPU"
)
