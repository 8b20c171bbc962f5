"""Accuracy of a classifier with its interval, and the votes of neighbours where there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import ToleranceError

CONFIDENCE = 0.95
NEIGHBOURS = 20  # k of DINO's and MSN's k-NN evaluation: facebookresearch/dino eval_knn.py
_TEMPERATURE = 0.07  # of the votes there
_ROWS = 1024  # of cosines at once
CONFUSED = 1000  # classes; of ten thousand the pairs take gigabytes


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of images whose class is right; ``interval`` is Wilson's of ``top1`` at 95 %.

    ``confusion`` [true][predicted] counts images, ``per_class`` is the share of each class's
    images that is right, None of a class without one. ``top5`` is None below six classes,
    ``confusion`` above a thousand.
    """

    images: int
    top1: float
    top5: float | None
    interval: tuple[float, float]
    per_class: dict[str, float | None]
    confusion: tuple[tuple[int, ...], ...] | None

    @property
    def sentence(self) -> str:
        """The figure as a person reads it."""
        low, high = self.interval
        return f"{self.top1:.1%} of {self.images} images ({low:.1%} to {high:.1%})"


@dataclass(frozen=True, slots=True)
class Answers:
    """Predicted classes of images whose own classes are labelled.

    ``guesses`` [n] are the classes of the highest scores, -1 for a row with NaN or infinity;
    ``in_five`` [n] says whether the right class is among the five highest, None below six classes.
    """

    guesses: NDArray[np.intp]
    in_five: NDArray[np.bool_] | None

    @classmethod
    def of(cls, scores: NDArray[np.floating], labels: NDArray[np.intp]) -> Self:
        """Read scores [n, classes] of images of the classes ``labels`` [n]."""
        finite = np.isfinite(scores).all(axis=1)
        guesses = np.where(finite, np.nan_to_num(scores).argmax(axis=1), -1)
        if scores.shape[1] <= 5:
            return cls(guesses, None)
        five = np.argpartition(-np.nan_to_num(scores), 4, axis=1)[:, :5]
        return cls(guesses, (five == labels[:, None]).any(axis=1) & finite)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Put the answers of several batches one behind the other."""
        fives = [part.in_five for part in parts if part.in_five is not None]
        guesses = np.concatenate([part.guesses for part in parts])
        return cls(guesses, np.concatenate(fives) if fives else None)

    def accuracy(self, labels: NDArray[np.intp], classes: tuple[str, ...]) -> Accuracy:
        """Count the answers that are right, of one image or more."""
        right, answered = self.guesses == labels, self.guesses >= 0
        counts = np.bincount(labels, minlength=len(classes))
        hits = np.bincount(labels[right], minlength=len(classes))
        confusion = None
        if len(classes) <= CONFUSED:
            pairs = np.zeros((len(classes), len(classes)), np.int64)
            np.add.at(pairs, (labels[answered], self.guesses[answered]), 1)
            confusion = tuple(tuple(row) for row in pairs.tolist())
        return Accuracy(
            images=len(labels),
            top1=float(right.mean()),
            top5=float(self.in_five.mean()) if self.in_five is not None else None,
            interval=wilson(int(right.sum()), len(labels)),
            per_class={
                name: float(hit / count) if count else None
                for name, hit, count in zip(classes, hits, counts, strict=True)
            },
            confusion=confusion,
        )


def accuracy(
    scores: NDArray[np.floating], labels: NDArray[np.intp], classes: tuple[str, ...]
) -> Accuracy:
    """Count how often the highest score is the right class's.

    Args:
        scores: logits or votes [n, classes]; a row with a NaN is wrong.
        labels: the right classes [n].
        classes: their names.
    """
    if scores.ndim != 2 or scores.shape != (len(labels), len(classes)) or not len(labels):
        raise ToleranceError(
            f"scores have shape {list(scores.shape)}; expected [{len(labels)}, {len(classes)}] "
            "for one image or more"
        )
    return Answers.of(scores, labels).accuracy(labels, classes)


def wilson(hits: int, of: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Give Wilson's score interval of a share.

    E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927.
    """
    if not 0 <= hits <= of or of < 1:
        raise ToleranceError(f"{hits} of {of} is no share")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, spread = hits / of, z * z / of
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    # at the ends the interval reaches the end itself; the sum may miss it by a rounding
    return (0.0 if hits == 0 else centre - half, 1.0 if hits == of else centre + half)


def votes(
    features: NDArray[np.floating],
    labels: NDArray[np.intp],
    classes: int,
    queries: NDArray[np.floating] | None = None,
    k: int = NEIGHBOURS,
) -> NDArray[np.float64]:
    """Let each image's ``k`` nearest neighbours by cosine vote for their classes.

    A vote weighs exp(cosine / 0.07): facebookresearch/dino eval_knn.py.

    Args:
        features: [n, dim], of images whose classes are known.
        labels: their classes [n].
        classes: how many there are.
        queries: [m, dim], of the images that are asked for; None asks for the same images, each
            without itself.
        k: how many vote, or all where there are fewer.

    Returns:
        The sum of the votes for each class [m, classes]; NaN for an image whose embedding is zero
        or not finite, which has no neighbours and is none.
    """
    alone = queries is None
    given = _unit(features)
    asked = given if queries is None else _unit(queries)
    k = min(k, len(given) - alone)
    if k < 1:
        raise ToleranceError(f"{len(given)} image has no neighbour; give at least two")
    found = np.zeros((len(asked), classes))
    for start in range(0, len(asked), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(asked)))
        cosines = asked[rows] @ given.T
        cosines = np.where(np.isnan(cosines), -np.inf, cosines)
        if alone:
            cosines[rows - start, rows] = -np.inf
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(cosines, nearest, axis=1) / _TEMPERATURE)
        np.add.at(found, (rows[:, None], labels[nearest]), weights)
    found[np.isnan(asked).any(axis=1)] = np.nan
    return found


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    wide: NDArray[np.float64] = vectors.astype(np.float64)
    norms: NDArray[np.float64] = np.linalg.norm(wide, axis=1, keepdims=True)
    has_direction = np.isfinite(norms) & (norms > 0)
    return np.where(has_direction, wide / np.where(has_direction, norms, 1), np.nan)
