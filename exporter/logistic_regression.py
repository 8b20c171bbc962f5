"""Logistic regression on frozen features: solved by scikit-learn, its optimum verified here.

The classifier of facebookresearch/msn logistic_eval.py: no intercept, and the objective
``mean loss + lambda / 2 * ||W||^2`` with ``lambda = L / n``. scikit-learn divides its objective by
C, so that L is 1 / C whatever n is: 0.00025 in the code is C = 4000, 0.0025 in its README's example
is C = 400. Two classes are its binary problem, as there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.errors import MissingPackageError, ToleranceError
from msn_export.metrics.accuracy import Answers
from msn_export.progress import SILENT

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from msn_export.progress import Progress

# n images, d numbers a feature

# Of the gradient, where lbfgs may stop. On 20 to 1,797 digits and C of 400 to 4000 the decision
# function is 2e-6 from Newton's at 1e-12, 1e-4 at 1e-8; it takes 1.4 times the steps. Float64
# ends it before, by the objective.
TOLERANCE = 1e-12
# Largest gradient that passes for an optimum, relative to that of the penalty alone. There it was
# 3e-4 at most; where scikit-learn's default of 1e-4 ends the search it is 3.
GRADIENT = 1e-2
_STEPS = 100_000
GRID = (0.4, 4.0, 40.0, 400.0, 4000.0, 40000.0)  # of C, around both of facebookresearch/msn
FOLDS = 5
_NUMBERS = 2**20  # of features, or of scores, that are copied at once
# Products of images, numbers and classes below which threads cost more than they save: where other
# processes had the second core too, 1.5e8 took 0.11 s a step on one thread and 0.9 s on two
_THREADED = 10**9


@dataclass(frozen=True, slots=True)
class Training:
    """Features [n, d] float64 and the classes [n] of the images, 0 to ``classes`` - 1.

    ``part`` [n] says which of them are trained on; None is all. The others cost no copy: their loss
    weighs nothing.
    """

    features: NDArray[np.float64]
    labels: NDArray[np.intp]
    classes: int
    part: NDArray[np.bool_] | None = None

    @property
    def count(self) -> int:
        """The images that are trained on."""
        return len(self.labels) if self.part is None else int(np.count_nonzero(self.part))

    @property
    def smallest(self) -> int:
        """The images of the class that has the fewest."""
        chosen = self.labels if self.part is None else self.labels[self.part]
        return int(np.bincount(chosen, minlength=self.classes).min())

    def folds(self, seed: int) -> Iterator[tuple[Training, NDArray[np.intp]]]:
        """Divide it into stratified folds: for each the rest, and the rows that are held out.

        There are five, or as many as the smallest class has images.
        """
        from sklearn.model_selection import StratifiedKFold

        rows = np.arange(len(self.labels)) if self.part is None else np.flatnonzero(self.part)
        folds = StratifiedKFold(min(FOLDS, self.smallest), shuffle=True, random_state=seed)
        for kept, held in folds.split(rows, self.labels[rows]):
            part = np.zeros(len(self.labels), np.bool_)
            part[rows[kept]] = True
            yield Training(self.features, self.labels, self.classes, part), rows[held]


@dataclass(frozen=True, slots=True)
class Solution:
    """A classifier at its optimum.

    ``weights`` [classes, d] are the rows whose products with a feature are the logits; of the
    binary problem's one row w they are -w / 2 and w / 2. ``gradient`` is the objective's there
    (``gradient_at``), ``steps`` how many lbfgs took. ``estimator`` is scikit-learn's
    LogisticRegression.
    """

    weights: NDArray[np.float64]
    C: float
    gradient: float
    steps: int
    estimator: Any

    def answers(
        self,
        features: NDArray[np.floating],
        labels: NDArray[np.intp],
        rows: NDArray[np.intp] | None = None,
    ) -> Answers:
        """Classify features [n, d] of images of the classes ``labels`` [n], or some ``rows``."""
        chosen = np.arange(len(labels)) if rows is None else rows
        parts = (chosen[chunk] for chunk in _chunks(len(chosen), self.weights))
        return Answers.joined(
            [Answers.of(features[part] @ self.weights.T, labels[part]) for part in parts]
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """A strength that cross-validation chose: the share that was right, by C."""

    C: float
    shares: dict[float, float]


def solve(training: Training, C: float, start: Solution | None = None) -> Solution:  # noqa: N803
    """Fit a classifier, and verify that it is the optimum.

    Args:
        training: the images.
        C: the inverse strength of the penalty, as in scikit-learn.
        start: where the search begins; nothing of the optimum depends on it.

    Raises:
        ToleranceError: the search ended elsewhere.
    """
    require_scikit_learn()
    from sklearn.linear_model import LogisticRegression

    estimator = LogisticRegression(
        C=C, fit_intercept=False, tol=TOLERANCE, max_iter=_STEPS, warm_start=start is not None
    )
    if start is not None:
        estimator.coef_ = start.estimator.coef_
    weight = None if training.part is None else training.part.astype(np.float64)
    with _threads(training), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the search's end, which the gradient judges
        estimator.fit(training.features, training.labels, sample_weight=weight)
        rows = estimator.coef_
        weights = rows if training.classes > 2 else np.concatenate([-rows / 2, rows / 2])
        gradient = gradient_at(training, weights, C)
    steps = int(estimator.n_iter_[0])
    if not gradient <= GRADIENT:
        raise ToleranceError(
            f"logistic regression on {training.count} images did not reach its optimum at C = "
            f"{C:g}: after {steps} steps the gradient is {gradient:.1e} of its penalty's, "
            f"{GRADIENT:.0e} allowed; choose a smaller --C"
        )
    return Solution(weights, C, gradient, steps, estimator)


def solver_bytes(images: int, width: int, classes: int) -> int:
    """Give the memory that ``solve`` takes beside the features, in bytes.

    Scores and slopes of all images, and 40 times the weights: lbfgs keeps ten steps and ten
    gradients, scikit-learn and SciPy copies. 208 MiB were measured on 5,000 images of 384 numbers
    in 1,000 classes, 193 by this rule; 15 MiB are constant.
    """
    return 8 * classes * (2 * images + 40 * width)


def gradient_at(
    training: Training,
    weights: NDArray[np.float64],
    C: float,  # noqa: N803
) -> float:
    """Give the largest component of the objective's gradient relative to that of its penalty.

    The two parts of ``sum((softmax(x W) - y) x) / n + W / (C n)`` cancel at the optimum. The binary
    problem's penalty is on the difference of its two rows, so it counts twice.
    """
    total = np.zeros_like(weights)
    for chunk in _chunks(len(training.labels), weights):
        rows = chunk if training.part is None else chunk[training.part[chunk]]
        features = training.features[rows]
        scores = features @ weights.T
        scores -= scores.max(axis=1, keepdims=True)
        shares = np.exp(scores, out=scores)
        shares /= shares.sum(axis=1, keepdims=True)
        shares[np.arange(len(rows)), training.labels[rows]] -= 1
        total += shares.T @ features
    penalty = weights / C * (2 if training.classes == 2 else 1)
    return float(np.abs(total + penalty).max() / (np.abs(penalty).max() or 1))


def choose(training: Training, seed: int) -> Choice:
    """Choose C on the training images alone, by stratified cross-validation.

    The share that is right decides; of equal ones the smallest C. Each class has two images or
    more.
    """
    right = dict.fromkeys(GRID, 0)
    for rest, held in training.folds(seed):
        solution = None
        for C in GRID:  # noqa: N806
            solution = solve(rest, C, solution)
            guesses = solution.answers(training.features, training.labels, held).guesses
            right[C] += int(np.count_nonzero(guesses == training.labels[held]))
    shares = {C: count / training.count for C, count in right.items()}
    return Choice(max(shares, key=lambda C: (shares[C], -C)), shares)  # noqa: N803


def cross_validate(
    training: Training,
    C: float | None,  # noqa: N803
    seed: int,
    progress: Progress = SILENT,
) -> Answers:
    """Classify each image by a classifier that was fitted without it, and with the same settings.

    Args:
        training: the images, two or more of each class; three where ``C`` is None.
        C: as of ``solve``; None chooses it anew within the rest of each fold.
        seed: of the folds.
        progress: is told how many folds are done.
    """
    guesses = np.full(len(training.labels), -1, np.intp)
    fives = np.zeros(len(training.labels), np.bool_)
    margins = np.zeros(len(training.labels))
    count = min(FOLDS, training.smallest)
    for number, (rest, held) in enumerate(training.folds(seed), 1):
        chosen = C if C is not None else choose(rest, seed).C
        found = solve(rest, chosen).answers(training.features, training.labels, held)
        guesses[held], margins[held] = found.guesses, found.margins
        if found.in_five is not None:
            fives[held] = found.in_five
        progress.advance(number, count, f"fold {number} of {count}")
    return Answers(guesses, fives if training.classes > 5 else None, margins)


def require_scikit_learn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            f"a classifier is fitted by scikit-learn ({error}); pip install 'msn-export[fit]'"
        ) from error


def _chunks(count: int, weights: NDArray[np.float64]) -> Iterator[NDArray[np.intp]]:
    """Divide rows into parts whose features and scores take little memory."""
    rows = max(1, _NUMBERS // max(weights.shape))
    for start in range(0, count, rows):
        yield np.arange(start, min(start + rows, count))


@contextmanager
def _threads(training: Training) -> Iterator[None]:
    """Leave a small problem to one thread."""
    from threadpoolctl import threadpool_limits

    work = training.features.size * training.classes
    with threadpool_limits(None if work > _THREADED else 1):
        yield
