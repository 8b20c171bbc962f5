"""A configuration against the artifacts it serves: tensors, batches, profiles, versions."""

from collections.abc import Sequence
from typing import Any

from msn_export.errors import SpecError
from msn_export.spec import TensorSpec
from msn_export.triton import messages
from msn_export.triton.artifact import Artifact, Platform, first_uncovered
from msn_export.triton.check_config import duplicates
from msn_export.triton.config import dims
from msn_export.triton.findings import Findings, Subject
from msn_export.triton.releases import for_tensorrt, runs_opset, same_tensorrt


def check_tensors(subject: Subject) -> Findings:
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


def _check_kind(subject: Subject, kind: str, specs: Sequence[TensorSpec], file: str) -> Findings:
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


def _check_tensor(subject: Subject, where: str, tensor: Any, spec: TensorSpec) -> Findings:
    found = messages.datatype_name(tensor.data_type)
    expected = messages.DATATYPES.get(spec.dtype, spec.dtype)
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


def _check_batch(subject: Subject, artifact: Artifact, file: str) -> Findings:
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


def _check_profiles(subject: Subject, artifact: Artifact, file: str) -> Findings:
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


def _check_release(subject: Subject, artifact: Artifact, file: str) -> Findings:
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


def _check_tensorrt(subject: Subject, version: str, file: str) -> Findings:
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
