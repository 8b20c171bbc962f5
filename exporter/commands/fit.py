"""The steps of ``msn-export fit``: features, logistic regression, accuracy, one checked graph."""

from __future__ import annotations

import hashlib
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.commands.fit_features import (
    FeatureRows,
    FitPictures,
    extract,
    hash_of,
    listing_of,
    work_folder,
)
from msn_export.commands.fit_job import FitJob
from msn_export.commands.onnx import read_as, run_onnx
from msn_export.compare.sides import preprocessing_of, require_one_size, sized
from msn_export.errors import ImageError, SpecError, ToleranceError
from msn_export.files import publish
from msn_export.fit_record import FitRecord, HeldOutAccuracy
from msn_export.graph.classifier import POOLING
from msn_export.graph.torch_reference import TorchRunner, require_readable
from msn_export.host import available_memory, peak_rss
from msn_export.image_folder import notes_on, spread
from msn_export.logistic_regression import (
    Solution,
    Training,
    choose,
    cross_validate,
    require_scikit_learn,
    solve,
    solver_bytes,
)
from msn_export.manifest import CheckRecord, Manifest, seal, versions_of
from msn_export.metrics.accuracy import Accuracy, Answers, caution
from msn_export.metrics.evaluate import draw_files, max_batch_in_memory, run_reference
from msn_export.mixed_precision import cpu_runner
from msn_export.models.checkpoint import Checkpoint, load_checkpoint
from msn_export.models.config import LinearClassifier
from msn_export.progress import SILENT
from msn_export.spec import BatchRange, Dtype, Head

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from msn_export.labelled import Labelled
    from msn_export.progress import Progress

__all__ = ["FitJob", "run_fit"]

HEADS = {"msn": Head.FEATURES, "embedding": Head.CLS}
CHECKED = 16  # pictures that the export's own check runs
COMPARED = 64  # pictures whose logits are compared with scikit-learn's
# Largest error of the fp32 graph's logits against the decision function on PyTorch's features,
# relative to it. The check of the export measures what fp32 costs, which may be more where
# attention is sharp: the larger one holds.
RELATIVE = 1e-5
_NAMED = 10  # broken pictures that the manifest names
CONFUSED = 200  # classes; of more the pairs would be most of a manifest


@dataclass(frozen=True, slots=True)
class FittedDraw:
    """The first draw's classifier, with what its draws were measured to be worth."""

    solution: Solution
    strengths: dict[float, float]
    images: int
    accuracy: HeldOutAccuracy | None
    unmeasured: str = ""
    notes: tuple[str, ...] = ()


def run_fit(job: FitJob, progress: Progress = SILENT) -> tuple[Path, Manifest]:
    """Fit a classifier on a checkpoint's frozen features, and export both as one checked graph.

    Returns:
        The graph's path and its manifest, whose ``fit`` says what was fitted and how good it is.

    Raises:
        MsnExportError: whatever kept it from its checks; the output path is as it was.
        KeyboardInterrupt: features are kept beside the output, for the same command to go on.
    """
    started = time.monotonic()
    output = job.validate_paths()
    require_scikit_learn()
    with progress.step("list pictures"):
        pictures = FitPictures.of(job)
    with progress.step("load checkpoint"):
        checkpoint = _load(job)
        origin = _origin(job, checkpoint, pictures)
        _require_possible(job, checkpoint, pictures)
        del checkpoint
    with work_folder(output.with_name(f"{output.name}.fit"), origin, force=job.force) as folder:
        features, test = _features(job, pictures, folder, progress)
        fitted = _fit(job, pictures, features, test, progress)
        classifier = LinearClassifier(
            fitted.solution.weights.astype(np.float32),
            pictures.labelled.classes,
            POOLING[job.features],
            job.blocks,
        )
        shown = pictures.labelled.some(features.readable(np.arange(len(pictures.labelled))))
        (folder / "graph").mkdir(exist_ok=True)
        exported = job.onnx_job(
            output=folder / "graph" / output.name,
            heads=(Head.LOGITS, *job.heads),
            classifier=classifier,
            force=True,
            **_checked_on(job, shown),
        )
        graph, manifest = run_onnx(exported, progress)
        record = _record(job, pictures, features, fitted, classifier)
        if job.check:
            with progress.step("compare with scikit-learn on PyTorch's features"):
                record = _compare(job, graph, manifest.check, fitted.solution, record, shown)
        manifest = replace(
            manifest,
            fit=record,
            notes=(*manifest.notes, *pictures.notes, *_left_out(features, test), *fitted.notes),
            versions=manifest.versions | versions_of("scikit-learn", "scipy", "numpy"),
            seconds=round(time.monotonic() - started, 3),
            peak_rss_bytes=peak_rss(),
        )
        publish(graph, output, seal(manifest), force=job.force)
    return output, manifest


