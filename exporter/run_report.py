"""The story of ``msn-export report``: what is known of artifacts and was measured, on one page."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from msn_export import __version__
from msn_export import manifest as manifests
from msn_export.artifact import ENGINES, is_checkpoint
from msn_export.artifact_facts import artifact_facts, checkpoint_facts
from msn_export.check.drift import StageDrift, TensorDrift
from msn_export.check.gate import GATES, in_words
from msn_export.check.neighbours import embedding_of, nearest
from msn_export.check.verify import Verified
from msn_export.driver import NoDriver, find_driver
from msn_export.errors import GraphError, MissingPackageError, SpecError
from msn_export.files import require_writable, staging
from msn_export.manifest import Manifest
from msn_export.progress import Progress
from msn_export.report import facts
from msn_export.run_drift import Drift, DriftJob, run_drift
from msn_export.run_validate import ValidateJob, Validation, validate_in_full

WORST = 3  # images shown of each comparison


@dataclass(frozen=True, slots=True)
class ReportJob:
    """What ``msn-export report`` was asked for; the first artifact is the others' reference."""

    artifacts: tuple[str, ...]
    output: Path = Path("report.html")
    markdown: Path | None = None
    images: Path | None = None
    limit: int = 64
    bench: Path | None = None
    variant: str | None = None
    title: str | None = None
    force: bool = False
    command: str = ""


@dataclass(frozen=True, slots=True)
class Measured:
    """What ran for the report, by artifact, and what could not."""

    agreements: dict[str, facts.Agreement]
    drifts: tuple[facts.Drift, ...]
    notes: tuple[str, ...]


def run_report(job: ReportJob, progress: Progress) -> facts.Page:
    """Write the page, and the Markdown if asked for.

    Returns:
        What the page shows; its ``state`` says whether all that ran agrees.

    Raises:
        MissingPackageError: jinja2 or matplotlib is not installed.
        MsnExportError: an artifact cannot be read, or nothing can be written.
    """
    outputs = [path for path in (job.output, job.markdown) if path is not None]
    require_writable(outputs, force=job.force)
    require_packages()
    from msn_export.report.latency import read_latency
    from msn_export.report.page import html, markdown

    latency = read_latency(job.bench) if job.bench is not None else None
    measured = _measure(job, progress)
    with progress.step("gather what is known"):
        page = _page(job, measured, latency)
    with progress.step("write the report"), staging(job.output.parent) as stage:
        texts = {job.output: html(page)}
        if job.markdown is not None:
            texts[job.markdown] = markdown(page)
        for output, text in texts.items():
            staged = stage / output.name
            staged.write_text(text, encoding="utf-8")
            staged.replace(output)
    return page


