"""Accuracy with its interval, the votes of neighbours, and the test of two sides' difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Self

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import ToleranceError
from msn_export.manifest import AccuracyRecord, Conclusion, ShareRecord

CONFIDENCE = 0.95
# A loss of accuracy fails where chance alone would bring it less often: one sound candidate in a
# hundred at most
SIGNIFICANCE = 0.01
TELLING = 0.05  # a loss that images must be able to exclude, or they are too few to tell
_PAIRS = 50  # of classes that are confused, the most often first
NEIGHBOURS = 20  # k of DINO's and MSN's k-NN evaluation: facebookresearch/dino eval_knn.py
_TEMPERATURE = 0.07  # of the votes there
_ROWS = 1024  # of cosines at once
_FEW = 30  # images below which a share says next to nothing: its interval is over 30 points wide
CONFUSED = 1000  # classes; of ten thousand the pairs take gigabytes


@dataclass(frozen=True, slots=True)
class ConfusedPair:
    """The number of images of the class ``true`` that were taken for the class ``predicted``."""

    true: str
    predicted: str
    images: int


@dataclass(frozen=True, slots=True)
class WrongImage:
    """A picture of the class ``true`` that was taken for another, or None: for no class at all."""

    picture: str
    true: str
    predicted: str | None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of images whose class is right; ``interval`` is Wilson's of ``top1`` at 95 %.

    ``per_class`` is the share of each class's images that is right, None of a class without one,
    and ``class_images`` how many it has. ``confusion`` [true][predicted] counts images, None above
    ``CONFUSED`` classes; ``confused`` are the pairs of classes that are confused most often, up to
    ``_PAIRS``. ``top5`` is None below six classes.
    """

    images: int
    top1: float
    top5: float | None
    interval: tuple[float, float]
    per_class: dict[str, float | None]
    class_images: dict[str, int]
    confusion: tuple[tuple[int, ...], ...] | None
    confused: tuple[ConfusedPair, ...]

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
    ``margins`` [n] is the highest score above the right class's, infinite for a guess of -1.
    """

    guesses: NDArray[np.intp]
    in_five: NDArray[np.bool_] | None
    margins: NDArray[np.float64]

    @classmethod
    def of(cls, scores: NDArray[np.floating], labels: NDArray[np.intp]) -> Self:
        """Read scores [n, classes] of images of the classes ``labels`` [n]."""
        finite, rows = np.isfinite(scores).all(axis=1), np.arange(len(scores))
        filled = np.where(finite[:, None], scores, 0.0)
        guesses = np.where(finite, filled.argmax(axis=1), -1)
        best, right = (filled[rows, at].astype(np.float64) for at in (guesses, labels))
        margins = np.where(finite, best - right, np.inf)
        if scores.shape[1] <= 5:
            return cls(guesses, None, margins)
        five = np.argpartition(-filled, 4, axis=1)[:, :5]
        return cls(guesses, (five == labels[:, None]).any(axis=1) & finite, margins)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Put the answers of several batches one behind the other."""
        fives = [part.in_five for part in parts if part.in_five is not None]
        guesses = np.concatenate([part.guesses for part in parts])
        margins = np.concatenate([part.margins for part in parts])
        return cls(guesses, np.concatenate(fives) if fives else None, margins)

    @property
    def finite(self) -> NDArray[np.bool_]:
        """True for each image whose scores [n] are all finite."""
        return np.asarray(self.guesses >= 0)

    def some(self, rows: NDArray[np.intp]) -> Self:
        """Give the answers of some images."""
        fives = None if self.in_five is None else self.in_five[rows]
        return replace(self, guesses=self.guesses[rows], in_five=fives, margins=self.margins[rows])

    def most_wrong(self, labels: NDArray[np.intp], count: int) -> NDArray[np.intp]:
        """List up to ``count`` images that are wrong, those of the largest margins first."""
        wrong = np.flatnonzero(self.guesses != labels)
        order: NDArray[np.intp] = wrong[np.argsort(-self.margins[wrong], kind="stable")][:count]
        return order

    def accuracy(self, labels: NDArray[np.intp], classes: tuple[str, ...]) -> Accuracy:
        """Count the answers that are right, of one image or more."""
        right, answered = self.guesses == labels, self.guesses >= 0
        counts = np.bincount(labels, minlength=len(classes))
        hits = np.bincount(labels[right], minlength=len(classes))
        answers = labels[answered], self.guesses[answered]
        return Accuracy(
            images=len(labels),
            top1=float(right.mean()),
            top5=float(self.in_five.mean()) if self.in_five is not None else None,
            interval=wilson(int(right.sum()), len(labels)),
            per_class={
                name: float(hit / count) if count else None
                for name, hit, count in zip(classes, hits, counts, strict=True)
            },
            class_images=dict(zip(classes, counts.tolist(), strict=True)),
            confusion=_matrix(*answers, len(classes)),
            confused=_confused(*answers, classes),
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


def _matrix(
    labels: NDArray[np.intp], guesses: NDArray[np.intp], classes: int
) -> tuple[tuple[int, ...], ...] | None:
    if classes > CONFUSED:
        return None
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (labels, guesses), 1)
    return tuple(tuple(row) for row in matrix.tolist())


