"""The result of comparing two artifacts: the verdict, its reasons, the figures behind them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from msn_export.artifact import Artifact
from msn_export.compare.sides import Pair
from msn_export.graph.summary import differences
from msn_export.manifest import CheckRecord
from msn_export.metrics.diagnose import label_faults
from msn_export.metrics.evaluate import Evaluation
from msn_export.metrics.tolerances import Gate
from msn_export.preprocessing import Preprocessing
from msn_export.schema import Result
from msn_export.spec import Dtype


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison, for the record."""

    name: str
    kind: str
    dtype: Dtype
    preprocessing: Preprocessing


@dataclass(frozen=True, slots=True, repr=False)
class Validation(Result):
    """The verdict, the figures behind it, and why.

    ``check`` gave both sides the same pixels; ``own``, where preprocessing differs, gave each what
    its own makes of the same pictures. ``reasons`` is empty when ``passed``.
    """

    reference: Side
    candidate: Side
    passed: bool
    check: CheckRecord
    own: CheckRecord | None
    gate: Gate
    gate_name: Dtype
    reasons: tuple[str, ...]
    cause: str | None
    notes: tuple[str, ...]


def decide(
    pair: Pair,
    name: Dtype,
    same: Evaluation,
    mine: Evaluation | None,
    notes: Sequence[str],
    *,
    numbers_only: bool = False,
) -> Validation:
    """Decide whether a candidate is what its reference is, and say why not.

    Args:
        pair: what was compared.
        name: whose gate it was.
        same: the candidate on the reference's pixels.
        mine: the candidate on the same pictures as it is fed in production, where that differs.
        notes: what else is to be said of the runs.
        numbers_only: contradictions between the graphs, and outputs that only one of them has, are
            notes, not reasons.
    """
    model, fed = same.failures, mine.failures if mine is not None else ()
    reasons, notes = list(model), [*pair.notes, *notes]
    if mine is not None:
        shown = (
            f"with the same pixels cosine {_least(same)}, each with its own preprocessing "
            f"{_least(mine)}"
        )
        if fed and model:
            reasons.append(f"the preprocessing differs too: {shown}")
        elif fed:
            reasons.append(f"a preprocessing mismatch, the model itself agrees: {shown}")
        else:
            reasons = []
            notes.append(
                f"the preprocessing differs and the verdict is that of both together: {shown}"
            )
    reasons += label_faults(pair.reference.labels, pair.candidate.labels)
    contradictions = [*differences(pair.reference.structure, pair.candidate.structure), *pair.alone]
    if numbers_only:
        notes += contradictions
    else:
        reasons += contradictions
    return Validation(
        reference=_side(pair.reference, same.reference.sample.preprocessing),
        candidate=_side(pair.candidate, (mine or same).reference.sample.preprocessing),
        passed=not reasons,
        check=same.check,
        own=mine.check if mine is not None else None,
        gate=same.gate,
        gate_name=name,
        reasons=tuple(reasons),
        cause=None,
        notes=tuple(dict.fromkeys(notes)),
    )


def _least(found: Evaluation) -> str:
    return f"{np.min([agreement.cosine_min for agreement in found.outputs.values()]):.6f}"


def _side(artifact: Artifact, used: Preprocessing) -> Side:
    return Side(artifact.name, artifact.kind, artifact.dtype, used)
