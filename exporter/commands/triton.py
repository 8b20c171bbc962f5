"""The steps of ``msn-export triton``: artifacts, configuration, staged repository, check, place."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from msn_export.commands.jobs import TritonJob
from msn_export.errors import OutputError, SpecError
from msn_export.files import move_in, staging
from msn_export.input_files import TRITON_CONFIG, read_text
from msn_export.metrics.evaluate import draw
from msn_export.preprocessing import MODES, Preprocessing
from msn_export.processor_config import choose
from msn_export.progress import SILENT, Progress
from msn_export.schema import Result
from msn_export.spec import InputFormat, Targets
from msn_export.triton_server.checks import Issue
from msn_export.triton_server.config import Settings, from_text
from msn_export.triton_server.lint import RTX, lint
from msn_export.triton_server.model import (
    RELEASES,
    Platform,
    Release,
    ServedArtifact,
    for_tensorrt,
    parse_release,
    read_artifact,
)
from msn_export.triton_server.repository import (
    Served,
    join_version,
    model_folders,
    require_free,
    require_name,
    write,
)

__all__ = ["TritonJob", "run_triton"]  # the two that docs/python.md speaks of


def require_one_model(artifacts: Sequence[ServedArtifact]) -> None:
    """Require one graph, or engines of full TensorRT that are one model for different GPUs."""
    for artifact in artifacts:
        if artifact.platform is Platform.PLAN:
            _require_plan(artifact)
    if len(artifacts) == 1:
        return
    if any(artifact.platform is Platform.ONNX for artifact in artifacts):
        raise SpecError(
            "several artifacts are one model's engines for several GPUs, and an .onnx runs on all; "
            "give it alone, and a second model in a call of its own with another --name"
        )
    seen: dict[Targets, ServedArtifact] = {}
    for artifact in artifacts:
        if len(artifact.targets.named) != 1:
            raise SpecError(f"{artifact.path} does not say which GPU it is for; build it again")
        other = seen.setdefault(artifact.targets, artifact)
        if other is not artifact:
            raise SpecError(
                f"{other.path} and {artifact.path} are both for {artifact.targets}; give one"
            )
        _require_alike(artifact, artifacts[0])


def _require_plan(artifact: ServedArtifact) -> None:
    flavour, version = artifact.built_with or ("?", "?")
    if flavour != "tensorrt":
        raise SpecError(f"{artifact.path} is {RTX.format(version=version)}")
    if artifact.manifest is None:
        raise SpecError(
            f"{artifact.path} has no manifest, and an engine does not tell its tensors and "
            "profiles without a GPU; build it with msn-export trt"
        )


def _require_alike(artifact: ServedArtifact, first: ServedArtifact) -> None:
    for fact in ("inputs", "outputs", "profiles", "built_with", "labels"):
        if getattr(artifact, fact) != getattr(first, fact):
            raise SpecError(
                f"{artifact.path} and {first.path} differ in their {fact.replace('_', ' ')}; "
                "one model's engines are built from one graph by one TensorRT"
            )


# what is said in a model's configuration, and so with its first version
_CONFIGURATION = frozenset({
    "release", "max_batch", "instances", "queue_delay", "ensemble", "warmup", "response_cache",
    "cuda_graphs",
})  # fmt: skip


@dataclass(frozen=True, slots=True, repr=False)
class Written(Result):
    """A repository's new models: their names, the Triton they are for, and what to know."""

    repository: str
    model: str
    models: tuple[str, ...]
    version: int
    release: str
    image: str
    notes: tuple[str, ...]


def run_triton(job: TritonJob, progress: Progress = SILENT) -> Written:
    """Write models into a repository; they appear there checked and whole, or not at all.

    Raises:
        MsnExportError: whatever kept them from it; the repository is as it was.
    """
    name = job.name or job.artifacts[0].stem
    require_name(name)
    adding = _is_new_version(job, name)
    if adding:
        job = replace(job, release=_stated_release(job.output / name / "config.pbtxt"))
    with progress.step("read the artifacts"):
        artifacts = [read_artifact(path) for path in job.artifacts]
        require_one_model(artifacts)
    notes: list[str] = []
    served = _served(job, name, artifacts, notes)
    require_free(job.output, served.names, force=job.force or adding)
    with staging(job.output.absolute().parent) as stage:
        staged = stage / "repository"
        with progress.step("write the model"):
            write(model_folders(served, stage), staged)
        if adding:
            join_version(job.output / name, staged / name, job.version)
        with progress.step("check it as the server would"):
            notes += _require_sound(staged)
        if adding:
            move_in([str(job.version)], staged / name, job.output / name)
        else:
            move_in(served.names, staged, job.output)
    release = served.settings.release
    models = tuple(served.names)
    return Written(
        str(job.output), name, models, job.version, release.name, release.image, tuple(notes)
    )