def _confused(
    labels: NDArray[np.intp], guesses: NDArray[np.intp], classes: tuple[str, ...]
) -> tuple[ConfusedPair, ...]:
    wrong = labels != guesses
    pairs, counts = np.unique(
        labels[wrong] * len(classes) + guesses[wrong], return_counts=True
    )  # of n images at most n pairs, however many classes there are
    most = np.argsort(-counts, kind="stable")[:_PAIRS]
    return tuple(
        ConfusedPair(classes[pair // len(classes)], classes[pair % len(classes)], count)
        for pair, count in zip(pairs[most].tolist(), counts[most].tolist(), strict=True)
    )


def caution(images: int) -> tuple[str, ...]:
    """Give a note where a share of few images is about to be read as proof."""
    return () if images >= _FEW else (f"{images} images say little: see the interval",)


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


def mcnemar(lost: int, gained: int) -> float:
    """Give the probability that chance alone loses ``lost`` images or more.

    The exact test of two classifiers on the same images, one-sided: where both are right equally
    often, each image that only one of them has right is lost or gained with probability 1/2.
    Q. McNemar, Note on the Sampling Error of the Difference Between Correlated Proportions,
    Psychometrika 1947.

    Args:
        lost: images that are right in the reference alone.
        gained: images that are right in the candidate alone.
    """
    differ = lost + gained
    of_all = math.lgamma(differ + 1) - differ * math.log(2)
    return min(1.0, math.fsum(
        math.exp(of_all - math.lgamma(count + 1) - math.lgamma(differ - count + 1))
        for count in range(lost, differ + 1)
    ))  # fmt: skip


def loss_bound(lost: int, gained: int, images: int, confidence: float = CONFIDENCE) -> float:
    """Give the loss of accuracy that is not exceeded with ``confidence``, as a share.

    A. Agresti and Y. Min, Simple Improved Confidence Intervals for Comparing Matched Proportions,
    Statistics in Medicine 2005: Wald's interval after half an image is added to each of the four
    counts; here its upper end.
    """
    z = NormalDist().inv_cdf(confidence)
    loss = (lost - gained) / (images + 2)
    spread = math.sqrt((lost + gained + 1) / (images + 2) - loss * loss)
    return min(1.0, loss + z * spread / math.sqrt(images + 2))


def compared(
    reference: NDArray[np.bool_],
    candidate: NDArray[np.bool_],
    *,
    allowed: float = 0.0,
    not_finite: int = 0,
) -> AccuracyRecord:
    """Compare two sides on the same images.

    Args:
        reference: the images [n] whose class is right in the reference.
        candidate: the same of the candidate.
        allowed: the loss of accuracy that does not fail, as a share.
        not_finite: images for which the candidate has NaN or infinity: any fails.

    Returns:
        The record, without the names of what was compared.
    """
    if reference.shape != candidate.shape or not len(reference):
        raise ToleranceError(
            f"{len(reference)} images of the reference and {len(candidate)} of the candidate; "
            "expected the same, one or more"
        )
    images = len(reference)
    lost, gained = int((reference & ~candidate).sum()), int((candidate & ~reference).sum())
    p_value, bound = mcnemar(lost, gained), loss_bound(lost, gained, images)
    conclusion: Conclusion
    if p_value < SIGNIFICANCE:
        conclusion = "significant loss" if lost - gained > allowed * images else "allowed loss"
    else:
        conclusion = "too few images" if bound > max(TELLING, allowed) else "no significant loss"
    return AccuracyRecord(
        images=images,
        reference=_share(reference),
        candidate=_share(candidate),
        difference=(gained - lost) / images,
        lost=lost,
        gained=gained,
        p_value=p_value,
        loss_bound=bound,
        allowed=allowed,
        not_finite=not_finite,
        conclusion=conclusion,
        passed=conclusion != "significant loss" and not not_finite,
    )


def _share(right: NDArray[np.bool_]) -> ShareRecord:
    return ShareRecord(float(right.mean()), wilson(int(right.sum()), len(right)))


def failures(found: AccuracyRecord) -> list[str]:
    """Name what fails in a comparison of accuracy; nothing where it passed."""
    reasons = []
    if found.not_finite:
        reasons.append(f"NaN or infinity on {found.not_finite} of {found.images} labelled images")
    if found.conclusion == "significant loss":
        reasons.append(
            f"accuracy {found.candidate.top1:.1%} of {found.images} labelled images, the "
            f"reference's {found.reference.top1:.1%}: {found.lost} lost, {found.gained} gained, "
            f"McNemar's p = {found.p_value:.2g}, below {SIGNIFICANCE:g} it is a significant loss"
        )
    return reasons


def notes(found: AccuracyRecord) -> list[str]:
    """List what a comparison of accuracy leaves open."""
    if found.conclusion != "too few images":
        return []
    return [
        f"{found.images} labelled images are too few to tell: a loss of up to "
        f"{100 * found.loss_bound:.1f} points is not excluded"
    ]


def answers_of_neighbours(
    features: NDArray[np.floating],
    labels: NDArray[np.intp],
    classes: int,
    asked: tuple[NDArray[np.floating], NDArray[np.intp]] | None = None,
    k: int = NEIGHBOURS,
) -> Answers:
    """Answer with the votes of each image's neighbours; arguments as of ``votes``.

    Args:
        features: as there.
        labels: as there.
        classes: as there.
        asked: the images that are asked for, with their classes; None: each without itself.
        k: as there.
    """
    queries, wanted = (None, labels) if asked is None else asked
    parts = _votes(features, labels, classes, queries, k)
    return Answers.joined([Answers.of(scores, wanted[rows]) for rows, scores in parts])


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
    parts = _votes(features, labels, classes, queries, k)
    return np.concatenate([scores for _, scores in parts])


def _votes(
    features: NDArray[np.floating],
    labels: NDArray[np.intp],
    classes: int,
    queries: NDArray[np.floating] | None,
    k: int,
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float64]]]:
    """Give ``votes`` of a few images at a time, with their rows."""
    alone = queries is None
    given = _unit(features)
    asked = given if queries is None else _unit(queries)
    k = min(k, len(given) - alone)
    if k < 1:
        raise ToleranceError(f"{len(given)} image has no neighbour; give at least two")
    for start in range(0, len(asked), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(asked)))
        cosines = asked[rows] @ given.T
        cosines = np.where(np.isnan(cosines), -np.inf, cosines)
        if alone:
            cosines[rows - start, rows] = -np.inf
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(cosines, nearest, axis=1) / _TEMPERATURE)
        found = np.zeros((len(rows), classes))
        np.add.at(found, (rows[:, None] - start, labels[nearest]), weights)
        found[np.isnan(asked[rows]).any(axis=1)] = np.nan
        yield rows, found


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    wide: NDArray[np.float64] = vectors.astype(np.float64)
    norms: NDArray[np.float64] = np.linalg.norm(wide, axis=1, keepdims=True)
    has_direction = np.isfinite(norms) & (norms > 0)
    return np.where(has_direction, wide / np.where(has_direction, norms, 1), np.nan)
