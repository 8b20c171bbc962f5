"""A fitted classifier in rows of a name and a text: for pages and for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from msn_export.fit_record import FitRecord

_LEAST = 3  # classes that are named: those found least
_FEATURES = {
    "msn": "[CLS] before the final LayerNorm, centred and of norm 1",
    "embedding": "[CLS] behind the final LayerNorm",
}


def fit_rows(record: FitRecord, *, itself: bool) -> Iterator[tuple[str, str]]:
    """Describe a classifier that was fitted, and how often it is right.

    Args:
        record: what its manifest has.
        itself: the artifact is the graph that was measured, not one that was made from it.
    """
    each = "" if record.shots is None else f", {record.shots} of each class (seed {record.seed})"
    images = f"{record.images:,} images of {record.labelled}"
    yield "fitted on", f"{images}{each}, {record.classes:,} classes"
    blocks = f" of the last {record.blocks} blocks" if record.blocks > 1 else ""
    yield "features", f"{record.features}: {_FEATURES[record.features]}{blocks}"
    found = ", ".join(f"{share:.1%} at {C}" for C, share in record.strengths.items())
    yield "C", f"{record.C:g}" + (f", chosen by cross-validation: {found}" if found else "")
    yield from _accuracy_rows(record, "accuracy" if itself else "accuracy before")
    if record.relative is not None and record.same is not None:
        yield (
            "against",
            f"scikit-learn's decision function on PyTorch's features, {record.compared} images",
        )
        yield "", f"relative error {record.relative:.1e}, {record.same:.1%} of the classes the same"


def _accuracy_rows(record: FitRecord, title: str) -> Iterator[tuple[str, str]]:
    accuracy = record.accuracy
    if accuracy is None:
        yield title, f"not measured: {record.unmeasured}"
        return
    low, high = accuracy.interval
    share = f"{accuracy.top1:.1%}, 95 % of such samples {low:.1%} to {high:.1%}"
    yield title, f"{share}; {accuracy.images:,} images: {accuracy.how}"
    if accuracy.top5 is not None:
        yield "", f"{accuracy.top5:.1%} among the best five"
    if accuracy.mean is not None and accuracy.deviation is not None:
        spread = f"{accuracy.mean:.1%} on average, standard deviation {accuracy.deviation:.1%}"
        yield "", f"{len(accuracy.draws)} draws: {spread}; this is the first"
    worst = sorted((share, name) for name, share in accuracy.per_class.items() if share is not None)
    for share_of, name in worst[:_LEAST]:
        yield "least right", f"{name}: {share_of:.1%}"
