"""A configuration against the files it names and the artifacts it serves."""

import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from msn_export.errors import SpecError
from msn_export.spec import ComputeCapability, TensorSpec
from msn_export.triton_server import config
from msn_export.triton_server import config as messages
from msn_export.triton_server.checks import Findings, ModelUnderLint, duplicates, safe_file
from msn_export.triton_server.config import dims, for_tensorrt, runs_opset, same_tensorrt
from msn_export.triton_server.model import LOGITS, Platform, ServedArtifact, first_uncovered

LARGEST_LABELS = 16 * 2**20  # bytes
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
        yield subject.wrong("versions", "no version's folder; expected 1/")
    policy = subject.config.version_policy
    for number in policy.specific.versions:
        if number not in versions:
            yield subject.wrong("version_policy.specific", f"version {number} is not there")
    if policy.HasField("latest") and policy.latest.num_versions < 1:
        yield subject.wrong("version_policy.latest", "num_versions 0 serves no version")
    odd = re.compile(r"0[0-9]*|[0-9]+[^0-9].*")
    for entry in subject.folder.iterdir():
        if entry.is_dir() and odd.fullmatch(entry.name):
            yield subject.wrong(
                f"{entry.name}/", "Triton ignores this folder: a version is a number from 1 on"
            )


def _check_capabilities(subject: ModelUnderLint) -> Findings:
    named = subject.config.cc_model_filenames
    if named and subject.platform is Platform.ONNX:
        yield subject.wrong("cc_model_filenames", "only engines differ by GPU: it is ignored here")
        return
    for capability, name in sorted(named.items()):
        where = f"cc_model_filenames {capability!r}"
        if re.fullmatch(r"[0-9]{1,2}\.[0-9]", capability) is None:
            yield subject.wrong(where, "is no compute capability; expected as in 8.9")
            continue
        for file, artifact in subject.artifacts:
            built = artifact.targets
            asked = ComputeCapability.parse(capability)
            if Path(file).name == name and built and asked not in built:
                yield subject.wrong(where, f"{file} was built for {built}")


def _check_labels(subject: ModelUnderLint, root: Path) -> Findings:
    for output in subject.config.output:
        where = f"output {output.name!r} label_filename"
        if output.label_filename:
            yield from _check_label_file(subject, output, where, root)
        elif output.name == LOGITS and any(a.labels for _, a in subject.artifacts):
            yield subject.note(where, "missing: the classification extension answers without names")


def _check_label_file(subject: ModelUnderLint, output: object, where: str, root: Path) -> Findings:
    name, dims = getattr(output, "label_filename", ""), list(getattr(output, "dims", ()))
    path = safe_file(subject.folder, name, root)
    if isinstance(path, str):
        yield subject.wrong(where, path)
        return
    if path.stat().st_size > LARGEST_LABELS:
        yield subject.wrong(where, f"{name} is too large for labels, one a line")
        return
    try:
        text = path.read_bytes().decode("utf-8")  # read_text would mend line ends
    except (OSError, UnicodeError) as error:
        yield subject.wrong(where, f"{name} cannot be read as UTF-8 ({error})")
        return
    labels = text.split("\n")[: -1 if text.endswith("\n") else None]
    classes = dims[-1] if dims else 0
    if classes > 0 and len(labels) != classes:
        yield subject.wrong(
            where, f"{name} has {len(labels)} lines and the output {classes} classes"
        )
    if "\r" in text:
        yield subject.wrong(where, f"{name} has Windows line ends, and each label would keep one")
    for file, artifact in subject.artifacts:
        own = [one_line(label) for label in artifact.labels]
        if own and getattr(output, "name", "") == LOGITS and labels != own:
            yield subject.wrong(
                where, f"{name} is not what the manifest of {file} calls its classes"
            )


def one_line(label: str) -> str:
    """Write a class's name on one line, as a file of labels needs it."""
    return " ".join(label.split())


def _check_warmup(subject: ModelUnderLint, root: Path) -> Findings:
    config = subject.config
    known = {tensor.name: tensor for tensor in config.input}
    for sample in config.model_warmup:
        where = f"model_warmup {sample.name!r}"
        if not 1 <= sample.batch_size <= max(config.max_batch_size, 1):
            yield subject.wrong(
                f"{where} batch_size",
                f"{sample.batch_size} is not in 1 to {max(config.max_batch_size, 1)}",
            )
        for name in sorted(known.keys() ^ sample.inputs.keys()):
            what = "no such input" if name in sample.inputs else "an input without data"
            yield subject.wrong(f"{where} inputs {name!r}", what)
        for name in sorted(known.keys() & sample.inputs.keys()):
            given, tensor = sample.inputs[name], known[name]
            if given.data_type != tensor.data_type or not _same_dims(given.dims, tensor.dims):
                yield subject.wrong(
                    f"{where} inputs {name!r}",
                    f"{messages.datatype_name(given.data_type)} {list(given.dims)}; the input is "
                    f"{messages.datatype_name(tensor.data_type)} {list(tensor.dims)}",
                )
            elif given.WhichOneof("input_data_type") == "input_data_file":
                yield from _check_data(subject, given, f"{where} inputs {name!r}", root)


def _same_dims(given: object, known: object) -> bool:
    sizes, wanted = list(given), list(known)  # type: ignore[call-overload]  # protobuf's repeated
    return len(sizes) == len(wanted) and all(
        size == want or (want == -1 and size > 0) for size, want in zip(sizes, wanted, strict=True)
    )


