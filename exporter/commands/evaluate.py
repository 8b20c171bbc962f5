"""The steps of ``msn-export evaluate``: labelled pictures, one model, how often it is right."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export import __version__
from msn_export.artifact import is_checkpoint
from msn_export.commands.jobs import EvaluateJob
from msn_export.embedding.accuracy import LabelledModel, OutputRows, run_labelled, vector_of
from msn_export.embedding.inference import reading_of, require_selftest
from msn_export.errors import ImageError, MissingPackageError, SpecError, ToleranceError
from msn_export.feed import feed_of
from msn_export.files import move, placing, require_writable, staging
from msn_export.image_folder import notes_on
from msn_export.labelled import Labelled, read_labelled
from msn_export.manifest import manifest_path
from msn_export.metrics.accuracy import (
    NEIGHBOURS,
    Accuracy,
    Answers,
    ConfusedPair,
    WrongImage,
    answers_of_neighbours,
    caution,
)
from msn_export.preprocessing import Exif, Preprocessing
from msn_export.progress import SILENT
from msn_export.runtime import open_runner
from msn_export.runtime.runner import Precision
from msn_export.schema import Result
from msn_export.spec import BatchRange, Head, InputFormat, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from msn_export.feed import Feed
    from msn_export.progress import Progress

__all__ = ["EvaluateJob", "run_evaluate"]
WRONG = 24  # pictures that were taken wrongly: named, and shown on the page


@dataclass(frozen=True, slots=True, repr=False)
class Evaluated(Result):
    """A model's accuracy on labelled pictures.

    ``images`` of ``given`` pictures were judged; ``broken`` names those that could not be read. An
    answer with NaN or infinity is wrong. ``top1``, ``top5``, ``interval`` (Wilson's, 95 %),
    ``per_class`` and ``confusion`` [true][predicted] are those of its logits, and None without
    them; the matrix is None for very many classes, too. ``confused`` are the pairs of classes that
    are confused most often, and ``wrong`` up to ``WRONG`` pictures, the clearest mistakes first;
    both by logits, or by neighbours where there are none. ``knn`` is what ``k`` neighbours by
    cosine say: of ``train``, or of the other pictures.
    """

    model: str
    labelled: str
    classes: tuple[str, ...]
    images: int
    given: int
    output: str
    top1: float | None
    top5: float | None
    interval: tuple[float, float] | None
    per_class: dict[str, float | None] | None
    confusion: tuple[tuple[int, ...], ...] | None
    confused: tuple[ConfusedPair, ...]
    wrong: tuple[WrongImage, ...]
    knn: Accuracy | None
    k: int | None
    train: str | None
    runner: str
    precision: Precision | None
    preprocessing: Preprocessing
    exif: Exif
    selftest: str
    broken: tuple[str, ...]
    skipped: dict[str, int]
    notes: tuple[str, ...]
    seconds: float


class EvaluatedModel:
    """A checkpoint, a graph or an engine that is open; give pictures, take rows."""

    feed: Feed
    notes: tuple[str, ...]

    def __init__(self, job: EvaluateJob, opened: ExitStack) -> None:
        name = str(job.model)
        if is_checkpoint(name):
            runner: Any = opened.enter_context(closing(_CheckpointRunner(job)))
            self.notes, self.feed = runner.notes, runner.feed
            self.selftest = "none: a checkpoint is its own reference"
        else:
            if job.choices:
                raise SpecError("--variant, --weights and --labels are for a checkpoint")
            path = Path(name)
            runner = opened.enter_context(
                open_runner(
                    path,
                    device=job.device,
                    providers=job.providers or None,
                    trust=job.trust,
                    precision=job.precision,
                    eager_kernels=True,  # a row does not depend on which kernels were ready
                )
            )
            self.notes = ()
            self.selftest = require_selftest(runner, check=True)
            self.feed = feed_of(
                name,
                runner.inputs,
                runner.stated,
                preprocess=job.preprocess,
                exif=job.exif,
                size=job.image_size or path,
            )
        self.runner, self.name, self.labels = runner, runner.name, runner.labels
        self.precision: Precision | None = runner.precision
        self.batch = job.batch or runner.batch.opt
        self.outputs = [spec.name for spec in runner.outputs]

    def rows(self, labelled: Labelled, names: Sequence[str], progress: Progress) -> OutputRows:
        """Run labelled pictures once; ``names`` are the outputs to keep."""
        asked = LabelledModel(self.name, self.runner, self.feed, tuple(names), self.labels)
        (found,) = run_labelled(labelled, [asked], self.batch, progress)
        return found


class _CheckpointRunner:
    """A checkpoint in PyTorch on the CPU, with what the executor asks of a runner."""

    def __init__(self, job: EvaluateJob) -> None:
        from msn_export.compare.sides import preprocessing_of, sized
        from msn_export.feed import Feed
        from msn_export.graph.torch_reference import TorchRunner
        from msn_export.models.checkpoint import load_checkpoint

        if job.providers or job.precision or job.device is not None:
            raise SpecError("--providers, --precision and --device are for a graph or an engine")
        checkpoint = sized(load_checkpoint(str(job.model), job.choices), job.image_size)
        config = checkpoint.config
        heads = [Head.LOGITS] if config.labels else []
        heads += [Head.CLS] if checkpoint.model.norm is not None else [Head.FEATURES]
        self._runner = TorchRunner(checkpoint.model, heads)
        self.name, self.manifest, self.precision = self._runner.name, None, None
        self.labels, self.notes = config.labels, checkpoint.notes
        preprocessing = preprocessing_of(checkpoint, job.preprocess, job.exif)
        self.feed = Feed(InputFormat.FLOAT, preprocessing)
        self.batch = BatchRange()
        sides = config.image_size
        self.inputs = (TensorSpec("pixel_values", "float", ("batch", config.channels, *sides)),)
        self.outputs = tuple(
            TensorSpec(head.output, "float", ("batch", 1)) for head in self._runner.heads
        )

    def __call__(self, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        return self._runner(images)

    def close(self) -> None:
        self._runner.close()


def run_evaluate(job: EvaluateJob, progress: Progress = SILENT) -> Evaluated:
    """Run labelled pictures through a model, and count how often it is right.

    Raises:
        MsnExportError: nothing could be judged; the message says why.
    """
    started = time.monotonic()
    _require_page(job)
    with progress.step("list pictures"):
        labelled = read_labelled(job.labelled)
        given = len(labelled)
        if job.limit is not None and job.limit < given:
            labelled = labelled.some([row * given // job.limit for row in range(job.limit)])
        train = read_labelled(job.train) if job.train is not None else None
    with ExitStack() as opened:
        with progress.step("open the model"):
            model = EvaluatedModel(job, opened)
        has_logits = Head.LOGITS.output in model.outputs
        unjudged: tuple[str, ...] = ()
        if has_logits:
            try:
                labelled = labelled.as_classes(model.labels, f"model {job.model}")
            except ImageError as error:
                if job.knn is None:
                    raise
                # neighbours need no class of the model's
                has_logits, unjudged = False, (f"logits were not judged: {error}",)
        if not has_logits and train is not None:
            labelled = labelled.as_classes(train.classes, str(train.source))
        k = job.knn or (None if has_logits else NEIGHBOURS)
        vector = _vector(model, job) if k is not None else None
        names = [*([Head.LOGITS.output] if has_logits else []), *([vector] if vector else [])]
        with progress.step("run the pictures"):
            rows = model.rows(labelled, names, progress)
        judged, kept = labelled.some(rows.whole()), rows.whole()
        answers: dict[str, Answers] = {}
        if rows.answers is not None:
            answers["logits"] = rows.answers.some(kept)
        if k is not None and vector is not None:
            voters = judged, rows.values[vector][kept]
            if train is not None:
                train = train.as_classes(judged.classes, str(judged.source))
                with progress.step("run the training pictures"):
                    others = model.rows(train, [vector], progress)
                voters = train.some(others.whole()), others.values[vector][others.whole()]
            answers["knn"] = _voted(judged, rows.values[vector][kept], voters, k)
    counted = {by: one.accuracy(judged.labels, judged.classes) for by, one in answers.items()}
    found = counted.get("logits")
    wrong = _wrong(judged, next(iter(answers.values())))
    result = Evaluated(
        model=str(job.model),
        labelled=str(job.labelled),
        classes=labelled.classes,
        images=len(judged),
        given=given,
        output=names[0],
        top1=found.top1 if found is not None else None,
        top5=found.top5 if found is not None else None,
        interval=found.interval if found is not None else None,
        per_class=found.per_class if found is not None else None,
        confusion=found.confusion if found is not None else None,
        confused=next(iter(counted.values())).confused,
        wrong=wrong,
        knn=counted.get("knn"),
        k=k,
        train=str(job.train) if job.train is not None else None,
        runner=model.name,
        precision=model.precision,
        preprocessing=model.feed.preprocessing,
        exif=model.feed.preprocessing.exif,
        selftest=model.selftest,
        broken=tuple(rows.errors[row] for row in sorted(rows.errors)),
        skipped=dict(labelled.skipped),
        notes=(*model.notes, *model.feed.notes, *unjudged,
               *notes_on((), labelled.skipped, rows.turned),
               *_not_finite(rows, kept), *caution(len(judged))),
        seconds=round(time.monotonic() - started, 3),
    )  # fmt: skip
    if job.report is not None:
        _write_page(job, job.report, result, found, progress)
    return result


def _require_page(job: EvaluateJob) -> None:
    """Refuse, before anything ran, a page that could not be written."""
    if job.report is None:
        return
    model, labelled = Path(str(job.model)), job.labelled
    sources = [model, manifest_path(model), *([labelled] if labelled.is_file() else [])]
    require_writable([job.report], force=job.force, sources=sources)
    try:
        import msn_export.reporting.accuracy  # noqa: F401
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise MissingPackageError(
            f"--report needs the package {package}; pip install 'msn-export[report]'"
        ) from error


def _write_page(
    job: EvaluateJob,
    report: Path,
    result: Evaluated,
    logits: Accuracy | None,
    progress: Progress,
) -> None:
    from msn_export.reporting import gather
    from msn_export.reporting.accuracy import AccuracyPage, write_page

    of = "" if result.images == result.given else f" of {result.given:,}"
    page = AccuracyPage(
        model=result.model,
        labelled=result.labelled,
        logits=logits,
        neighbours=result.knn,
        voters=f"{result.k} neighbours in {result.train or 'the other pictures'}",
        wrong=result.wrong,
        thumbnails=tuple(
            gather.picture_thumbnail(Path(one.picture), result.preprocessing)
            for one in result.wrong
        ),
        facts=(
            ("pictures", f"{result.images:,}{of} in {len(result.classes):,} classes"),
            *(("broken", text) for text in result.broken[:WRONG]),
            ("runner", result.runner),
            ("selftest", result.selftest),
            ("preprocessing", str(result.preprocessing)),
        ),
        notes=result.notes,
        command=job.command,
        written=gather.now(),
        product=f"msn-export {__version__}",
    )
    with progress.step(f"write {report}"), staging(report.parent) as stage:
        write_page(page, stage / "page.html")
        with placing([report], force=job.force):
            move((stage / "page.html"), report)


def _wrong(judged: Labelled, answers: Answers) -> tuple[WrongImage, ...]:
    """Name some pictures that were taken wrongly."""
    guesses, classes = answers.guesses, judged.classes
    return tuple(
        WrongImage(
            str(judged.paths[row]),
            classes[judged.labels[row]],
            classes[guesses[row]] if guesses[row] >= 0 else None,
        )
        for row in answers.most_wrong(judged.labels, WRONG).tolist()
    )


def _vector(model: EvaluatedModel, job: EvaluateJob) -> str:
    """Choose the output that neighbours are told by: a vector an image, not logits."""
    vector = job.output_name or vector_of(model.outputs)
    if vector is None:
        raise SpecError(
            f"{job.model} has logits alone, which have no neighbours; leave --knn out, or export "
            "it with --head cls too"
        )
    reading_of(str(job.model), model.runner.outputs, vector)  # refuses a name that is none
    return vector


def _voted(
    judged: Labelled,
    features: NDArray[np.float32],
    voters: tuple[Labelled, NDArray[np.float32]],
    k: int,
) -> Answers:
    others, vectors = voters
    alone = others is judged
    if alone and len(judged) < 2:
        raise ToleranceError("one image has no neighbours; give more, or --train FOLDER")
    asked = None if alone else (features, judged.labels)
    return answers_of_neighbours(vectors, others.labels, len(judged.classes), asked, k=k)


def _not_finite(rows: OutputRows, kept: NDArray[np.intp]) -> Iterator[str]:
    infinite = {
        name: np.asarray(~np.isfinite(each).all(axis=1)) for name, each in rows.values.items()
    }
    if rows.answers is not None:
        infinite["logits"] = ~rows.answers.finite
    for name, each in infinite.items():
        count = int(each[kept].sum())
        if count:
            yield f"{name} has NaN or infinity on {count} of {len(kept)} images, counted as wrong"
