"""The steps of ``msn-export validate``: two artifacts, the same images, one verdict."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path

import onnx_ir as ir

from msn_export import baseline, image_folder
from msn_export.artifact import Artifact
from msn_export.commands.jobs import ValidateJob
from msn_export.compare.sides import Pair, Validation, decide, heads_of, open_pair, open_side
from msn_export.embedding.accuracy import (
    BATCH,
    LabelledModel,
    compare_accuracy,
    output_to_compare,
    require_classes,
    run_labelled,
)
from msn_export.errors import GraphError, ImageError
from msn_export.feed import Feed
from msn_export.graph.batch import find_mixing
from msn_export.graph.fuse import attention_form
from msn_export.graph.precision import has_quantised_activations
from msn_export.image_folder import notes_on
from msn_export.labelled import Labelled, read_labelled
from msn_export.manifest import AccuracyRecord
from msn_export.metrics.accuracy import notes as notes_of
from msn_export.metrics.diagnose import diagnose
from msn_export.metrics.evaluate import (
    Evaluation,
    OutputsOf,
    Recalibrated,
    Reference,
    Sample,
    Trial,
    batch_sizes,
    draw,
    draw_parts,
    measure_rounding,
    require_different,
    run_reference,
    with_drawn,
    with_ragged,
)
from msn_export.metrics.tolerances import (
    ENOUGH,
    FEW_RANGES_MARGIN,
    MARGIN,
    RANGES_MARGIN,
    ROUNDED_MARGIN,
    coarsest,
    gate_of,
)
from msn_export.models.checkpoint import Choices
from msn_export.preprocessing import Preprocessing
from msn_export.processor_config import choose
from msn_export.progress import SILENT, Progress
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.spec import AttentionForm, BatchRange, Dtype, InputFormat, Observer

__all__ = ["ValidateJob", "run_validate"]  # the two that docs/python.md speaks of

EXACT = 16  # pictures that an fp32 reference computes in fp64 too
SEED = 0  # of the batch sizes that are drawn


def run_validate(job: ValidateJob, progress: Progress = SILENT) -> Validation:
    """Compare two artifacts on the same pictures.

    Raises:
        MsnExportError: they cannot be compared at all; a comparison that fails is no error but a
            ``Validation`` that did not pass.
    """
    return validate_in_full(job, progress, {})[0]


def validate_in_full(
    job: ValidateJob, progress: Progress, files: Mapping[str, Artifact]
) -> tuple[Validation, Evaluation]:
    """Compare two artifacts, those of ``files`` being open already; give also what was compared."""
    choices = Choices(job.variant, job.weights, job.labels)
    labelled = None
    if job.labelled is not None:
        with progress.step("list labelled pictures"):
            labelled = read_labelled(job.labelled)
        job = replace(job, images=job.images or job.labelled)  # pictures, and they are at hand
    with progress.step("read both sides"):
        pair = open_pair(str(job.reference), str(job.candidate), choices, files)
        preprocessing, own = _preprocessings(job, pair)
        if labelled is not None:
            for side, labels in zip((pair.reference, pair.candidate), _labels(pair), strict=True):
                require_classes(labelled, pair.outputs, labels, side.name)
    name = job.gate or coarsest(pair.reference.dtype, pair.candidate.dtype)
    gate = gate_of(name, job.numbers)
    with tempfile.TemporaryDirectory(prefix="msn-export-") as folder, ExitStack() as opened:
        # first, for what cannot run here is refused before the reference took its time
        runner = opened.enter_context(
            closing(open_side(pair.candidate, pair.outputs, Path(folder)))
        )
        trials = _Trials(job, pair, name, own, Path(folder), opened)
        parts = draw_parts(job.images, preprocessing, max_batch=pair.max_batch, limit=job.limit)
        for sample in _read(parts, progress):
            trials.run(sample, runner, progress)
        with progress.step("compare"):
            reference, sizes = trials.reference, trials.sizes
            same = trials.same.evaluation(reference, sizes, runner.name, gate)
            afforded = sizes if max(sizes) > 1 or pair.candidate.batch.max == 1 else (1, 2)
            graph = pair.candidate.graph
            joins = find_mixing(graph) if graph is not None else ""
            same = same.with_alone(runner, pair.candidate.input_format, afforded, joins)
            trials.notes += [same.about_joins] if same.alone else []
            fed = None
            if own is not None:
                sample = replace(reference.sample, preprocessing=own)
                shared = replace(reference, sample=sample)
                fed = trials.mine.evaluation(shared, sizes, runner.name, gate)
            cause = None
            if same.failures:
                side = pair.candidate
                cause = diagnose(runner, reference, side.input_format, gate, fixed=side.fixed_batch)
        if labelled is not None:
            with progress.step("count what is right"):
                accuracy = trials.count(labelled, preprocessing, runner, progress)
            same = replace(same, accuracy=accuracy)
    found = decide(pair, name, same, fed, trials.notes, numbers_only=job.numbers_only)
    return replace(found, cause=cause), same


def _read(parts: Iterator[Sample], progress: Progress) -> Iterator[Sample]:
    while True:
        with progress.step("read images"):
            sample = next(parts, None)
        if sample is None:
            return
        yield sample


class _Trials:
    """All that ran so far: the candidate on the reference's pixels and its own; the baselines."""

    def __init__(
        self,
        job: ValidateJob,
        pair: Pair,
        dtype: Dtype,
        own: Preprocessing | None,
        stage: Path,
        opened: ExitStack,
    ) -> None:
        self.job, self.pair, self.dtype, self.own = job, pair, dtype, own
        self.stage, self.opened = stage, opened
        self.same, self.mine = Trial(), Trial()
        self.notes = list(own.notes) if own is not None else []
        self.sizes: tuple[int, ...] = ()
        self._first: Reference | None = None
        # all but the first have ranges of their own
        self._baselines: list[tuple[_Baseline, Trial]] = []

    @property
    def reference(self) -> Reference:
        """The first pictures' reference, with the limits that all of them gave."""
        assert self._first is not None
        found = replace(self._first)
        for index, (each, trial) in enumerate(self._baselines):
            errors, name, margin = trial.errors(), each.runner.name, each.margin
            if index == 0:
                found = replace(
                    found, baseline=errors, baseline_others=trial.others(), baseline_name=name,
                    margin=margin,
                )  # fmt: skip
                continue
            if found.recalibrated is not None:  # of several sound ranges the largest errors
                before = found.recalibrated.errors
                errors = {key: value.at_least(before[key]) for key, value in errors.items()}
            found = replace(found, recalibrated=Recalibrated(errors, name, margin))
        return found

    def run(self, sample: Sample, runner: OutputsOf, progress: Progress) -> None:
        """Run a part of the pictures through all of them."""
        pair, is_first = self.pair, self._first is None
        side = pair.candidate
        if is_first:
            require_different(sample)
        with progress.step(f"run {pair.reference.name}"):
            exact = self.dtype is Dtype.FP32 and is_first
            reference = run_pair_reference(pair, sample, self.stage, exact=exact)
        if is_first:
            with progress.step("measure what the precision costs"):
                unmeasured = self._open_baselines(reference.sample)
            self._first = replace(reference, unmeasured=unmeasured or reference.unmeasured)
            self._choose_sizes(sample)
        elif self._first is not None:  # later pictures are in fp32 alone
            none_exact = {name: rows[:0] for name, rows in self._first.exact.items()}
            reference = replace(reference, exact=none_exact)
        self.notes += sample.notes
        for each, trial in self._baselines:
            taken = InputFormat.of(each.runner.inputs[0].dtype)
            fixed = pair.reference.fixed_batch
            cost = run_reference(each.runner, sample, taken, fixed=fixed).outputs
            trial.repeat(cost, reference, self.sizes)
        with progress.step(f"run {side.name}"):
            self.same.run(runner, reference, side.input_format, self.sizes)
            if self.own is not None:
                self._run_own(reference, self.own, runner)

    def _open_baselines(self, sample: Sample) -> str:
        """Open them; give why there are none."""
        pair = self.pair
        # ranges of noise say nothing of a candidate that was calibrated on pictures
        with_ranges = self.job.images is not None and len(sample) >= baseline.RANGED
        graph = pair.candidate.graph
        has_ranges = graph is None or has_quantised_activations(graph)
        has_ranges &= self.dtype.is_quantised and self.job.images is not None
        if has_ranges and not with_ranges:
            self.notes.append(
                f"ranges of activations were not bounded: that takes {baseline.RANGED} pictures"
            )
        try:
            for each in _open_baselines(
                pair, self.dtype, sample, self.stage, with_ranges=with_ranges
            ):
                self.opened.enter_context(each.runner)
                self._baselines.append((each, Trial()))
        except GraphError as error:
            return str(error)
        if self._baselines:
            return ""
        return f"no baseline is each of {pair.reference.kind} against {pair.candidate.kind}"

    def _choose_sizes(self, sample: Sample) -> None:
        side = self.pair.candidate
        batch = self.job.batch or side.batch
        # an engine's batch is in the GPU's memory: this machine's sets no limit to its smallest
        max_batch = (
            max(batch.min, self.pair.max_batch) if side.kind == "engine" else self.pair.max_batch
        )
        sizes, drawn = with_drawn(batch_sizes(batch, max_batch), SEED)
        self.sizes = with_ragged(sizes, len(sample))
        if drawn:
            self.notes.append(drawn)
        if max_batch < batch.max:
            self.notes.append(
                f"batches up to {self.sizes[-1]} of {batch.max}: memory affords no more"
            )
        if self.own is not None and self.job.images is None:
            self.notes.append("resizing was not compared, noise needs none: give --images")

    def _run_own(self, reference: Reference, own: Preprocessing, runner: OutputsOf) -> None:
        """Run the candidate on what its own preprocessing makes of the same pictures."""
        sample = reference.sample
        fed = _again(self.job, sample, own)
        shared = _on_shared(reference, fed)
        if len(shared.sample) < len(sample):
            self.notes.append(f"{len(shared.sample)} pictures can be read with both preprocessings")
        self.mine.run(runner, shared, self.pair.candidate.input_format, self.sizes)

    def count(
        self, labelled: Labelled, shared: Preprocessing, runner: OutputsOf, progress: Progress
    ) -> AccuracyRecord:
        """Run labelled pictures through both sides, each fed as it is in production."""
        pair, output = self.pair, output_to_compare(self.pair.outputs)
        with closing(open_side(pair.reference, (output,), self.stage)) as reference:
            models = [
                LabelledModel(
                    side.name, run, Feed(side.input_format, preprocessing), (output,), labels
                )
                for side, run, preprocessing, labels in (
                    (pair.reference, reference, shared, _labels(pair)[0]),
                    (pair.candidate, runner, self.own or shared, _labels(pair)[1]),
                )
            ]
            batch = min(BATCH, pair.max_batch)
            together = [models] if self.own is None else [[model] for model in models]
            rows = [
                found
                for alike in together
                for found in run_labelled(labelled, alike, batch, progress)
            ]
        first, second = zip(models, rows, strict=True)
        record = compare_accuracy(labelled, first, second, allowed=self.job.accuracy_drop)
        self.notes += [*rows[0].notes, *rows[-1].notes, *notes_on((), labelled.skipped, 0)]
        self.notes += notes_of(record)
        return record