def require_packages() -> None:
    """Require what only a report needs.

    Raises:
        MissingPackageError: it is not installed; the message has the line that does.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib as mpl  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"a report needs {error.name}, which is not installed; pip install 'msn-export[report]'"
        ) from error


def _measure(job: ReportJob, progress: Progress) -> Measured:
    """Compare every artifact that can run with the first that can."""
    if job.images is None:
        note = "nothing was run for this report: --images compares the artifacts on pictures"
        return Measured({}, (), (note,))
    runnable, notes = _runnable(job.artifacts)
    agreements: dict[str, facts.Agreement] = {}
    drifts = []
    reference = runnable[0] if runnable else None
    for candidate in runnable[1:]:
        assert reference is not None  # it is the first
        asked = ValidateJob(reference, candidate, job.images, job.limit, variant=job.variant)
        validation, verified = validate_in_full(asked, progress)
        agreements[candidate] = _live(validation, verified)
        try:
            found = run_drift(
                DriftJob(reference, candidate, job.images, variant=job.variant), progress
            )
        except GraphError as error:
            notes.append(f"no drift of {Path(candidate).name}: {error}")
        else:
            drifts.append(_drift(found))
    return Measured(agreements, tuple(drifts), tuple(notes))


def _runnable(artifacts: Sequence[str]) -> tuple[list[str], list[str]]:
    driver = find_driver()
    runnable, notes = [], []
    for name in artifacts:
        if Path(name).suffix in ENGINES and isinstance(driver, NoDriver):
            notes.append(f"{Path(name).name} was not run for this report: {driver.reason}")
        else:
            runnable.append(name)
    return runnable, notes


def _live(validation: Validation, verified: Verified) -> facts.Agreement:
    return facts.Agreement(
        candidate=_short(validation.candidate.name),
        reference=_short(validation.reference.name),
        live=True,
        passed=validation.passed,
        check=validation.check,
        gate=f"{validation.gate_name}: {validation.gate}, because {validation.gate.reason}",
        reasons=validation.reasons,
        cause=validation.cause,
        notes=validation.notes,
        worst=_worst(validation, verified),
    )


def _worst(validation: Validation, verified: Verified) -> tuple[facts.Worst, ...]:
    """Show the images that agree least with the neighbours that either side finds for them."""
    sample = verified.reference.sample
    if len(sample) < 3:
        return ()
    from msn_export.report.pictures import thumbnail

    name = next(iter(verified.vectors))
    theirs = nearest(embedding_of(verified.reference.outputs[name]))
    mine = nearest(verified.vectors[name])
    cosines = [-2.0 if i.cosine is None else i.cosine for i in validation.check.per_image]
    order = np.argsort(np.nan_to_num(cosines, nan=-2.0), kind="stable")[:WORST]

    def shown(index: int) -> facts.Picture:
        return thumbnail(sample.names[index], sample.pixels[index])

    records = validation.check.per_image
    return tuple(
        facts.Worst(
            shown(i), records[i].cosine, records[i].max_abs, shown(theirs[i]), shown(mine[i])
        )
        for i in order.tolist()
    )


def _drift(found: Drift) -> facts.Drift:
    blocks = [stage for stage in found.stages if stage.name.startswith("block ")]
    median = statistics.median(stage.added for stage in blocks)
    most = max(stage.added for stage in blocks)
    if found.parted is not None:
        sentence = f"They part at {found.parted}, the first stage whose error is not allowed."
    else:
        times = f", {most / median:.1f} times the median block" if median > 0 else ""
        sentence = f"No stage is past what is allowed; {found.suspect} adds the most error{times}."
    return facts.Drift(
        candidate=_short(found.candidate),
        reference=_short(found.reference),
        sentence=sentence,
        parted=found.parted,
        stages=tuple(_stage(stage) for stage in found.stages),
        suspect=found.suspect,
        inside=tuple(_tensor(tensor) for tensor in found.inside),
    )


def _stage(stage: StageDrift) -> facts.Stage:
    tensor = stage.tensor
    return facts.Stage(
        stage.name, tensor.cosine_min, tensor.relative, tensor.max_abs, stage.peak,
        stage.allowed, stage.added, stage.headroom, stage.peak_tensor,
    )  # fmt: skip


def _tensor(tensor: TensorDrift) -> facts.Stage:
    return facts.Stage(
        tensor.name, tensor.cosine_min, tensor.relative, tensor.max_abs, tensor.largest
    )


def _page(job: ReportJob, measured: Measured, latency: facts.Latency | None) -> facts.Page:
    live = measured.agreements
    described = [
        checkpoint_facts(name)
        if is_checkpoint(name)
        else artifact_facts(Path(name), live[name].passed if name in live else None)
        for name in job.artifacts
    ]
    if not any(artifact.bytes is not None for artifact in described):
        raise SpecError("a report needs at least one exported file, .onnx or .engine")
    known = [manifests.read(Path(name)) for name in job.artifacts if not is_checkpoint(name)]
    manifest = next((found for found in known if found is not None), None)
    agreements = _agreements(job, measured)
    state, headline = _verdict(described, agreements)
    return facts.Page(
        title=job.title or _title(manifest, described),
        subtitle=_subtitle(manifest),
        written=_now(),
        product=f"msn-export {__version__}",
        command=job.command,
        state=state,
        headline=headline,
        sentences=tuple(_sentences(described, agreements, measured.drifts)),
        origin=tuple(_origin(manifest)),
        artifacts=tuple(described),
        agreements=agreements,
        drifts=measured.drifts,
        latency=latency,
        notes=measured.notes,
    )


def _agreements(job: ReportJob, measured: Measured) -> tuple[facts.Agreement, ...]:
    """Give what ran now, and for the rest what their manifests say was measured then."""
    found = []
    for name in job.artifacts:
        if name in measured.agreements:
            found.append(measured.agreements[name])
            continue
        manifest = None if is_checkpoint(name) else manifests.read(Path(name))
        if manifest is not None and manifest.check is not None:
            found.append(_recorded(Path(name).name, manifest))
    return tuple(found)


def _recorded(name: str, manifest: Manifest) -> facts.Agreement:
    check = manifest.check
    assert check is not None
    gate = in_words(check.gate or GATES[manifest.dtype].numbers)
    notes = check.notes
    if manifest.engine is not None and not manifest.engine.executed:
        notes = ("the typed graph was compared, the engine did not run", *notes)
    return facts.Agreement(
        candidate=name,
        reference=_reference(manifest, check.reference),
        live=False,
        passed=check.passed,
        check=check,
        gate=f"{manifest.dtype}: {gate}",
        notes=notes,
    )


def _reference(manifest: Manifest, named: str) -> str:
    """Name what a manifest's check compared with: a checkpoint's graph, or a graph's engine."""
    if manifest.kind == "onnx" and manifest.checkpoint is not None:
        return f"{manifest.checkpoint.source} in PyTorch"
    return _short(named.split(" in ", maxsplit=1)[0])