def _check_data(subject: ModelUnderLint, given: object, where: str, root: Path) -> Findings:
    name = getattr(given, "input_data_file", "")
    path = safe_file(subject.folder / WARMUP, name, root)
    if isinstance(path, str):
        yield subject.wrong(where, f"{WARMUP}/: {path}")
        return
    kind = messages.datatype_name(getattr(given, "data_type", 0))
    size = prod(getattr(given, "dims", ())) * messages.SIZES.get(kind, 0)
    if size and path.stat().st_size != size:
        yield subject.wrong(
            where, f"{WARMUP}/{name} has {path.stat().st_size} bytes; expected {size}"
        )


def check_tensors(subject: ModelUnderLint) -> Findings:
    """Check every artifact of every version."""
    for kind in ("input", "output"):
        tensors = getattr(subject.config, kind)
        yield from duplicates([tensor.name for tensor in tensors], kind, subject)
    for file, artifact in subject.artifacts:
        if not artifact.inputs:
            yield subject.note(
                file, "no manifest beside it: its tensors and profiles were not checked"
            )
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
    known = {spec.name: spec for spec in specs}
    there = ", ".join(known)
    if not tensors:
        yield subject.wrong(kind, f"section missing; {file} has {there}")
        return
    for name, tensor in tensors.items():
        if name not in known:
            yield subject.wrong(f"{kind} {name!r}", f"{file} has no such {kind}; it has {there}")
        else:
            yield from _check_tensor(subject, f"{kind} {name!r}", tensor, known[name])
    for name in known.keys() - tensors.keys():
        if kind == "input":
            yield subject.wrong(kind, f"{name!r} of {file} is missing")
        else:  # Triton serves the rest: a client that asks for it gets an error
            yield subject.wrong(kind, f"{name!r} of {file} is missing: no client can ask for it")


def _check_tensor(subject: ModelUnderLint, where: str, tensor: Any, spec: TensorSpec) -> Findings:
    found = config.datatype_name(tensor.data_type)
    expected = config.DATATYPES.get(spec.dtype, spec.dtype)
    if found != expected:
        yield subject.wrong(f"{where} data_type", f"{found}; the artifact's is {expected}")
    if getattr(tensor, "optional", False):
        yield subject.wrong(f"{where} optional", "the artifact cannot run without it")
    if getattr(tensor, "allow_ragged_batch", False):
        yield subject.wrong(f"{where} allow_ragged_batch", "images of one batch have one shape")
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
    yield subject.wrong(f"{where} {what}", f"{sizes}; the artifact's are {wanted}{hint}")


def _fits(sizes: list[int], wanted: list[int]) -> bool:
    """Say whether dims are the artifact's; where that is dynamic, any size is."""
    return len(sizes) == len(wanted) and all(
        want in {size, -1} for size, want in zip(sizes, wanted, strict=True)
    )


def _check_batch(subject: ModelUnderLint, artifact: ServedArtifact, file: str) -> Findings:
    limit = subject.config.max_batch_size
    fixed = artifact.fixed_batch
    if limit > 0 and fixed is not None:
        yield subject.wrong(
            "max_batch_size",
            f"{limit}, and {file} takes a batch of {fixed} alone; "
            f"expected 0, with the batch in dims",
        )
    elif limit == 0 and fixed is None:
        yield subject.wrong(
            "max_batch_size", f"0, and {file} has a dynamic batch: no requests are joined"
        )
    elif limit > 0 and artifact.profiles:
        missing = artifact.uncovered(limit)
        told = ", ".join(map(str, artifact.profiles))
        if missing is None:
            return
        if artifact.platform is Platform.PLAN:
            yield subject.wrong(
                "max_batch_size",
                f"{limit}, and no profile of {file} takes a batch of {missing} (profiles: {told})",
            )
        else:
            yield subject.note(
                "max_batch_size", f"{limit} is more than {file} was checked with ({told})"
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
                yield subject.wrong(
                    where, f"{text!r} is out of range: {file} has {len(artifact.profiles)} profiles"
                )
            else:
                chosen.append(artifact.profiles[index])
        missing = first_uncovered(chosen, limit)
        if chosen and missing is not None and artifact.uncovered(limit) is None:
            yield subject.wrong(
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
            yield subject.wrong(file, RTX.format(version=version))
        elif release is not None and not artifact.version_compatible:
            yield from _check_tensorrt(subject, version, file)
    elif (
        artifact.opset is not None
        and release is not None
        and runs_opset(release, artifact.opset) is False
    ):
        yield subject.wrong(
            file,
            f"opset {artifact.opset} needs onnxruntime 1.23, and Triton {release.name} has "
            f"{release.onnxruntime}; use a later one",
        )


def _check_tensorrt(subject: ModelUnderLint, version: str, file: str) -> Findings:
    release = subject.release
    assert release is not None
    if release.tensorrt is None:
        yield subject.note(
            file, f"which TensorRT is in Triton {release.name} is not known; it needs {version}"
        )
    elif not same_tensorrt(release.tensorrt, version):
        try:
            fitting = f"Triton {for_tensorrt(version).name} has that one"
        except SpecError:
            fitting = ""
        yield subject.wrong(
            file,
            f"built by TensorRT {version}, and Triton {release.name} has {release.tensorrt}; "
            f"{fitting or 'build it with that one'}",
        )


RTX = (
    "a TensorRT-RTX {version} engine: Triton's tensorrt backend loads those of full TensorRT only; "
    "serve the .onnx, or compile with --backend tensorrt on the machine with the GPU"
)