def _load(job: FitJob) -> Checkpoint:
    """Load the checkpoint as the graph of features has it."""
    checkpoint = load_checkpoint(job.checkpoint, job.choices)
    if job.preprocess == "auto" and job.image_size is None:
        require_one_size(checkpoint)
    return read_as(sized(checkpoint, job.image_size), job.onnx_job(normalize=False))


def _origin(job: FitJob, checkpoint: Checkpoint, pictures: FitPictures) -> dict[str, Any]:
    """Collect all that the features follow from."""
    test = pictures.test
    return {
        "checkpoint": checkpoint.sha256,
        "features": job.features,
        "blocks": job.blocks,
        "image_size": checkpoint.config.image_size,
        "patches": checkpoint.config.kept,
        "input": job.input_format,
        "target": job.target,
        "preprocessing": preprocessing_of(checkpoint, job.preprocess, job.exif),
        "pictures": f"{len(pictures.labelled)}, sha256 {listing_of(pictures.labelled).sha256}",
        "test": None if test is None else f"{len(test)}, sha256 {listing_of(test).sha256}",
    }


def _require_possible(job: FitJob, checkpoint: Checkpoint, pictures: FitPictures) -> None:
    """Refuse before the work what could not be done after it."""
    classes = pictures.labelled.classes
    width = job.blocks * checkpoint.config.dim
    blank = LinearClassifier(
        np.zeros((len(classes), width), np.float32), classes, POOLING[job.features], job.blocks
    )
    read = read_as(checkpoint, job.onnx_job(classifier=blank))
    require_readable(read.model, (Head.LOGITS, *job.heads))
    for rows in pictures.draws:
        _require_two_of_each(job, pictures.labelled, rows)
    most = max(map(len, pictures.draws))
    needed = 8 * most * width + solver_bytes(most, width, len(classes))
    free = available_memory()
    if needed > free:
        raise SpecError(
            f"{most} images of {width} numbers in {len(classes)} classes need "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free; choose fewer with "
            "--shots, or a machine with more memory"
        )


def _require_two_of_each(job: FitJob, labelled: Labelled, rows: NDArray[np.intp]) -> None:
    """Refuse ``--C auto`` where cross-validation has no image of a class to hold out."""
    counts = np.bincount(labelled.labels[rows], minlength=len(labelled.classes))
    if job.C is None and counts.min() < 2:
        name = labelled.classes[int(counts.argmin())]
        raise ImageError(
            f"--C auto cross-validates inside the training images, and class {name!r} of "
            f"{labelled.source} has {counts.min()}; give two or more of each, or a number for --C"
        )


def _features(
    job: FitJob, pictures: FitPictures, folder: Path, progress: Progress
) -> tuple[FeatureRows, FeatureRows | None]:
    """Export the graph of features, and run the pictures through it."""
    exported = job.onnx_job(
        output=folder / "features.onnx",
        heads=(HEADS[job.features],),
        normalize=False,
        dtype=Dtype.FP32,
        batch=BatchRange(),
        force=True,
        **_checked_on(job, pictures.labelled),
    )
    graph, _ = run_onnx(exported, progress)
    features = extract(graph, pictures.labelled, folder, "training", progress)
    if pictures.test is None:
        return features, None
    return features, extract(graph, pictures.test, folder, "test", progress)


def _checked_on(job: FitJob, labelled: Labelled) -> dict[str, Any]:
    """Give the pictures that a check of an export runs: the user's, else some labelled ones."""
    if job.images is not None:
        return {}
    return {"images": labelled.source, "pictures": tuple(spread(labelled.paths, CHECKED))}


