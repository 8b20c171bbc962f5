"""What came of comparing two artifacts: the verdict, its reasons, the figures behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from msn_export.compare.sides import Artifact, Pair
from msn_export.graph.structure import differences
from msn_export.manifest import CheckRecord
from msn_export.metrics.diagnose import label_faults
from msn_export.metrics.evaluate import Verified
from msn_export.metrics.tolerances import Gate
from msn_export.preprocessing import Preprocessing
from msn_export.spec import Dtype


@dataclass(frozen=True, slots=True)
class Side:
    """What was compared, for the record."""

    name: str
    kind: str
    dtype: Dtype
    preprocessing: Preprocessing


@dataclass(frozen=True, slots=True)
class Validation:
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


@dataclass(frozen=True, slots=True)
class Measured:
    """Both runs of a candidate, and what its disagreement is put down to."""

    same: Verified
    own: Verified | None
    cause: str | None
    notes: tuple[str, ...]


def judge(
    pair: Pair,
    measured: Measured,
    gate: Gate,
    name: Dtype,
    own: Preprocessing | None,
    *,
    numbers_only: bool = False,
) -> Validation:
    """Decide whether a candidate is what its reference is, and say why not.

    Args:
        pair: what was compared.
        measured: both runs of the candidate.
        gate: what is asked of each, named ``name``.
        name: see ``gate``.
        own: how the candidate is fed in production, where that differs from the reference's.
        numbers_only: contradictions between the graphs, and outputs that only one of them has, are
            notes, not reasons.
    """
    same, mine = measured.same, measured.own
    model, fed = same.failures(gate), mine.failures(gate) if mine is not None else []
    reasons, notes = list(model), [*pair.notes, *measured.notes]
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
    told = [*differences(pair.reference.structure, pair.candidate.structure), *pair.alone]
    if numbers_only:
        notes += told
    else:
        reasons += told
    return Validation(
        reference=_side(pair.reference, same.reference.sample.preprocessing),
        candidate=_side(pair.candidate, own or same.reference.sample.preprocessing),
        passed=not reasons,
        check=same.record(gate, passed=not model),
        own=mine.record(gate, passed=not fed) if mine is not None else None,
        gate=gate,
        gate_name=name,
        reasons=tuple(reasons),
        cause=measured.cause,
        notes=tuple(dict.fromkeys(notes)),
    )


def _least(verified: Verified) -> str:
    return f"{np.min([agreement.cosine_min for agreement in verified.outputs.values()]):.6f}"


def _side(artifact: Artifact, used: Preprocessing) -> Side:
    return Side(artifact.name, artifact.kind, artifact.dtype, used)
