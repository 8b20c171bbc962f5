"""Labelled pictures through models that are open: their outputs, and how often two sides are right.

Several models that take the same pixels are run together: each picture is decoded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from msn_export.embedding.inference import decoded, decoders
from msn_export.errors import ImageError, SpecError, ToleranceError
from msn_export.image_folder import notes_on
from msn_export.metrics.accuracy import NEIGHBOURS, Answers, answers_of_neighbours, compared
from msn_export.metrics.metrics import embedding_of
from msn_export.spec import Head

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from msn_export.feed import Feed
    from msn_export.labelled import Labelled
    from msn_export.manifest import AccuracyRecord
    from msn_export.metrics.evaluate import OutputsOf
    from msn_export.progress import Progress

BATCH = 8  # labelled pictures at a time, where no batch is asked for


@dataclass(frozen=True, slots=True)
class LabelledModel:
    """A model that is open, how it takes pictures, and the outputs that are kept.

    ``labels`` are the names of its classes, in the order of its logits; ``name`` is for errors.
    """

    name: str
    runner: OutputsOf
    feed: Feed
    outputs: tuple[str, ...]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputRows:
    """Outputs for ``count`` pictures; ``errors`` say by row what cannot be read.

    Of logits only the ``answers`` are kept: those of 10,000 classes would be 40 kB a picture.
    ``values`` [count, width] are the other outputs. ``withheld`` are pictures that were not to be
    run; ``turned`` counts those that EXIF turned.
    """

    count: int
    values: dict[str, NDArray[np.float32]]
    answers: Answers | None
    errors: dict[int, str]
    turned: int = 0
    withheld: frozenset[int] = field(default_factory=frozenset)

    def whole(self) -> NDArray[np.intp]:
        """List the rows of pictures that were read and run."""
        left_out = self.errors.keys() | self.withheld
        return np.array([row for row in range(self.count) if row not in left_out], np.intp)

    def some(self, rows: NDArray[np.intp]) -> OutputRows:
        """Give rows of pictures that were read and run."""
        values = {name: each[rows] for name, each in self.values.items()}
        answers = self.answers.some(rows) if self.answers is not None else None
        return OutputRows(len(rows), values, answers, {})

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes for users on pictures that were left out or turned."""
        broken = tuple(self.errors[row] for row in sorted(self.errors))
        return notes_on(broken, {}, self.turned)


def run_labelled(
    labelled: Labelled,
    models: Sequence[LabelledModel],
    batch: int,
    progress: Progress,
    withhold: Callable[[NDArray[np.uint8]], bool] | None = None,
) -> list[OutputRows]:
    """Run labelled pictures through models that take the same pixels, decoding each once.

    Of an output of tokens [b, n, dim] the first is kept, of others all numbers of an image.

    Args:
        labelled: the pictures; their classes are matched with each model's that has logits.
        models: their feeds differ in the input format alone.
        batch: pictures at a time.
        progress: shows how far it is.
        withhold: says of a picture's pixels [h, w, c] whether it is left out.

    Raises:
        ImageError: no picture can be read, or a model lacks a class.
        SpecError: a model has more or fewer logits than names of classes.
    """
    kept = [_Kept(model, labelled) for model in models]
    errors, withheld, turned, total = dict[int, str](), set[int](), 0, len(labelled)
    batches = [range(start, min(start + batch, total)) for start in range(0, total, batch)]
    for one, pictures in decoded(labelled.paths, models[0].feed, batch, decoders(), batches):
        errors |= {one.start + row: text for row, text in pictures.errors.items()}
        if withhold is not None:
            pixels = enumerate(pictures.pixels)
            withheld |= {one.start + row for row, each in pixels if withhold(each)}
        for each in kept:
            each.run(pictures.pixels, one)
        turned += pictures.turned
        progress.advance(one.stop, total, f"{one.stop} of {total}, {len(errors)} broken")
    if len(errors) == total:
        raise ImageError(
            f"none of the {total} pictures of {labelled.source} can be read; the first: {errors[0]}"
        )
    left_out = frozenset(withheld - errors.keys())
    return [
        OutputRows(total, each.rows(), each.answers(), errors, turned, left_out) for each in kept
    ]


class _Kept:
    """A model with what is kept of its outputs, batch by batch."""

    def __init__(self, model: LabelledModel, labelled: Labelled) -> None:
        self._model = model
        self._values: dict[str, list[NDArray[np.float32]]]
        self._values = {name: [] for name in model.outputs if name != Head.LOGITS.output}
        self._answers: list[Answers] = []
        self._labels: NDArray[np.intp] | None = None
        if Head.LOGITS.output in model.outputs:
            self._labels = labelled.as_classes(model.labels, model.name).labels

    def run(self, pixels: NDArray[np.uint8], rows: range) -> None:
        """Run the pictures of some rows."""
        model = self._model
        outputs = model.runner(model.feed(pixels))
        for name, parts in self._values.items():
            parts.append(embedding_of(np.asarray(outputs[name], np.float32)))
        if self._labels is not None:
            logits = embedding_of(np.asarray(outputs[Head.LOGITS.output], np.float32))
            _require_width(model, logits)
            self._answers.append(Answers.of(logits, self._labels[rows.start : rows.stop]))

    def rows(self) -> dict[str, NDArray[np.float32]]:
        return {name: np.concatenate(parts) for name, parts in self._values.items()}

    def answers(self) -> Answers | None:
        return Answers.joined(self._answers) if self._answers else None


