"""Run a reference once and compare any number of candidates with it, batch size by batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from msn_export.check.compare import Agreement, Comparison, worst_of
from msn_export.check.sample import Sample, batches
from msn_export.errors import ToleranceError
from msn_export.manifest import CheckRecord
from msn_export.spec import InputKind

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
    """A reference's outputs, [count, ...] each, for the pictures of a sample."""

    outputs: Mapping[str, NDArray[Any]]
    sample: Sample
    name: str


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


@dataclass(frozen=True, slots=True)
class Verified:
    """How a candidate agreed with its reference, output by output, at the sizes that ran."""

    outputs: Mapping[str, Agreement]
    sizes: tuple[int, ...]
    executed_on: str
    reference: Reference

    def require(self, gate: Gate, what: str) -> CheckRecord:
        """Pass every output through ``gate``.

        Raises:
            ToleranceError: an output does not reach it; the message names output and figures.
        """
        for name, agreement in self.outputs.items():
            gate.require(agreement, f"{what}, output {name!r},")
        return self.record(passed=True)

    def record(self, *, passed: bool) -> CheckRecord:
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
        )


def verify(runner: Runner, reference: Reference, stem: InputKind, sizes: Sequence[int]) -> Verified:
    """Run a candidate over the reference's pictures at each batch size and compare.

    Raises:
        ToleranceError: an output is missing or has another shape than the reference's.
    """
    sample = reference.sample
    comparisons = {name: Comparison() for name in reference.outputs}
    for indices in batches(sizes, len(sample)):
        got = runner(sample.feed(indices, stem))
        for name, comparison in comparisons.items():
            if name not in got:
                raise ToleranceError(
                    f"the candidate has no output {name!r}; it has {', '.join(got)}"
                )
            wanted = reference.outputs[name][np.asarray(indices) % len(sample)]
            comparison.add(wanted, np.asarray(got[name]))
    return Verified(
        {name: comparison.agreement() for name, comparison in comparisons.items()},
        tuple(sizes),
        runner.name,
        reference,
    )
