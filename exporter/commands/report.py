"""The steps of ``msn-export report``: what is known of artifacts and was measured, on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from msn_export import __version__
from msn_export.artifact import Artifact, is_checkpoint
from msn_export.benchmark.results import Bench, read_bench
from msn_export.commands.drift import drift_of
from msn_export.commands.jobs import DriftJob, ReportJob, ValidateJob
from msn_export.commands.validate import validate_in_full
from msn_export.compare.drift import Drift
from msn_export.compare.sides import open_engine
from msn_export.errors import (
    DeviceError,
    GraphError,
    ImageError,
    ManifestError,
    MissingPackageError,
    RunnerError,
    SpecError,
)
from msn_export.files import move, placing, require_writable, staging
from msn_export.manifest import CheckpointRecord, Manifest, manifest_path
from msn_export.models.checkpoint import Choices
from msn_export.progress import SILENT, Progress
from msn_export.reporting import gather
from msn_export.reporting.describe import origin_of
from msn_export.reporting.gather import Page, ReportedAgreement, ReportedArtifact
from msn_export.spec import ENGINES

__all__ = ["ReportJob", "run_report"]  # the two that docs/python.md speaks of


@dataclass(frozen=True, slots=True)
class Measured:
    """All that ran for the report; ``described`` are files, ``notes`` say what did not run."""

    described: dict[str, ReportedArtifact]
    agreements: dict[str, ReportedAgreement]
    drifts: tuple[Drift, ...]
    notes: tuple[str, ...]


def run_report(job: ReportJob, progress: Progress = SILENT) -> Page:
    """Write the page, and the Markdown if asked for.

    Returns:
        What the page shows; its ``state`` says whether all that ran agrees.

    Raises:
        MissingPackageError: jinja2 or matplotlib is not installed.
        MsnExportError: an artifact cannot be read, or nothing can be written.
    """
    _require_outputs(job)
    require_packages()
    if job.markdown is not None:
        _require_hub()
    job = _with_pictures(job)
    from msn_export.reporting.render import html, markdown

    files = _examine(job.artifacts)
    hashes: dict[str, set[str]] = {}  # two may have one name in two folders
    for file in files.values():
        hashes.setdefault(file.path.name, set()).add(file.sha256)
    latency = read_bench(job.bench, hashes) if job.bench is not None else None
    measured = _measure(job, files, progress)
    with progress.step("gather what is known"):
        for name, file in files.items():
            if name not in measured.described:
                measured.described[name] = _describe(file, measured.agreements.get(name))
        page = _page(job, measured, latency, hashes)
    with progress.step("write the report"):
        texts = {job.output: html(page)}
        if job.markdown is not None:
            texts[job.markdown] = markdown(page)
        for output, text in texts.items():
            with staging(output.parent) as stage:
                staged = stage / output.name
                staged.write_text(text, encoding="utf-8")
                with placing([output], force=job.force):
                    move(staged, output)
    return page


def _with_pictures(job: ReportJob) -> ReportJob:
    """Run on labelled pictures where no others are given."""
    if job.images is not None or job.labelled is None:
        return job
    return replace(job, images=job.labelled)


def _require_outputs(job: ReportJob) -> None:
    outputs = [path for path in (job.output, job.markdown) if path is not None]
    sources = [Path(name) for name in job.artifacts]
    sources += [manifest_path(path) for path in sources]
    sources += [job.bench] if job.bench is not None else []
    require_writable(outputs, force=job.force, sources=sources)


def require_packages() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib as mpl  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"a report needs {error.name}, which is not installed; pip install 'msn-export[report]'"
        ) from error


def _require_hub() -> None:
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "a model card needs huggingface_hub, which is not installed; "
            "pip install 'msn-export[report]'"
        ) from error


def _measure(job: ReportJob, files: Mapping[str, Artifact], progress: Progress) -> Measured:
    """Compare every artifact that can run with the first that can; describe those."""
    runnable: list[str] = []
    notes = ["nothing was run for this report: --images compares the artifacts on pictures"]
    if job.images is not None:
        runnable, notes = _runnable(job.artifacts, files)
        if len(runnable) < 2:
            notes.append(f"{job.images} was not run: pictures compare two artifacts that run here")
    described: dict[str, ReportedArtifact] = {}
    agreements: dict[str, ReportedAgreement] = {}
    drifts = []
    for candidate in runnable[1:]:
        asked, walked = _jobs(job, runnable[0], candidate)
        validation, ran = validate_in_full(asked, progress, files)
        agreements[candidate] = gather.live_agreement(validation, ran)
        try:
            drifts.append(drift_of(walked, progress, files))
        except (GraphError, ImageError) as error:
            notes.append(f"no drift of {Path(candidate).name}: {error}")
        if candidate in files and candidate != runnable[0]:
            described[candidate] = _describe(files[candidate], agreements[candidate])
    return Measured(described, agreements, tuple(drifts), tuple(notes))


def _describe(file: Artifact, agreement: ReportedAgreement | None) -> ReportedArtifact:
    """Describe a file, and give its graph's memory back."""
    found = gather.report_file(file, agreement.passed if agreement is not None else None)
    file.release()
    return found


