"""Check a repository: what Triton would refuse, and what it accepts and serves wrongly."""

from collections.abc import Iterator
from pathlib import Path

from msn_export.errors import MsnExportError, SpecError
from msn_export.triton_server import config as messages
from msn_export.triton_server.check_artifacts import (
    check_files,
    check_tensors,
    model_files,
    version_folders,
)
from msn_export.triton_server.checks import (
    Findings,
    Issue,
    ModelUnderLint,
    ReadArtifact,
    check_config,
    check_ensemble,
    safe_file,
)
from msn_export.triton_server.config import ModelConfig, Release, parse_release
from msn_export.triton_server.model import Platform, ServedArtifact

CONFIG = "config.pbtxt"
VARIANTS = "configs"
LARGEST_CONFIG = 2**20  # bytes


def lint(repository: Path, read: ReadArtifact, release: Release | None = None) -> tuple[Issue, ...]:
    """Check every model of a repository, each of its configurations against each version.

    Args:
        repository: the folder that ``tritonserver --model-repository`` takes.
        read: reads one artifact.
        release: the Triton that will serve it; None takes what a configuration states.
    """
    folders = _model_folders(repository)
    configs: dict[str, ModelConfig] = {}
    subjects: list[ModelUnderLint] = []
    found: list[Issue] = []
    for folder in folders:
        for config in _configurations(folder, repository, found):
            place, parsed = config
            if place == CONFIG:
                configs[folder.name] = parsed
            subjects.append(_subject(folder, place, parsed, release, found))
    artifacts: dict[Path, ServedArtifact] = {}
    for subject in subjects:
        found.extend(_check(subject, configs, repository, _once(read, artifacts)))
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
    places = [CONFIG]
    if (folder / VARIANTS).is_dir():
        variants = sorted(path.name for path in (folder / VARIANTS).glob("*.pbtxt"))
        places += [f"{VARIANTS}/{name}" for name in variants]
    for place in places:
        path = safe_file((folder / place).parent, Path(place).name, root)
        reason = path if isinstance(path, str) else _why_too_large(path)
        if reason is None:
            assert isinstance(path, Path)
            try:
                yield place, messages.from_text(path.read_text(encoding="utf-8"))
                continue
            except (OSError, UnicodeError, SpecError) as error:
                reason = f"is no model configuration ({error})"
        elif not (folder / place).exists():
            reason += "; without one Triton makes its own up, with a batch of 4 at most"
        found.append(Issue("wrong", folder.name, place, reason))


def _why_too_large(path: Path) -> str | None:
    size = path.stat().st_size
    return None if size <= LARGEST_CONFIG else f"is {size} bytes; no configuration is that large"


def _subject(
    folder: Path, place: str, config: ModelConfig, release: Release | None, found: list[Issue]
) -> ModelUnderLint:
    stated = config.parameters["triton_release"].string_value if config.parameters else ""
    if release is None and stated:
        try:
            release = parse_release(stated)
        except SpecError as error:
            found.append(Issue("wrong", folder.name, f"{place}: triton_release", str(error)))
    return ModelUnderLint(folder, place, config, _platform(config), release=release)


def _platform(config: ModelConfig) -> Platform | None:
    """Find out which of our backends serves a model; None for an ensemble, or one not ours."""
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
        yield subject.note(
            "platform", f"{named}: only onnxruntime_onnx and tensorrt_plan are checked"
        )
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
                yield subject.wrong(f"{version}/", path)
                continue
            try:
                artifact = read(path, subject.platform)
            except MsnExportError as error:
                yield subject.wrong(f"{version}/{name}", str(error))
            else:
                subject.versions.setdefault(version, {})[name] = artifact


def _once(read: ReadArtifact, known: dict[Path, ServedArtifact]) -> ReadArtifact:
    """Let several configurations of a model share what was read."""

    def read_once(path: Path, platform: Platform) -> ServedArtifact:
        artifact = known.get(path)
        if artifact is None:
            artifact = known[path] = read(path, platform)
        return artifact

    return read_once
