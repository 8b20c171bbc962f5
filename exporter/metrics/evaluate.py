"""Draw pictures, run a reference on them once, and compare any number of candidates with it."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from msn_export import image_folder, images
from msn_export.errors import ImageError, SpecError, ToleranceError
from msn_export.host import available_memory
from msn_export.manifest import AccuracyRecord, CheckRecord, ImageRecord
from msn_export.metrics.accuracy import failures as failures_of
from msn_export.metrics.metrics import (
    Agreement,
    Comparison,
    Errors,
    class_agreement,
    embedding_of,
    neighbour_agreement,
    worst_of,
)
from msn_export.metrics.tolerances import MARGIN, ROUNDING, Limit
from msn_export.preprocessing import Preprocessing
from msn_export.spec import BatchRange, Head, InputFormat

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from msn_export.metrics.tolerances import Gate


PART = 256  # pictures of a large set that are in memory at once, with what models make of them
LIMIT = 16  # pictures a check decodes at most: its cost must stay near that of the export
# Pictures that are run alone and beside others, where a graph may join those of a batch: at most
# ALONE, and at least 2 whatever the smallest batch, which is filled with copies.
ALONE, COPIES = 8, 64


@dataclass(frozen=True, slots=True)
class Sample:
    """Decoded pictures [count, h, w, c] uint8, with how a model wants them.

    ``max_batch`` is how many of them the memory of this machine affords a model at once.
    ``broken``, ``skipped`` and ``turned`` are those of ``image_folder.ImageSet``; ``given`` is how
    many pictures there were to choose from.
    """

    pixels: NDArray[np.uint8]
    names: tuple[str, ...]
    source: str
    preprocessing: Preprocessing
    broken: tuple[str, ...] = ()
    max_batch: int = 8
    skipped: Mapping[str, int] = field(default_factory=dict)
    turned: int = 0
    given: int = 0

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for users on the pictures and on how they were prepared."""
        counted = image_folder.notes_on(self.broken, self.skipped, self.turned)
        return (*self.preprocessing.notes, *counted)

    def first(self, count: int, *, at_once: int | None = None) -> Sample:
        """Take the first pictures, ``at_once`` in a batch at most."""
        most = self.max_batch if at_once is None else min(self.max_batch, at_once)
        pixels, names = self.pixels[:count], self.names[:count]
        return replace(self, pixels=pixels, names=names, max_batch=most)

    def preprocess(self, indices: Sequence[int], input_format: InputFormat) -> NDArray[Any]:
        """Make a batch for a graph that takes ``input_format``; indices past the end start over."""
        chosen: NDArray[np.uint8] = self.pixels[np.asarray(indices) % len(self)]
        return images.model_input(chosen, self.preprocessing, input_format)


def draw(
    folder: Path | None, preprocessing: Preprocessing, *, max_batch: int = 8, limit: int = LIMIT
) -> Sample:
    """Decode up to ``limit`` pictures of a folder; without one, seeded noise, named as such."""
    (sample,) = draw_parts(folder, preprocessing, max_batch=max_batch, limit=limit, part=limit)
    return sample


def draw_parts(
    folder: Path | None,
    preprocessing: Preprocessing,
    *,
    max_batch: int = 8,
    limit: int | None = LIMIT,
    part: int = PART,
) -> Iterator[Sample]:
    """Decode up to ``limit`` pictures of a folder (None: all), ``part`` of them at a time."""
    if folder is None:
        pixels = images.noise(preprocessing, 4)
        names = tuple(f"noise {i}" for i in range(len(pixels)))
        source = "seeded noise (no --images given)"
        yield Sample(pixels, names, source, preprocessing, max_batch=max_batch)
        return
    for loaded in image_folder.load_parts(folder, preprocessing, limit, part):
        yield Sample(
            loaded.pixels, loaded.names, str(folder), preprocessing, loaded.broken, max_batch,
            loaded.skipped, loaded.turned, loaded.given,
        )  # fmt: skip


def draw_files(
    paths: Sequence[Path], folder: Path, preprocessing: Preprocessing, *, max_batch: int = 8
) -> Sample:
    """Decode pictures that were chosen from ``folder``, or from a table of that path."""
    loaded = image_folder.decode(folder, paths, preprocessing)
    return Sample(
        loaded.pixels, loaded.names, str(folder), preprocessing, loaded.broken, max_batch,
        turned=loaded.turned, given=len(paths),
    )  # fmt: skip


