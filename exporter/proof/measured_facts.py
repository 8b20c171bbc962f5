"""What a report says of comparisons: those that ran for it, and those a manifest holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from msn_export.check.drift import StageDrift, TensorDrift
from msn_export.check.gate import GATES, HEADROOM, in_words
from msn_export.check.neighbours import embedding_of, nearest
from msn_export.check.verify import Verified
from msn_export.manifest import Manifest
from msn_export.proof.artifact import is_checkpoint
from msn_export.proof.drift import Drift
from msn_export.proof.validation import Validation
from msn_export.report import facts

WORST = 3  # images shown of each comparison


def live_agreement(validation: Validation, verified: Verified) -> facts.Agreement:
    """Describe a comparison that ran for the report."""
    return facts.Agreement(
        candidate=short(validation.candidate.name),
        reference=short(validation.reference.name),
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


def recorded_agreement(name: str, manifest: Manifest) -> facts.Agreement:
    """Describe the comparison that a manifest holds: what ran when the artifact was made."""
    check = manifest.check
    assert check is not None
    gate = in_words(check.gate or GATES[manifest.dtype].numbers)
    if manifest.engine is not None and not manifest.engine.executed:
        name = f"typed graph of {name}"  # no engine agrees with anything before it ran
    return facts.Agreement(
        candidate=name,
        reference=_reference(manifest, check.reference),
        live=False,
        passed=check.passed,
        check=check,
        gate=f"{manifest.dtype}: {gate}",
        notes=check.notes,
    )


def _reference(manifest: Manifest, named: str) -> str:
    """Name what a manifest's check compared with: a checkpoint's graph, or a graph's engine."""
    if manifest.kind == "onnx" and manifest.checkpoint is not None:
        return f"{manifest.checkpoint.source} in PyTorch"
    return short(named.split(" in ", maxsplit=1)[0])


def drift_facts(found: Drift) -> facts.Drift:
    """Describe a comparison block by block."""
    return facts.Drift(
        candidate=short(found.candidate),
        reference=short(found.reference),
        sentence=found.sentence,
        parted=found.parted,
        stages=tuple(_stage(stage) for stage in found.stages),
        suspect=found.suspect,
        inside=tuple(_tensor(tensor) for tensor in found.inside),
        needed=HEADROOM,
        notes=found.notes,
    )


def _stage(stage: StageDrift) -> facts.Stage:
    tensor, own = stage.tensor, stage.own
    return facts.Stage(
        stage.name, tensor.cosine_min, tensor.relative, tensor.max_abs, stage.peak,
        own.allowed if own else None, own.relative if own else None, stage.headroom,
        stage.peak_tensor,
    )  # fmt: skip


def _tensor(tensor: TensorDrift) -> facts.Stage:
    return facts.Stage(
        tensor.name, tensor.cosine_min, tensor.relative, tensor.max_abs, tensor.largest
    )


def short(name: str) -> str:
    """Name a file without its folder, a checkpoint as it is."""
    return name if is_checkpoint(name) else Path(name).name