# Outputs whose neighbours tell classes, best first; the last is that of other exporters
_VECTORS = (Head.FEATURES.output, Head.CLS.output, Head.MEAN.output, "pooler_output")


def vector_of(outputs: Sequence[str]) -> str | None:
    """Choose the output that neighbours are found by; None where there are logits alone."""
    others = [name for name in outputs if name != Head.LOGITS.output]
    return next((name for name in (*_VECTORS, *others) if name in others), None)


def output_to_compare(outputs: Sequence[str]) -> str:
    """Choose what tells classes of both sides: logits, else the output of neighbours."""
    vector = vector_of(outputs)
    assert vector is not None or Head.LOGITS.output in outputs, "sides share an output"
    return Head.LOGITS.output if Head.LOGITS.output in outputs or vector is None else vector


def require_classes(
    labelled: Labelled, outputs: Sequence[str], labels: tuple[str, ...], name: str
) -> None:
    """Refuse, before anything ran, pictures of classes that a classifier does not have.

    Args:
        labelled: the pictures.
        outputs: those to compare.
        labels: the names of the classifier's classes.
        name: what to call the classifier in errors.
    """
    if output_to_compare(outputs) == Head.LOGITS.output:
        labelled.as_classes(labels, name)


@dataclass(frozen=True, slots=True)
class LabelledReference:
    """A reference's rows for labelled pictures, to compare others with, one after another.

    ``labelled`` are the pictures that were read and run, of ``given`` ones; ``withheld`` counts
    those that were not to be run.
    """

    labelled: Labelled
    model: LabelledModel
    rows: OutputRows
    given: int
    withheld: int
    notes: tuple[str, ...]

    @classmethod
    def run(
        cls,
        labelled: Labelled,
        model: LabelledModel,
        progress: Progress,
        withhold: Callable[[NDArray[np.uint8]], bool],
    ) -> LabelledReference:
        """Run a reference on the pictures that ``withhold`` does not leave out."""
        (rows,) = run_labelled(labelled, [model], BATCH, progress, withhold)
        kept = rows.whole()
        notes = (*rows.notes, *notes_on((), labelled.skipped, 0))
        return cls(
            labelled.some(kept), model, rows.some(kept), len(labelled), len(rows.withheld), notes
        )

    def accuracy_of(self, runner: OutputsOf, allowed: float, progress: Progress) -> AccuracyRecord:
        """Run another that takes the same input on the same pictures, and compare."""
        model = replace(self.model, runner=runner)
        (rows,) = run_labelled(self.labelled, [model], BATCH, progress)
        found = compare_accuracy(
            self.labelled, (self.model, self.rows), (model, rows), allowed=allowed
        )
        return replace(found, given=self.given)


def compare_accuracy(
    labelled: Labelled,
    reference: tuple[LabelledModel, OutputRows],
    candidate: tuple[LabelledModel, OutputRows],
    *,
    allowed: float,
) -> AccuracyRecord:
    """Compare how often two sides are right, by the one output that both kept.

    Logits answer with the class of the highest, each side by its own names of classes. Any other
    output answers with the votes of its nearest neighbours among the other pictures.

    Args:
        labelled: the pictures.
        reference: a model with what it made of them.
        candidate: the same.
        allowed: the loss of accuracy that does not fail, as a share.

    Raises:
        ToleranceError: the reference itself is not finite, or no picture is left.
    """
    (output,) = reference[0].outputs
    kept = np.intersect1d(reference[1].whole(), candidate[1].whole())
    if not len(kept):
        raise ToleranceError(f"no picture of {labelled.source} is left to judge by")
    judged, k = labelled.some(kept), min(NEIGHBOURS, len(kept) - 1)
    right, not_finite = [], []
    for model, rows in (reference, candidate):
        if (answers := rows.answers) is not None:
            answers = answers.some(kept)
            wanted = judged.as_classes(model.labels, model.name).labels
            finite = answers.finite
        else:
            values, wanted = rows.values[output][kept], judged.labels
            answers = answers_of_neighbours(values, wanted, len(judged.classes), k=k)
            finite = np.asarray(np.isfinite(values).all(axis=1))
        not_finite.append(~finite)
        right.append(answers.guesses == wanted)
    if not_finite[0].any():
        first = judged.paths[int(np.argmax(not_finite[0]))]
        raise ToleranceError(
            f"the reference itself is not finite: output {output!r} of {reference[0].name} has NaN "
            f"or infinity for {first} ({int(not_finite[0].sum())} of {len(kept)} pictures); "
            "nothing can be compared with it"
        )
    found = compared(right[0], right[1], allowed=allowed, not_finite=int(not_finite[1].sum()))
    return replace(
        found,
        labelled=str(labelled.source),
        classes=len(judged.classes),
        by=output if output == Head.LOGITS.output else f"{k} neighbours of {output}",
        given=len(labelled),
    )


def _require_width(model: LabelledModel, values: NDArray[np.float32]) -> None:
    if values.shape[1] != len(model.labels):
        raise SpecError(
            f"{model.name} has {values.shape[1]} logits and {len(model.labels)} names of classes; "
            "the labels of pictures cannot be matched with them"
        )