def require_different(sample: Sample) -> Sample:
    """Require pictures that differ: on others a model that ignores its image would pass."""
    if len(sample) < 2:
        raise ImageError(
            f"{sample.source} gives 1 picture; a check needs at least 2 different ones, or a model "
            "that ignores its image would pass"
        )
    if all(np.array_equal(sample.pixels[0], other) for other in sample.pixels[1:]):
        raise ImageError(
            f"all {len(sample)} pictures of {sample.source} are alike once they are resized; a "
            "check needs at least 2 different ones, or a model that ignores its image would pass"
        )
    return sample


def batch_sizes(batch: BatchRange, max_batch: int) -> tuple[int, ...]:
    """Choose the smallest size, the largest that memory affords, and one between."""
    if batch.min > 3 * max_batch:
        raise SpecError(
            f"batch {batch}: memory affords a check of about {3 * max_batch} images at once; "
            "choose a smaller batch, or a machine with more memory"
        )
    largest = max(batch.min, min(batch.max, max_batch))
    between = min(batch.opt, largest)
    if between in {batch.min, largest}:
        between = (batch.min + largest) // 2
    return tuple(sorted({batch.min, between, largest}))


def sizes_without_largest(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Choose sizes for ``count`` images and a graph that is shown to keep the images apart.

    Its largest batch computes what smaller ones do (``msn_export.graph.batch``). So the two smaller
    sizes of ``batch_sizes`` are enough, and the last batch is of the images that are left: each
    runs once where that can be.
    """
    if len(sizes) < 3:
        return tuple(sizes)
    least, between = sizes[0], max(sizes[0] + 1, min(sizes[1], count - sizes[0]))
    left = (count - least - between) % between
    return tuple(sorted({least, between, *([left] if left > least else [])}))


def with_drawn(sizes: Sequence[int], seed: int) -> tuple[tuple[int, ...], str]:
    """Add two sizes drawn between the smallest and the largest: a graph may be right at others.

    Returns:
        The sizes in order, and a note that names the drawn ones; empty where there are none.
    """
    between = [size for size in range(min(sizes) + 1, max(sizes)) if size not in sizes]
    chosen = sorted(random.Random(seed).sample(between, min(2, len(between))))  # noqa: S311
    if not chosen:
        return tuple(sizes), ""
    named = " and ".join(map(str, chosen))
    return tuple(sorted({*sizes, *chosen})), f"batch {named} drawn by seed {seed}"


def with_ragged(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Add the size of the last batch of a data set, which is rarely a full one.

    A graph of one size takes full batches only: its sizes stay as they are.
    """
    least, largest = min(sizes), max(sizes)
    if least == largest:
        return tuple(sizes)
    ragged = count % largest
    if not least < ragged < largest:  # all full: any size between that is not tried yet
        ragged = (least + largest) // 2 + 1
    return tuple(sorted({*sizes, min(ragged, largest - 1)}))


def batches(sizes: Sequence[int], count: int) -> Iterator[list[int]]:
    """Deal ``count`` images into batches of ``sizes``, each image at least once.

    One batch of each size, then as many of the largest as it takes; a batch larger than what is
    left starts over with the first image.
    """
    start = 0
    for size in sizes:
        yield list(range(start, start + size))
        start += size
    while start < count:
        yield list(range(start, start + sizes[-1]))
        start += sizes[-1]


def max_batch_in_memory(tokens: int, dim: int, mlp_dim: int, heads: int) -> int:
    """Estimate how many images fit in a quarter of the memory that is free now.

    onnxruntime's CPU attention holds the scores and the probabilities, [h, n, n] fp32 each; the
    rest of a block peaks at two MLP activations and a few of the residual stream. A quarter,
    because fp16 graphs hold their casts too, and an allocator keeps what it once took.
    """
    each = 4 * (2 * heads * tokens * tokens + tokens * (2 * mlp_dim + 8 * dim))
    return max(1, available_memory() // 4 // each)


class OutputsOf(Protocol):
    """Anything that maps a batch of images to named outputs."""

    name: str

    def __call__(self, images: NDArray[Any], /) -> Mapping[str, NDArray[Any]]:
        """Run a batch in the runner's own input type."""


@dataclass(frozen=True, slots=True)
class Recalibrated:
    """A second baseline of 8 bits, whose ranges of activations are those of the check's images.

    A candidate may err ``margin`` times its ``errors`` over all images together.
    """

    errors: Mapping[str, Errors]
    name: str
    margin: float


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference's outputs, [count, ...] each, for the pictures of a sample.

    ``exact`` holds the outputs of the first pictures in fp64, where they were computed; they are
    what a candidate is compared with then. ``rounding`` is the error of the reference's own fp32
    arithmetic by output, as they show it. ``baseline`` are the errors of the reference in the
    candidate's precision, ``baseline_others`` those on pictures without fp64, ``baseline_name``
    says what ran for them, and ``margin`` how many times them a candidate may err;
    ``rounding_margin`` how many times the rounding, where there is no baseline. ``recalibrated``
    bounds the same once more, for a candidate of 8 bits. ``unmeasured`` says why there are none,
    where that needs saying.
    """

    outputs: Mapping[str, NDArray[Any]]
    sample: Sample
    name: str
    exact: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    rounding: Mapping[str, Errors] = field(default_factory=dict)
    baseline: Mapping[str, Errors] = field(default_factory=dict)
    baseline_others: Mapping[str, Errors] = field(default_factory=dict)
    baseline_name: str = ""
    margin: float = MARGIN
    rounding_margin: float = ROUNDING
    recalibrated: Recalibrated | None = None
    unmeasured: str = ""

    def limit(self, name: str) -> Limit | None:
        """Give what a candidate's errors may be in an output; None where nothing was measured."""
        baseline, rounding = self.baseline.get(name), self.rounding.get(name)
        if baseline is not None:
            others, again = self.baseline_others.get(name), self.recalibrated
            limit = Limit.of(baseline, rounding, self.margin, others)
            return limit.at_most(again.margin * again.errors[name].relative) if again else limit
        return None if rounding is None else Limit.of_rounding(rounding, self.rounding_margin)

    def limit_alone(self, name: str) -> Limit | None:
        """Give what an image may change in an output when others join it; None as in ``limit``.

        A candidate is compared with itself there, so it rounds at the same places in both.
        """
        return replace(self, margin=min(self.margin, MARGIN), recalibrated=None).limit(name)

    @property
    def limits_from(self) -> str:
        """Describe what the limits were measured on; nothing where they were not."""
        if self.baseline:
            first = f"{self.margin:g} times the errors of {self.baseline_name}"
            again = self.recalibrated
            if again is None:
                return first
            return f"{first}; over all images together {again.margin:g} times that of {again.name}"
        if self.rounding:
            return f"{self.rounding_margin:g} times the errors of {self.name} against fp64"
        return f"fixed numbers: {self.unmeasured}" if self.unmeasured else ""

    def rows(self, name: str, images: Sequence[int]) -> tuple[NDArray[Any], list[bool]]:
        """Give an output's rows for some pictures, in fp64 where they are, and which those are."""
        truth = self.exact.get(name)
        if truth is None:
            return self.outputs[name][images], [True] * len(images)
        exact = [image < len(truth) for image in images]
        rows = [
            truth[image] if is_exact else self.outputs[name][image]
            for image, is_exact in zip(images, exact, strict=True)
        ]
        return np.stack(rows), exact

    def require_finite(self) -> Reference:
        for name, values in self.outputs.items():
            if not np.issubdtype(values.dtype, np.number):
                raise ToleranceError(
                    f"output {name!r} of {self.name} is {values.dtype}; expected numbers"
                )
            good = np.isfinite(values).reshape(len(values), -1).all(axis=1)
            if not good.all():
                raise ToleranceError(
                    f"the reference itself is not finite: output {name!r} of {self.name} has NaN "
                    f"or infinite values on image {self.sample.names[int(np.argmin(good))]} "
                    f"({int((~good).sum())} of {len(good)} images); nothing can be compared with it"
                )
        return self


def run_reference(
    runner: OutputsOf,
    sample: Sample,
    input_format: InputFormat = InputFormat.FLOAT,
    *,
    fixed: int | None = None,
) -> Reference:
    """Run each picture once, eight at a time where memory affords it.

    A runner that takes only batches of ``fixed`` gets the last one filled up.
    """
    batch = fixed or min(8, sample.max_batch)
    parts = []
    for start in range(0, len(sample), batch):
        kept = min(batch, len(sample) - start)
        outputs = runner(sample.preprocess(range(start, start + (fixed or kept)), input_format))
        parts.append({name: np.asarray(output)[:kept] for name, output in outputs.items()})
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Reference(joined, sample, runner.name)


def measure_rounding(
    reference: Reference,
    exact: OutputsOf,
    images: int,
    input_format: InputFormat = InputFormat.FLOAT,
    *,
    fixed: int | None = None,
    joins: str = "",
) -> Reference:
    """Run the first ``images`` pictures in fp64 too: what is right, and how far fp32 is from it.

    ``exact`` is the reference in fp64, which takes twice the time. Where ``joins`` names what may
    join images of a batch, fp64 runs in full batches of fp32's: in others, what differs would be
    the images' company and not the rounding.
    """
    few = reference.sample.first(images, at_once=4)  # fp64 takes twice the memory
    if joins:
        batch = fixed or min(8, reference.sample.max_batch)
        few = reference.sample.first(max(batch, images - images % batch))
    truth = run_reference(exact, few, input_format, fixed=fixed).outputs
    return replace(reference, exact=truth, rounding=_rounding(truth, reference.outputs))


def add_rounding(reference: Reference, again: OutputsOf) -> Reference:
    """Take the rounding of another fp32 run into account, where that is larger.

    An output of few numbers, or whose errors all pictures share, may be rounded well by chance.
    ``again`` is the reference in fp32, rounded otherwise.
    """
    count = len(next(iter(reference.exact.values())))
    outputs = run_reference(again, reference.sample.first(count, at_once=4)).outputs
    found = _rounding(reference.exact, outputs)
    rounding = {name: errors.at_least(found[name]) for name, errors in reference.rounding.items()}
    return replace(reference, rounding=rounding)


def _rounding(
    truth: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]]
) -> dict[str, Errors]:
    rounding = {}
    for name, output in outputs.items():
        exact = truth[name]
        comparison = Comparison()
        comparison.add(exact, output[: len(exact)])
        rounding[name] = comparison.agreement().errors.at_least(float(np.finfo(np.float32).eps / 2))
    return rounding


