"""Whether two artifacts mean the same by class number 3."""

from __future__ import annotations

import re
from collections.abc import Sequence

_UNNAMED = re.compile(r"LABEL_\d+")  # what transformers writes where nobody named the classes


def label_faults(reference: Sequence[str], candidate: Sequence[str]) -> list[str]:
    """Say where class names contradict each other; classes without names contradict nothing."""
    if not _named(reference) or not _named(candidate) or tuple(reference) == tuple(candidate):
        return []
    if len(reference) != len(candidate):
        return [f"the reference names {len(reference)} classes, the candidate {len(candidate)}"]
    if list(candidate[1:]) == list(reference[:-1]):
        return ["the candidate's class names are the reference's shifted by +1"]
    if list(candidate[:-1]) == list(reference[1:]):
        return ["the candidate's class names are the reference's shifted by -1"]
    wrong = [i for i, pair in enumerate(zip(reference, candidate, strict=True)) if len({*pair}) > 1]
    first = wrong[0]
    return [
        f"{len(wrong)} class names differ: class {first} is {candidate[first]!r}, the reference's "
        f"{reference[first]!r}"
    ]


def _named(labels: Sequence[str]) -> bool:
    return bool(labels) and not all(_UNNAMED.fullmatch(label) for label in labels)
