"""Accuracy with few labels: scikit-learn's classifiers on features of pictures drawn by a seed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from msn_export.labelled import Labelled
from msn_export.runtime import open_runner

C = 400.0  # facebookresearch/msn README: logistic regression with a penalty of 0.0025
DRAWS, SEED = 10, 0
_BATCH = 64


@dataclass(frozen=True)
class Features:
    """Labelled pictures and their features [n, d]."""

    labelled: Labelled
    values: NDArray[np.float64]


def of_pixels(labelled: Labelled) -> Features:
    """Take the pictures' own pixels, from 0 to 1."""
    pixels = [np.asarray(Image.open(path)).ravel() for path in labelled.paths]
    return Features(labelled, np.stack(pixels) / 255)


def of_graph(labelled: Labelled, graph: Path, output: str) -> Features:
    """Run the pictures through a graph in onnxruntime."""
    with open_runner(graph) as runner:
        batches = [
            runner(runner.preprocess(labelled.paths[at : at + _BATCH]))[output]
            for at in range(0, len(labelled), _BATCH)
        ]
    return Features(labelled, np.concatenate(batches).astype(np.float64))


def accuracies(train: Features, test: Features, shots: int | None) -> list[float]:
    """Fit a classifier on each draw, and give the share of ``test`` that it gets right.

    Args:
        train: what is drawn from.
        test: features of the same width; another graph may have made them.
        shots: pictures of each class; None fits one classifier on all.
    """
    labels, found = train.labelled.labels, []
    for number in range(1 if shots is None else DRAWS):
        rows = slice(None) if shots is None else train.labelled.drawn(shots, SEED, number)
        classifier = LogisticRegression(C=C, fit_intercept=False, tol=1e-8, max_iter=100_000)
        with threadpool_limits(1):  # threads wait for each other in so small a problem
            classifier.fit(train.values[rows], labels[rows])
        found.append(float(classifier.score(test.values, test.labelled.labels)))
    return found