def _jobs(job: ReportJob, reference: str, candidate: str) -> tuple[ValidateJob, DriftJob]:
    """Ask for both comparisons of a pair; what is said of a checkpoint goes where there is one."""
    preprocess, exif = job.preprocess, job.exif
    asked = ValidateJob(
        reference,
        candidate,
        job.images,
        job.limit,
        labelled=job.labelled,
        accuracy_drop=job.accuracy_drop,
        preprocess=preprocess,
        exif=exif,
    )
    walked = DriftJob(reference, candidate, job.images, preprocess=preprocess, exif=exif)
    if not any(map(is_checkpoint, (reference, candidate))):
        return asked, walked
    variant, weights, labels = job.variant, job.weights, job.labels
    return (
        replace(asked, variant=variant, weights=weights, labels=labels),
        replace(walked, variant=variant, weights=weights, labels=labels),
    )


def _runnable(
    artifacts: Sequence[str], files: Mapping[str, Artifact]
) -> tuple[list[str], list[str]]:
    """Separate the artifacts that run here from those that do not, with the reasons.

    One whose manifest is not believed does not: nothing says how it is fed.
    """
    runnable, notes = [], []
    for name in artifacts:
        reason = files[name].distrusted if name in files else None
        try:
            if reason is None and Path(name).suffix in ENGINES:
                open_engine(Path(name)).close()
        except DeviceError:
            raise
        except (RunnerError, ManifestError, MissingPackageError) as error:
            reason = str(error)
        if reason is None:
            runnable.append(name)
        else:
            notes.append(f"{Path(name).name} was not run for this report: {reason}")
    return runnable, notes


def _examine(artifacts: Sequence[str]) -> dict[str, Artifact]:
    files = {}
    for name in artifacts:
        if is_checkpoint(name):
            continue
        files[name] = Artifact.examine(Path(name))
    return files


def _stale(
    job: ReportJob, name: str, manifest: Manifest, hashes: Mapping[str, set[str]]
) -> str | None:
    """Describe the other file that an artifact was made from; None if it is the one here."""
    source, origin = manifest.source, manifest.checkpoint
    if source is not None and source.sha256 not in hashes.get(source.file, {source.sha256}):
        was, has, what = source.sha256, min(hashes[source.file]), source.file
    elif origin is not None and (here := _weights(job, origin)) and origin.sha256 not in here:
        was, has, what = origin.sha256, min(here), f"checkpoint, {origin.source}"
    else:
        return None
    return (
        f"{name} was made from another {what} (sha256 {was[:12]}…, this one has {has[:12]}…); "
        "make it again from this one, or compare the two with --images"
    )


def _weights(job: ReportJob, origin: CheckpointRecord) -> set[str]:
    """Hash the checkpoints' weights as ``origin`` does, where nothing runs to compare them."""
    found = set()
    for name in filter(is_checkpoint, job.artifacts if job.images is None else ()):
        from msn_export.models.checkpoint import load_checkpoint  # torch

        choices = Choices(job.variant, job.weights, job.labels)
        if name == origin.source and not choices:
            choices = Choices(origin.variant, origin.weights)
        found.add(load_checkpoint(name, choices).sha256)
    return found


def _page(
    job: ReportJob,
    measured: Measured,
    latency: Bench | None,
    hashes: Mapping[str, set[str]],
) -> Page:
    live = measured.agreements
    described, agreements, manifests = [], [], []
    for name in job.artifacts:
        if is_checkpoint(name):
            described.append(gather.report_checkpoint(name))
            continue
        found = measured.described[name]
        manifest = found.manifest
        manifests += [manifest] if manifest is not None else []
        stale = _stale(job, found.name, manifest, hashes) if manifest is not None else None
        if name in live:
            agreements.append(live[name])
        elif stale is not None:
            found = replace(found, verdict="stale", distrusted=stale)
        elif manifest is not None and manifest.check is not None:
            agreements.append(gather.recorded_agreement(found.name, manifest))
        described.append(found)
    if not any(artifact.is_file for artifact in described):
        raise SpecError("a report needs at least one exported file, .onnx or .engine")
    manifest = manifests[0] if manifests else None
    state, headline = gather.verdict(described, agreements)
    return Page(
        title=job.title or gather.title_of(manifest, described),
        subtitle=gather.subtitle_of(manifest),
        written=gather.now(),
        product=f"msn-export {__version__}",
        command=job.command,
        state=state,
        headline=headline,
        sentences=tuple(gather.sentences(described, agreements, measured.drifts)),
        origin=tuple(origin_of(manifest)),
        artifacts=tuple(described),
        agreements=tuple(agreements),
        drifts=measured.drifts,
        latency=latency,
        notes=measured.notes,
    )