def _fit(
    job: FitJob,
    pictures: FitPictures,
    features: FeatureRows,
    test: FeatureRows | None,
    progress: Progress,
) -> FittedDraw:
    """Fit a classifier for each draw, and measure it on what it was not fitted on."""
    count, found = len(pictures.draws), []
    for number, drawn in enumerate(pictures.draws, 1):
        of = f" of draw {number} of {count}" if count > 1 else ""
        found.append(_of_draw(job, features, drawn, test, progress, of))
    first, measured = found[0], [one.accuracy for one in found if one.accuracy is not None]
    notes = [f"accuracy was not measured: {first.unmeasured}"] if first.unmeasured else []
    if measured:
        first = replace(first, accuracy=_with_draws(measured))
        notes += caution(measured[0].images)
    if count > 1:
        notes.append(f"the graph is fitted on the first of {count} draws")
    return replace(first, notes=tuple(notes))


def _of_draw(
    job: FitJob,
    features: FeatureRows,
    drawn: NDArray[np.intp],
    test: FeatureRows | None,
    progress: Progress,
    of: str,
) -> FittedDraw:
    rows, labelled = _usable(job, features, drawn), features.labelled
    training = Training(features.taken(rows), labelled.labels[rows], len(labelled.classes))
    strength, strengths = job.C, dict[float, float]()
    with progress.step(f"fit the classifier{of}"):
        if strength is None:
            choice = choose(training, job.seed)
            strength, strengths = choice.C, choice.shares
        solution = solve(training, strength)
    with progress.step(f"measure the accuracy{of}"):
        accuracy, unmeasured = None, _unmeasurable(job, training, features, drawn)
        if test is not None:
            accuracy = _measure(
                solution, test, np.arange(len(test.labelled)), f"test set {job.test}"
            )
        elif not unmeasured and job.shots is not None:
            others = np.setdiff1d(np.arange(len(labelled)), drawn)
            accuracy = _measure(solution, features, others, "the images not drawn")
        elif not unmeasured:
            answers = cross_validate(training, job.C, job.seed, progress)
            counted = answers.accuracy(training.labels, labelled.classes)
            accuracy = _described(counted, "stratified cross-validation")
    if accuracy is not None:
        unmeasured = ""
    return FittedDraw(solution, strengths, len(rows), accuracy, unmeasured)


def _unmeasurable(
    job: FitJob, training: Training, features: FeatureRows, drawn: NDArray[np.intp]
) -> str:
    """Give the reason why the labelled images alone measure no accuracy; empty where they do."""
    if job.shots is not None:
        others = np.setdiff1d(np.arange(len(features.labelled)), drawn)
        if len(features.readable(others)):
            return ""
        return "every image is trained on; give fewer --shots, or --test"
    least = 2 if job.C is not None else 3  # auto cross-validates once more in what a fold leaves
    if training.smallest >= least:
        return ""
    name = features.labelled.classes[int(np.bincount(training.labels).argmin())]
    return (
        f"class {name!r} has {training.smallest} of the {least} images that cross-validation "
        "takes; give more, or --test"
    )


def _measure(
    solution: Solution, features: FeatureRows, rows: NDArray[np.intp], how: str
) -> HeldOutAccuracy:
    """Classify the images of some rows that have features."""
    readable = features.readable(rows)
    labels = features.labelled.labels[readable]
    parts = [solution.answers(part, labels[place]) for part, place in features.parts(readable)]
    return _described(Answers.joined(parts).accuracy(labels, features.labelled.classes), how)


def _described(found: Accuracy, how: str) -> HeldOutAccuracy:
    kept = found.confusion if len(found.per_class) <= CONFUSED else None
    return HeldOutAccuracy(
        how, found.images, found.top1, found.top5, found.interval, found.per_class, kept
    )


def _with_draws(measured: list[HeldOutAccuracy]) -> HeldOutAccuracy:
    """Describe the first draw's accuracy, and how much that of several draws differs."""
    if len(measured) == 1:
        return measured[0]
    shares = [one.top1 for one in measured]
    return replace(
        measured[0],
        draws=tuple(shares),
        mean=float(np.mean(shares)),
        deviation=float(np.std(shares, ddof=1)),
    )


