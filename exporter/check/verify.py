"""Run a reference once and compare any number of candidates with it, batch size by batch size."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from msn_export.check.compare import Agreement, Comparison, worst_of
from msn_export.check.neighbours import class_agreement, embedding_of, neighbour_agreement
from msn_export.check.sample import Sample, batches
from msn_export.errors import ToleranceError
from msn_export.manifest_records import CheckRecord, ImageRecord
from msn_export.spec import Head, InputKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from msn_export.check.gate import Gate


class Runner(Protocol):
    """Anything that maps a batch of images to named outputs."""

    name: str

    def __call__(self, images: NDArray[Any], /) -> Mapping[str, NDArray[Any]]:
        """Run a batch in the runner's own input type."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference's outputs, [count, ...] each, for the pictures of a sample.

    ``rounding`` is the relative error of its own arithmetic by output, where that is known.
    """

    outputs: Mapping[str, NDArray[Any]]
    sample: Sample
    name: str
    rounding: Mapping[str, float] = field(default_factory=dict)


def run_reference(
    runner: Runner, sample: Sample, stem: InputKind = InputKind.FLOAT, *, fixed: int | None = None
) -> Reference:
    """Run each picture once, eight at a time where memory affords it.

    A runner that takes only batches of ``fixed`` gets the last one filled up.
    """
    batch = fixed or min(8, sample.room)
    parts = []
    for start in range(0, len(sample), batch):
        kept = min(batch, len(sample) - start)
        outputs = runner(sample.feed(range(start, start + (fixed or kept)), stem))
        parts.append({name: np.asarray(output)[:kept] for name, output in outputs.items()})
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Reference(joined, sample, runner.name)


def measure_rounding(reference: Reference, exact: Runner, images: int = 8) -> Reference:
    """Add how far the reference's own fp32 arithmetic is from ``exact``, the same in fp64."""
    sample = reference.sample
    few = replace(sample, pixels=sample.pixels[:images], room=min(sample.room, 4))
    truth = run_reference(exact, few).outputs
    rounding = {}
    for name, output in reference.outputs.items():
        comparison = Comparison()
        comparison.add(truth[name], output[: len(few)])
        rounding[name] = comparison.agreement().relative
    return replace(reference, rounding=rounding)


@dataclass(frozen=True, slots=True)
class Verified:
    """How a candidate agreed with its reference, output by output, at the sizes that ran.

    ``vectors`` are the candidate's embeddings, [count, dim] by output.
    """

    outputs: Mapping[str, Agreement]
    sizes: tuple[int, ...]
    executed_on: str
    reference: Reference
    per_image: tuple[ImageRecord, ...] = ()
    vectors: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def failures(self, gate: Gate) -> list[str]:
        """Say which outputs do not reach ``gate``, and why."""
        return [
            f"output {name!r}: {failure}"
            for name, agreement in self.outputs.items()
            for failure in gate.failures(agreement)
        ]

    def require(self, gate: Gate, what: str) -> CheckRecord:
        """Pass every output through ``gate``.

        Raises:
            ToleranceError: an output does not reach it; the message names output and figures.
        """
        for name, agreement in self.outputs.items():
            gate.require(agreement, f"{what}, output {name!r},")
        return self.record(gate, passed=True)

    def record(self, gate: Gate, *, passed: bool) -> CheckRecord:
        """Write down the figures: those of the worst output, and each output's own."""
        worst = worst_of(list(self.outputs.values()))
        return CheckRecord(
            images=len(self.reference.sample),
            source=self.reference.sample.source,
            batches=self.sizes,
            max_abs=worst.max_abs,
            mean_abs=worst.mean_abs,
            cosine_min=worst.cosine_min,
            cosine_p1=worst.cosine_p1,
            cosine_median=worst.cosine_median,
            passed=passed,
            executed_on=self.executed_on,
            reference=self.reference.name,
            outputs={name: agreement.to_json() for name, agreement in self.outputs.items()},
            neighbours=worst.neighbours,
            classes=worst.classes,
            per_image=self.per_image,
            gate=gate.numbers,
        )


def verify(runner: Runner, reference: Reference, stem: InputKind, sizes: Sequence[int]) -> Verified:
    """Run a candidate over the reference's pictures at each batch size and compare.

    Raises:
        ToleranceError: an output is missing or has another shape than the reference's.
    """
    sample = reference.sample
    comparisons = {name: Comparison() for name in reference.outputs}
    vectors: dict[str, dict[int, NDArray[Any]]] = {name: {} for name in reference.outputs}
    rows: list[int] = []
    for indices in batches(sizes, len(sample)):
        got = runner(sample.feed(indices, stem))
        images = [index % len(sample) for index in indices]
        rows += images
        for name, comparison in comparisons.items():
            if name not in got:
                raise ToleranceError(
                    f"the candidate has no output {name!r}; it has {', '.join(got)}"
                )
            output = np.asarray(got[name])
            comparison.add(reference.outputs[name][images], output)
            vectors[name].update(zip(images, embedding_of(output), strict=True))
    stacked = {
        name: np.stack([found[image] for image in range(len(sample))])
        for name, found in vectors.items()
    }
    agreements = {
        name: _with_set_figures(comparison.agreement(), reference, name, stacked[name])
        for name, comparison in comparisons.items()
    }
    per_image = _per_image(comparisons, rows, sample.names)
    return Verified(agreements, tuple(sizes), runner.name, reference, per_image, stacked)


def _with_set_figures(
    agreement: Agreement, reference: Reference, name: str, vectors: NDArray[Any]
) -> Agreement:
    """Add the figures of the set as a whole."""
    wanted = embedding_of(reference.outputs[name])
    floor = reference.rounding.get(name)
    return replace(
        agreement,
        images=len(wanted),
        rounding=None if floor is None else agreement.relative / max(floor, np.finfo(float).tiny),
        neighbours=neighbour_agreement(wanted, vectors),
        classes=class_agreement(wanted, vectors) if name == Head.LOGITS.output else None,
    )


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
