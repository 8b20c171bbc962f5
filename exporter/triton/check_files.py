"""The files a configuration names: versions, engines by GPU, labels, warm-up data."""

import re
from math import prod
from pathlib import Path

from msn_export.spec import ComputeCapability
from msn_export.triton import messages
from msn_export.triton.artifact import LOGITS, Platform
from msn_export.triton.findings import Findings, Subject, safe_file

LARGEST_LABELS = 16 * 2**20  # bytes
WARMUP = "warmup"  # Triton looks for warm-up data in this folder of the model's


def check_files(subject: Subject, root: Path) -> Findings:
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


def model_files(subject: Subject) -> list[str]:
    """List the files that a version must have, the default one first."""
    config = subject.config
    names = set(config.cc_model_filenames.values())
    if config.default_model_filename or not names:
        platform = subject.platform
        names.add(config.default_model_filename or (platform.filename if platform else ""))
    return sorted(names - {""})


def _check_versions(subject: Subject) -> Findings:
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


def _check_capabilities(subject: Subject) -> Findings:
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


def _check_labels(subject: Subject, root: Path) -> Findings:
    for output in subject.config.output:
        where = f"output {output.name!r} label_filename"
        if output.label_filename:
            yield from _check_label_file(subject, output, where, root)
        elif output.name == LOGITS and any(a.labels for _, a in subject.artifacts):
            yield subject.note(where, "missing: the classification extension answers without names")


def _check_label_file(subject: Subject, output: object, where: str, root: Path) -> Findings:
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


def _check_warmup(subject: Subject, root: Path) -> Findings:
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


def _check_data(subject: Subject, given: object, where: str, root: Path) -> Findings:
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