def _verdict(
    artifacts: Sequence[facts.Artifact], agreements: Sequence[facts.Agreement]
) -> tuple[facts.State, str]:
    failed = [found.candidate for found in agreements if not found.passed]
    if failed:
        return "failed", f"{', '.join(failed)}: not what the reference is"
    if not agreements:
        return "partial", "Nothing was compared"
    idle = [a.name for a in artifacts if a.verdict in {"compiled, not run", "not checked"}]
    if idle:
        return "partial", f"Everything that ran agrees; {', '.join(idle)} did not run"
    return "passed", "Every artifact agrees with its reference"


def _sentences(
    artifacts: Sequence[facts.Artifact],
    agreements: Sequence[facts.Agreement],
    drifts: Sequence[facts.Drift],
) -> list[str]:
    said = []
    idle = {a.name for a in artifacts if a.verdict == "compiled, not run"}
    for found in agreements:
        check, word = found.check, "agrees" if found.passed else "does not agree"
        whose = "the typed graph of " if found.candidate in idle else ""
        cosine = "none" if check.cosine_min is None else f"{check.cosine_min:.7f}"
        said.append(
            f"{whose}{found.candidate} {word} with {found.reference} on {check.images} images: "
            f"least cosine {cosine}"
            + (f". {'; '.join(found.reasons)}" if found.reasons else "")
            + (f". {found.cause}" if found.cause else "")
        )
    said += [f"{d.candidate} parts from {d.reference} at {d.parted}" for d in drifts if d.parted]
    for artifact in artifacts:
        engine = artifact.engine
        if engine is not None:
            products = ", ".join(f"{n} in {dtype}" for dtype, n in engine.products.items())
            said.append(
                f"{artifact.name}: {engine.kernels} kernels, attention fused in {engine.fused} of "
                f"{engine.blocks} blocks, matrix products {products}; {engine.executed}"
            )
    return said


def _title(manifest: Manifest | None, artifacts: Sequence[facts.Artifact]) -> str:
    if manifest is not None and manifest.checkpoint is not None:
        return manifest.checkpoint.source
    return artifacts[0].name


def _subtitle(manifest: Manifest | None) -> str:
    config = manifest.config if manifest is not None else None
    if config is None:
        return "ViT-MSN"
    return (
        f"ViT-MSN, {config.get('depth')} blocks of {config.get('dim')} with {config.get('heads')} "
        f"heads, images of {_by(config.get('image_size'))} in patches of "
        f"{_by(config.get('patch_size'))}"
    )


def _by(pair: object) -> str:
    return "x".join(map(str, pair)) if isinstance(pair, list) else str(pair)


def _origin(manifest: Manifest | None) -> list[tuple[str, str]]:
    if manifest is None:
        return []
    rows = []
    if manifest.checkpoint is not None:
        rows += [
            ("checkpoint", manifest.checkpoint.source),
            ("weights' sha256", manifest.checkpoint.sha256),
        ]
        rows += [("note", note) for note in manifest.checkpoint.notes]
    made = manifest.preprocessing
    if made is not None:
        crop = f", short side {made.short_side}, centre cut out" if made.short_side else ""
        rows.append(
            ("preprocessing", f"{made.name}: {made.resample or 'no resizing'} to {made.size}{crop}")
        )
        rows.append(("normalisation", f"mean {made.mean}, std {made.std}, scale {made.scale:.6g}"))
    if manifest.labels:
        rows.append(("classes", f"{len(manifest.labels)}: {', '.join(manifest.labels[:5])}, …"))
    rows.append(("versions", ", ".join(f"{n} {v}" for n, v in manifest.versions.items())))
    return rows


def _now() -> str:
    """Give the time, or SOURCE_DATE_EPOCH (reproducible-builds.org) where that is set."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    at = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdigit() else datetime.now(UTC)
    return at.strftime("%d %B %Y, %H:%M UTC")


def _short(name: str) -> str:
    return name if is_checkpoint(name) else Path(name).name