def _usable(job: FitJob, features: FeatureRows, drawn: NDArray[np.intp]) -> NDArray[np.intp]:
    """Leave out pictures without features; every class must have one left."""
    rows, labelled = features.readable(drawn), features.labelled
    counts = np.bincount(labelled.labels[rows], minlength=len(labelled.classes))
    lacking = np.flatnonzero(counts == 0)
    if len(lacking):
        name = labelled.classes[lacking[0]]
        row = next(r for r in drawn.tolist() if labelled.labels[r] == lacking[0])
        more = f", and so have {len(lacking) - 1} other classes" if len(lacking) > 1 else ""
        what = "drawn picture" if job.shots is not None else "picture"
        raise ImageError(
            f"class {name!r} of {labelled.source} has no {what} that gives features{more}; the "
            f"first: {features.errors[row]}"
        )
    _require_two_of_each(job, labelled, rows)
    return rows


def _left_out(features: FeatureRows, test: FeatureRows | None) -> Iterator[str]:
    """Give notes on pictures without features, and on what a folder holds besides pictures."""
    for rows, what in ((features, "trained on"), (test, "tested on")):
        if rows is None:
            continue
        source, count = rows.labelled.source, len(rows.errors)
        if count:
            error = rows.errors[min(rows.errors)]
            yield f"{count} of {len(rows.labelled)} pictures of {source} were not {what}: {error}"
        for note in notes_on((), rows.labelled.skipped, rows.turned):
            yield f"{source}: {note}"


def _record(
    job: FitJob,
    pictures: FitPictures,
    features: FeatureRows,
    fitted: FittedDraw,
    classifier: LinearClassifier,
) -> FitRecord:
    labelled, test, solution = pictures.labelled, pictures.test, fitted.solution
    errors = [text for _, text in sorted(features.errors.items())]
    return FitRecord(
        features=job.features,
        blocks=job.blocks,
        C=solution.C,
        strengths={f"{C:g}": share for C, share in fitted.strengths.items()},
        images=fitted.images,
        classes=len(labelled.classes),
        shots=job.shots,
        seed=job.seed,
        labelled=str(labelled.source),
        labelled_sha256=hash_of(labelled),
        test=None if test is None else str(test.source),
        test_sha256=None if test is None else hash_of(test),
        broken=len(errors),
        errors=tuple(errors[:_NAMED]),
        turned=features.turned,
        skipped=dict(labelled.skipped),
        gradient=solution.gradient,
        steps=solution.steps,
        weights=hashlib.sha256(classifier.weight.tobytes()).hexdigest(),
        compared=0,
        relative=None,
        same=None,
        accuracy=fitted.accuracy,
        unmeasured=fitted.unmeasured,
    )


def _compare(
    job: FitJob,
    graph: Path,
    check: CheckRecord | None,
    solution: Solution,
    record: FitRecord,
    labelled: Labelled,
) -> FitRecord:
    """Compare the graph's logits with scikit-learn's decision function on PyTorch's features."""
    checkpoint, head = _load(job), HEADS[job.features]
    config = checkpoint.config
    paths = spread(labelled.paths, COMPARED)
    sample = draw_files(
        paths,
        labelled.source,
        preprocessing_of(checkpoint, job.preprocess, job.exif),
        max_batch=max_batch_in_memory(config.sequence, config.dim, config.mlp_dim, config.heads),
    )
    with closing(TorchRunner(checkpoint.model, (head,))) as runner:
        features = run_reference(runner, sample).outputs[head.output]
    del checkpoint
    fixed = job.batch.max if job.batch.is_static else None
    with cpu_runner(graph, job.dtype, graph.parent) as runner:
        found = run_reference(runner, sample, job.input_format, fixed=fixed).outputs["logits"]
    logits = np.asarray(found, np.float64)
    wanted = solution.estimator.decision_function(features.astype(np.float64))
    if record.classes == 2:
        same = (logits[:, 1] > logits[:, 0]) == (wanted > 0)
        logits = logits[:, 1] - logits[:, 0]
    else:
        same = logits.argmax(axis=1) == wanted.argmax(axis=1)
    relative = float(np.linalg.norm(logits - wanted) / np.linalg.norm(wanted))
    measured = check.limits.get("logits", {}).get("relative") if check is not None else None
    limit = max(RELATIVE, measured or 0.0)
    if job.dtype is Dtype.FP32 and not relative <= limit:
        raise ToleranceError(
            f"the graph's logits err by {relative:.1e} of scikit-learn's decision function on "
            f"PyTorch's features, {limit:.1e} allowed, on {len(sample)} images"
        )
    return replace(record, compared=len(sample), relative=relative, same=float(same.mean()))