def run_lint(repository: Path, release: str | None) -> tuple[Issue, ...]:
    """Check a repository.

    Raises:
        MsnExportError: it is no repository.
    """
    return lint(repository, read_artifact, parse_release(release) if release else None)


def _is_new_version(job: TritonJob, name: str) -> bool:
    """Check for a new version of a model that is there, whose configuration stays."""
    if job.version == 1 or not (job.output / name).is_dir():
        return False
    given = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(job)
        if field.name in _CONFIGURATION and getattr(job, field.name) != field.default
    ]
    if given:
        raise OutputError(
            f"--model-version {job.version} adds to {job.output / name}, whose configuration "
            f"stays; leave {' and '.join(given)} out"
        )
    return True


def _stated_release(config: Path) -> str | None:
    """Read for which Triton a model that is there was written."""
    stated = from_text(read_text(config, TRITON_CONFIG))
    return stated.parameters["triton_release"].string_value or None


def _served(
    job: TritonJob, name: str, artifacts: Sequence[ServedArtifact], notes: list[str]
) -> Served:
    """Decide how the artifacts are served; ``notes`` learns what had to be assumed."""
    first = artifacts[0]
    if job.cuda_graphs and first.platform is Platform.ONNX:
        raise SpecError(
            "--cuda-graphs: only Triton's tensorrt backend has them; build an engine, or leave it "
            "out"
        )
    notes += [note for artifact in artifacts for note in artifact.notes]
    notes += [_unproved(artifact) for artifact in artifacts if _unproved(artifact)]
    settings = Settings(
        release=_release(job.release, first),
        max_batch=job.max_batch,
        instances=job.instances,
        queue_delay=job.queue_delay,
        warmup=job.warmup,
        response_cache=job.response_cache,
        cuda_graphs=job.cuda_graphs,
    )
    preprocessing = None
    asked = job.ensemble or job.warmup or job.preprocess or job.exif
    is_picture = first.image is not None and first.image[1] in MODES
    if asked or first.preprocessing is not None or is_picture:
        preprocessing = _preprocessing(job, first)
        notes += preprocessing.notes
    return Served(
        repository=job.output.absolute(),
        name=name,
        version=job.version,
        artifacts=artifacts,
        settings=settings,
        preprocessing=preprocessing,
        ensemble=job.ensemble,
        warmup=_warmup_data(job, first, preprocessing, notes)
        if job.warmup and preprocessing is not None
        else None,
    )


def _unproved(artifact: ServedArtifact) -> str:
    """Name what nobody checked of an artifact; nothing where all was."""
    manifest, name = artifact.manifest, artifact.path.name
    if manifest is None:
        what = "" if artifact.metadata is not None else "what it is or "
        return f"{name} has no manifest: nothing says {what}whether it was checked"
    if manifest.check is None:
        return f"{name} was never compared with its source (--no-check)"
    if manifest.engine is not None and not manifest.engine.executed:
        return f"{name}: {manifest.engine.reason}"
    return ""


def _release(asked: str | None, artifact: ServedArtifact) -> Release:
    if asked is not None:
        return parse_release(asked)
    if artifact.built_with is not None and not artifact.version_compatible:
        return for_tensorrt(artifact.built_with[1])
    return RELEASES[0]  # the newest, whose onnxruntime takes the most


def _preprocessing(job: TritonJob, artifact: ServedArtifact) -> Preprocessing:
    """Settle how pictures are made for the ensemble and the warm-up."""
    own = artifact.preprocessing
    size, channels = (own.size, own.channels) if own else artifact.image or (None, 0)
    if size is None:
        takes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in artifact.inputs)
        raise SpecError(
            f"{artifact.path.name} takes {takes}, not images of a fixed size; leave --ensemble and "
            "--warmup out"
        )
    inside = artifact.inputs[0].dtype == InputFormat.UINT8
    return choose(own, size, channels, preprocess=job.preprocess, exif=job.exif, inside=inside)


def _warmup_data(
    job: TritonJob, artifact: ServedArtifact, preprocessing: Preprocessing, notes: list[str]
) -> bytes:
    """Make the model's input from a picture: one image, or the batch that alone it takes."""
    sample = draw(job.images, preprocessing)
    notes += [note for note in sample.notes if note not in notes]
    notes.append(f"warm-up data: {sample.source}")
    spec = artifact.inputs[0]
    return sample.preprocess(range(artifact.fixed_batch or 1), InputFormat.of(spec.dtype)).tobytes()


def _require_sound(staged: Path) -> list[str]:
    """Check what was staged with the checks of ``--lint``; give its notes."""
    findings = lint(staged, read_artifact)
    wrong = [f"{f.model}/{f.where}: {f.what}" for f in findings if f.level == "wrong"]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise SpecError(f"{wrong[0]}{more}")
    return [f"{f.model}/{f.where}: {f.what}" for f in findings]