def _labels(pair: Pair) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Give the names of both sides' classes; one that has none takes the other's."""
    reference, candidate = pair.reference.labels, pair.candidate.labels
    return reference or candidate, candidate or reference


def run_pair_reference(pair: Pair, sample: Sample, stage: Path, *, exact: bool) -> Reference:
    """Run the reference once; with ``exact`` some pictures also in fp64, where it can be.

    Raises:
        ToleranceError: the reference itself is not finite.
    """
    side = pair.reference
    with closing(open_side(side, pair.outputs, stage)) as runner:
        runner.name = f"{side.name} in {runner.name}"
        reference = run_reference(runner, sample, side.input_format, fixed=side.fixed_batch)
    kept = {name: reference.outputs[name] for name in pair.outputs}
    reference = replace(reference, outputs=kept).require_finite()
    if not exact:
        return reference
    if side.module is not None:
        from msn_export.graph.torch_reference import TorchRunner

        with closing(TorchRunner(side.module, heads_of(pair.outputs), exact=True)) as exact_runner:
            return measure_rounding(reference, exact_runner, EXACT)
    if side.graph is None:
        return reference
    try:
        with baseline.open_exact(side.graph, stage) as runner:
            return measure_rounding(
                reference, runner, EXACT, side.input_format, fixed=side.fixed_batch,
                joins=find_mixing(side.graph),
            )  # fmt: skip
    except GraphError as error:
        return replace(reference, unmeasured=str(error))


@dataclass(frozen=True, slots=True)
class _Baseline:
    """A runner that shows the cost of a precision, and how many times its errors are allowed."""

    runner: OrtRunner
    margin: float


def _open_baselines(
    pair: Pair, dtype: Dtype, sample: Sample, stage: Path, *, with_ranges: bool
) -> Iterator[_Baseline]:
    """Open the reference in the candidate's precision; nothing where there is no graph of it.

    With ``with_ranges`` a candidate of 8 bits has a second one, with ranges of the sample.
    """
    side, candidate = pair.reference, pair.candidate
    # what is made here takes float32 where the candidate takes float16
    taken = (
        InputFormat.FLOAT if candidate.input_format is InputFormat.HALF else candidate.input_format
    )
    if side.graph is not None and side.dtype is not Dtype.FP32:
        yield _Baseline(baseline.open_widened(side.graph, stage), ROUNDED_MARGIN)
        return
    preprocessing = sample.preprocessing
    graph, given = candidate.graph, _graph_of(side, pair.outputs, preprocessing)
    if given is None or (dtype.is_quantised and graph is None):
        return
    form = AttentionForm.HEADS if graph is None else attention_form(graph)
    if graph is not None:
        given = given.clone()
        with suppress(GraphError):  # of another tool: it computes every token
            baseline.narrow_like(given, candidate.stream)
    model = baseline.write_like(given, taken, preprocessing, form)
    if dtype.is_quantised and graph is not None:
        quantization = candidate.manifest.quantization if candidate.manifest is not None else None
        named, images = (
            (quantization.observer, quantization.calibration_images) if quantization else ("", 0)
        )
        observer = next((one for one in Observer if one == named), Observer.MSE)
        few = images < ENOUGH
        margins = chain([MARGIN], repeat(FEW_RANGES_MARGIN if few else RANGES_MARGIN))
        ranges = baseline.OwnRanges(observer, few) if with_ranges else None
        runners = baseline.open_quantised(model, graph, sample, taken, stage, ranges)
        yield from map(_Baseline, runners, margins)
    elif candidate.kind == "engine" and dtype is not Dtype.FP32:
        runner = baseline.open_rounded(model, dtype, sample, taken, stage)
        yield _Baseline(runner, ROUNDED_MARGIN)
    else:
        yield _Baseline(baseline.open_typed(model, dtype, sample, taken, stage), MARGIN)


def _graph_of(
    side: Artifact, outputs: tuple[str, ...], preprocessing: Preprocessing
) -> ir.Model | None:
    """Give a side as an fp32 graph; None of an engine."""
    if side.kind != "checkpoint":
        return side.graph
    from msn_export.graph.torch_reference import trace  # torch

    return trace(
        side.module,
        heads=heads_of(outputs),
        input_format=InputFormat.FLOAT,
        batch=BatchRange(),
        preprocessing=preprocessing,
    )


def _again(job: ValidateJob, sample: Sample, own: Preprocessing) -> Sample:
    """Decode a sample's pictures with another preprocessing; noise is made anew."""
    if job.images is None:
        return draw(None, own, max_batch=sample.max_batch)
    loaded = image_folder.load_named(job.images, sample.names, own)
    return replace(
        sample, pixels=loaded.pixels, names=loaded.names, preprocessing=own, broken=loaded.broken
    )


