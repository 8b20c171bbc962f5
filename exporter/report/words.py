"""The words of a report: its headline, what follows from the figures, where it came from."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime

from msn_export.manifest import Manifest
from msn_export.report import facts
from msn_export.spec import Scores


def verdict(
    artifacts: Sequence[facts.Artifact], agreements: Sequence[facts.Agreement]
) -> tuple[facts.State, str]:
    """Say in one line whether all that ran agrees, what did not run and what was not checked."""
    failed = [found.candidate for found in agreements if not found.passed]
    foreign = [artifact.name for artifact in artifacts if artifact.verdict == "not believed"]
    stale = [artifact.name for artifact in artifacts if artifact.verdict == "stale"]
    wrong = (
        (failed, "not what the reference is"),
        (foreign, "the manifest is not believed"),
        (stale, "made from another graph or checkpoint than the one here"),
    )
    if failed or foreign or stale:
        return "failed", "; ".join(f"{', '.join(names)}: {what}" for names, what in wrong if names)
    if not agreements:
        return "partial", "Nothing was compared"
    open_ends = []
    for state, words in (("compiled, not run", "did not run"), ("not checked", "was not checked")):
        names = [artifact.name for artifact in artifacts if artifact.verdict == state]
        open_ends += [f"{', '.join(names)} {words}"] if names else []
    if open_ends:
        return "partial", "; ".join(["Everything that ran agrees", *open_ends])
    return "passed", "Every artifact agrees with its reference"


def sentences(
    artifacts: Sequence[facts.Artifact],
    agreements: Sequence[facts.Agreement],
    drifts: Sequence[facts.Drift],
) -> list[str]:
    """Say what each comparison and each engine came to."""
    said = []
    for found in agreements:
        check, word = found.check, "agrees" if found.passed else "does not agree"
        cosine = "none" if check.cosine_min is None else f"{check.cosine_min:.7f}"
        said.append(
            f"{found.candidate} {word} with {found.reference} on {check.images} images: "
            f"least cosine {cosine}"
            + (f". {'; '.join(found.reasons)}" if found.reasons else "")
            + (f". {found.cause}" if found.cause else "")
        )
    said += [f"{d.candidate} parts from {d.reference} at {d.parted}" for d in drifts if d.parted]
    said += [artifact.distrusted for artifact in artifacts if artifact.distrusted]
    for artifact in artifacts:
        engine = artifact.engine
        if engine is not None:
            products = ", ".join(f"{n} in {dtype}" for dtype, n in engine.products.items())
            said.append(
                f"{artifact.name}: {engine.kernels} kernels, attention fused in {engine.fused} of "
                f"{engine.blocks} blocks, matrix products {products}; {engine.executed}"
            )
    return said


def title_of(manifest: Manifest | None, artifacts: Sequence[facts.Artifact]) -> str:
    """Name the report after the checkpoint, else after the first artifact."""
    if manifest is not None and manifest.checkpoint is not None:
        return manifest.checkpoint.source
    return artifacts[0].name


def subtitle_of(manifest: Manifest | None) -> str:
    """Say which shape of ViT-MSN it is."""
    config = manifest.config if manifest is not None else None
    if config is None:
        return "ViT-MSN"
    return (
        f"ViT-MSN, {config.get('depth')} blocks of {config.get('dim')} with {config.get('heads')} "
        f"heads, images of {_by(config.get('image_size'))} in patches of "
        f"{_by(config.get('patch_size'))}"
    )


def _by(pair: object) -> str:
    return "x".join(map(str, pair)) if isinstance(pair, list) else str(pair)


def origin_of(manifest: Manifest | None) -> list[tuple[str, str]]:
    """Say which weights it came from, and how pictures become its input."""
    if manifest is None:
        return []
    rows = []
    if manifest.checkpoint is not None:
        rows += [
            ("checkpoint", manifest.checkpoint.source),
            ("weights' sha256", manifest.checkpoint.sha256),
        ]
        rows += [("note", note) for note in manifest.checkpoint.notes]
    made = manifest.preprocessing
    if made is not None:
        rows.append(("preprocessing", f"{made.title}: {made.geometry}"))
        rows.append(("normalisation", made.values))
    if manifest.labels:
        rows.append(("classes", f"{len(manifest.labels)}: {', '.join(manifest.labels[:5])}, …"))
        scores = manifest.scores or Scores.of(None, len(manifest.labels))
        rows.append(("scores", f"{scores} of the logits"))
    rows.append(("versions", ", ".join(f"{n} {v}" for n, v in manifest.versions.items())))
    return rows


def now() -> str:
    """Give the time, or SOURCE_DATE_EPOCH (reproducible-builds.org) where that is set."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    at = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdigit() else datetime.now(UTC)
    return at.strftime("%d %B %Y, %H:%M UTC")