def compare_alone(
    runner: OutputsOf,
    sample: Sample,
    input_format: InputFormat,
    sizes: Sequence[int],
    names: Collection[str],
) -> dict[str, Agreement]:
    """Compare the first pictures beside others with the same pictures alone.

    A candidate is compared with itself here, in the outputs called ``names``. So this shows what no
    reference shows: a fault about as large as the rounding, which may cancel it, and one that the
    reference has too. ``sizes`` are the batches that the runner takes, smallest first. A picture
    alone fills the smallest with its copies; beside others it is at a place of the largest that a
    seed draws, as the others are.
    """
    least, largest = min(sizes), max(sizes)
    count = min(len(sample), max(2, min(ALONE, COPIES // least)))
    drawn = random.Random(0)  # noqa: S311
    alone: dict[str, list[NDArray[Any]]] = defaultdict(list)
    beside: dict[str, list[NDArray[Any]]] = defaultdict(list)
    for index in range(count):
        outputs = runner(sample.preprocess([index] * least, input_format))
        for name in names:
            alone[name].append(np.asarray(outputs[name])[:1])
    for start in range(0, count, largest):
        compared = range(start, min(count, start + largest))
        others = [drawn.randrange(len(sample)) for _ in range(largest - len(compared))]
        places = drawn.sample(range(largest), largest)
        batch = np.empty(largest, np.intp)
        batch[places] = [*compared, *others]
        outputs = runner(sample.preprocess(batch.tolist(), input_format))
        for name in names:
            beside[name].append(np.asarray(outputs[name])[places[: len(compared)]])
    found = {}
    for name, rows in alone.items():
        comparison = Comparison()
        comparison.add(np.concatenate(rows), np.concatenate(beside[name]))
        found[name] = comparison.agreement()
    return found


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Agreement of a candidate with its reference at the sizes that ran, output by output.

    ``gate`` is what was asked of each. ``vectors`` are the candidate's embeddings, [count, dim] by
    output. ``accuracy`` is that of both on labelled images, where some were given. ``alone`` is
    the agreement of the candidate's images in a batch with the same images alone, by output, where
    ``joins`` names what may join them.
    """

    outputs: Mapping[str, Agreement]
    sizes: tuple[int, ...]
    executed_on: str
    reference: Reference
    gate: Gate
    per_image: tuple[ImageRecord, ...] = ()
    vectors: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    accuracy: AccuracyRecord | None = None
    alone: Mapping[str, Agreement] = field(default_factory=dict)
    joins: str = ""

    def with_alone(
        self, runner: OutputsOf, input_format: InputFormat, sizes: Sequence[int], joins: str
    ) -> Evaluation:
        """Compare images alone and beside others, where ``joins`` names what may join them."""
        if not joins or max(sizes) < 2:
            return self
        alone = compare_alone(runner, self.reference.sample, input_format, sizes, self.outputs)
        return replace(self, alone=alone, joins=joins)

    @property
    def failures(self) -> tuple[str, ...]:
        return self.disagreements + self.dependences + self.losses

    @property
    def disagreements(self) -> tuple[str, ...]:
        """Name each figure of an output that is past its limit."""
        return tuple(
            f"output {name!r}: {failure}"
            for name, agreement in self.outputs.items()
            for failure in self.gate.failures(agreement, self.reference.limit(name))
        )

    @property
    def dependences(self) -> tuple[str, ...]:
        """Name each output in which an image's result depends on the batch, with one figure."""
        found = []
        for name, agreement in self.alone.items():
            if failures := self.gate.failures(agreement, self.reference.limit_alone(name)):
                why = f"an image's result depends on the batch it is in: {failures[0]}"
                found.append(f"output {name!r}: {why}")
        return tuple(found)

    @property
    def about_joins(self) -> str:
        """Describe what was compared alone, and why; nothing where nothing was."""
        if not self.alone:
            return ""
        most = np.max([agreement.relative for agreement in self.alone.values()])
        count = next(iter(self.alone.values())).images
        return (
            f"{count} images beside others and alone differ by {most:.1e}; they were compared "
            f"because {self.joins} is not shown to keep them apart"
        )

    @property
    def losses(self) -> tuple[str, ...]:
        """Name what fails in the accuracy; nothing where none was counted."""
        return () if self.accuracy is None else tuple(failures_of(self.accuracy))

    def require(self, what: str) -> CheckRecord:
        for name, agreement in self.outputs.items():
            self.gate.require(agreement, f"{what}, output {name!r},", self.reference.limit(name))
        return self.check

    @property
    def check(self) -> CheckRecord:
        """The record that is stored: the figures of the worst output, and each output's own."""
        worst, reference, gate = worst_of(list(self.outputs.values())), self.reference, self.gate
        limits = {}
        if gate.is_measured:
            found = {name: reference.limit(name) for name in self.outputs}
            limits = {name: limit.errors for name, limit in found.items() if limit is not None}
        baseline = [errors.relative for errors in reference.baseline.values()]
        stored = {part.name for part in fields(CheckRecord)}
        return CheckRecord(
            **{name: value for name, value in worst.to_json().items() if name in stored},
            source=reference.sample.source,
            batches=self.sizes,
            passed=not self.failures,
            executed_on=self.executed_on,
            reference=reference.name,
            outputs={name: agreement.to_json() for name, agreement in self.outputs.items()},
            per_image=self.per_image,
            gate={name: getattr(gate, name) for name in gate.asked} if limits else gate.numbers,
            given=max(reference.sample.given, worst.images),
            twin_error=float(np.max(baseline)) if baseline else None,
            limits={name: errors.to_json() for name, errors in limits.items()},
            limits_from=reference.limits_from if gate.is_measured else "",
            skipped=dict(reference.sample.skipped),
            accuracy=self.accuracy,
        )


@dataclass(slots=True)
class Trial:
    """A candidate's comparisons, over one sample after another.

    ``names`` are the pictures' so far; ``rows`` says which picture each compared row is.
    """

    comparisons: dict[str, Comparison] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    vectors: dict[str, list[NDArray[Any]]] = field(default_factory=lambda: defaultdict(list))
    wanted: dict[str, list[NDArray[Any]]] = field(default_factory=lambda: defaultdict(list))

    def run(
        self,
        runner: OutputsOf,
        reference: Reference,
        input_format: InputFormat,
        sizes: Sequence[int],
    ) -> None:
        """Run a candidate over the reference's pictures at each batch size and compare."""
        sample = reference.sample
        chunks = list(batches(sizes, len(sample)))
        self._add(
            reference,
            chunks,
            (runner(sample.preprocess(indices, input_format)) for indices in chunks),
        )

    def repeat(
        self, outputs: Mapping[str, NDArray[Any]], reference: Reference, sizes: Sequence[int]
    ) -> None:
        """Compare what each picture gave once, as often as ``run`` at these sizes compares it.

        A picture that comes twice weighs twice in every figure of all pictures together.
        """
        count = len(reference.sample)
        chunks = list(batches(sizes, count))
        rows = ([index % count for index in indices] for indices in chunks)
        got = ({name: values[at] for name, values in outputs.items()} for at in rows)
        self._add(reference, chunks, got)

    def _add(
        self,
        reference: Reference,
        chunks: Sequence[list[int]],
        outputs: Iterable[Mapping[str, NDArray[Any]]],
    ) -> None:
        sample, before = reference.sample, len(self.names)
        vectors: dict[str, dict[int, NDArray[Any]]] = {name: {} for name in reference.outputs}
        for indices, got in zip(chunks, outputs, strict=True):
            images = [index % len(sample) for index in indices]
            self.rows += [before + image for image in images]
            for name in reference.outputs:
                if name not in got:
                    raise ToleranceError(
                        f"the candidate has no output {name!r}; it has {', '.join(got)}"
                    )
                output = np.asarray(got[name])
                wanted, exact = reference.rows(name, images)
                self.comparisons.setdefault(name, Comparison()).add(wanted, output, exact)
                vectors[name].update(zip(images, embedding_of(output), strict=True))
        self.names += sample.names
        for name, found in vectors.items():
            self.vectors[name] += [found[image] for image in range(len(sample))]
            self.wanted[name] += list(embedding_of(reference.outputs[name]))

    def errors(self) -> dict[str, Errors]:
        return {name: found.agreement().errors for name, found in self.comparisons.items()}

    def others(self) -> dict[str, Errors]:
        """Give the errors on pictures without fp64, where others are in fp64."""
        found = {name: each.agreement().others for name, each in self.comparisons.items()}
        return {name: errors for name, errors in found.items() if errors is not None}

    def evaluation(
        self, reference: Reference, sizes: Sequence[int], executed_on: str, gate: Gate
    ) -> Evaluation:
        """Sum up, for the limits that ``reference`` has."""
        vectors = {name: np.stack(rows) for name, rows in self.vectors.items()}
        agreements = {}
        for name, comparison in self.comparisons.items():
            agreement, wanted = comparison.agreement(), np.stack(self.wanted[name])
            floor = reference.rounding.get(name)
            if len(self.names) < 2:  # one picture in several rows is nowhere apart from itself
                agreement = replace(agreement, spread=None, centred=None)
            agreements[name] = replace(
                agreement,
                images=len(self.names),
                rounding=None if floor is None else agreement.relative / floor.relative,
                neighbours=neighbour_agreement(wanted, vectors[name]),
                classes=class_agreement(wanted, vectors[name])
                if name == Head.LOGITS.output
                else None,
            )
        per_image = _per_image(self.comparisons, self.rows, self.names)
        return Evaluation(
            agreements, tuple(sizes), executed_on, reference, gate, per_image, vectors
        )


def evaluate(
    runner: OutputsOf,
    reference: Reference,
    input_format: InputFormat,
    sizes: Sequence[int],
    gate: Gate,
) -> Evaluation:
    """Run a candidate over the reference's pictures at each batch size and compare."""
    trial = Trial()
    trial.run(runner, reference, input_format, sizes)
    return trial.evaluation(reference, sizes, runner.name, gate)


def _per_image(
    comparisons: Mapping[str, Comparison], rows: Sequence[int], names: Sequence[str]
) -> tuple[ImageRecord, ...]:
    """Give each image its worst figures over outputs and batch sizes, in the sample's order."""
    cosines: dict[int, list[float]] = defaultdict(list)
    differences: dict[int, list[float]] = defaultdict(list)
    for comparison in comparisons.values():
        for row, image in enumerate(rows):
            cosines[image].append(comparison.cosines[row])
            differences[image].append(comparison.worst[row])
    return tuple(
        ImageRecord(names[i], float(np.min(cosines[i])), float(np.max(differences[i])))
        for i in sorted(cosines)
    )