def _preprocessings(job: ValidateJob, pair: Pair) -> tuple[Preprocessing, Preprocessing | None]:
    """Give the preprocessing of both sides, and the candidate's in production if that differs."""
    side = pair.candidate
    shared = choose(pair.preprocessing, side.size, side.channels, exif=job.exif)
    if job.preprocess is None and side.preprocessing is None:
        return shared, None
    own = choose(
        side.preprocessing, side.size, side.channels, preprocess=job.preprocess, exif=job.exif
    )
    return shared, None if own.makes_the_same_as(shared) else own


def _on_shared(reference: Reference, fed: Sample) -> Reference:
    """Feed the pictures that both preprocessings could read: another may refuse another one."""
    names = reference.sample.names
    at = {name: index for index, name in enumerate(fed.names)}
    kept = [index for index, name in enumerate(names) if name in at]
    if not kept:
        raise ImageError(f"no picture of {fed.source} can be read with both preprocessings")
    chosen = [at[names[index]] for index in kept]
    sample = replace(
        fed, pixels=fed.pixels[chosen], names=tuple(fed.names[index] for index in chosen)
    )
    outputs = {name: values[kept] for name, values in reference.outputs.items()}
    exact = {
        name: values[[index for index in kept if index < len(values)]]
        for name, values in reference.exact.items()
    }
    return replace(reference, sample=sample, outputs=outputs, exact=exact)
