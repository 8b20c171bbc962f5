"""The classifier is the optimum of msn's objective, and what judges it has not seen the image."""

import json
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from msn_export import logistic_regression
from msn_export.errors import MissingPackageError, ToleranceError
from msn_export.logistic_regression import (
    GRADIENT,
    Training,
    choose,
    cross_validate,
    gradient_at,
    solve,
    solver_bytes,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Let the peers compute on one thread, as small problems do: two cores are shared here."""
    with threadpool_limits(1):
        yield


def digits(count: int, classes: int = 10) -> Training:
    """Give pixels of handwritten digits, centred and of norm 1."""
    held = load_digits()
    chosen = np.flatnonzero(held.target < classes)[:count]
    pixels = held.data[chosen].astype(np.float64)
    pixels -= pixels.mean(axis=1, keepdims=True)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)
    return Training(pixels, held.target[chosen].astype(np.intp), classes)


def objective(training: Training, weights: np.ndarray, penalty: float) -> float:
    """Compute ``mean loss + penalty / (2 n) * ||W||^2`` of msn's logistic_eval.py."""
    scores = training.features @ weights.T
    high = scores.max(axis=1)
    own = scores[np.arange(len(scores)), training.labels]
    losses = high + np.log(np.exp(scores - high[:, None]).sum(axis=1)) - own
    return float(losses.mean() + penalty / (2 * training.count) * (weights**2).sum())


@pytest.mark.parametrize("penalty", [0.00025, 0.0025])
def test_the_weights_minimise_the_objective_of_msn(penalty) -> None:
    training = digits(200)
    found = solve(training, 1 / penalty)
    least = objective(training, found.weights, penalty)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 1e-1):
        step = size * rng.standard_normal(found.weights.shape)
        above = objective(training, found.weights + step, penalty) - least
        assert above > 0
        # where the gradient is zero the objective rises by the square of the step
        back = objective(training, found.weights - step, penalty) - least
        assert above == pytest.approx(back, rel=max(0.05, 2 * size))


@pytest.mark.parametrize("C", [400.0, 4000.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_newtons_method_finds_the_same(C, classes) -> None:  # noqa: N803
    training = digits(300, classes)
    peer = LogisticRegression(
        C=C, fit_intercept=False, solver="newton-cholesky", tol=1e-14, max_iter=1000
    ).fit(training.features, training.labels)
    wanted = peer.decision_function(training.features)
    logits = training.features @ solve(training, C).weights.T
    found = logits[:, 1] - logits[:, 0] if classes == 2 else logits
    assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 5e-6  # measured: 2.2e-6


def test_two_classes_have_two_rows_that_are_opposite() -> None:
    found = solve(digits(100, 2), 400.0)
    assert found.weights.shape == (2, 64)
    np.testing.assert_array_equal(found.weights[0], -found.weights[1])
    np.testing.assert_array_equal(found.weights[1] - found.weights[0], found.estimator.coef_[0])


def test_a_search_that_ends_early_is_no_optimum(monkeypatch) -> None:
    monkeypatch.setattr(logistic_regression, "TOLERANCE", 1e-4)  # scikit-learn's default
    with pytest.raises(ToleranceError) as error:
        solve(digits(300), 400.0)
    assert str(error.value).startswith(
        "logistic regression on 300 images did not reach its optimum at C = 400: after "
    )
    assert str(error.value).endswith("1e-02 allowed; choose a smaller --C")


def test_steps_that_run_out_are_no_optimum(monkeypatch) -> None:
    monkeypatch.setattr(logistic_regression, "_STEPS", 5)
    with pytest.raises(ToleranceError, match="after 5 steps the gradient is"):
        solve(digits(300), 400.0)


@pytest.mark.parametrize("classes", [2, 10])
def test_the_gradient_is_the_objectives(classes) -> None:
    training = digits(50, classes)
    weights = np.random.default_rng(0).standard_normal((classes, 64))
    weights -= weights.mean(axis=0)  # of two classes the rows are opposite
    scale = 2 if classes == 2 else 1  # the binary problem penalises half the square of w
    penalty = 0.01
    slopes = np.zeros_like(weights)
    for place in np.ndindex(2, 64):
        step = np.zeros_like(weights)
        step[place] = 1e-5
        up, down = (objective(training, weights + sign * step, scale * penalty) for sign in (1, -1))
        slopes[place] = (up - down) / 2e-5
    penalties = scale * penalty * np.abs(weights).max() / training.count
    largest = np.abs(slopes[:2]).max() / penalties
    assert gradient_at(training, weights, 1 / penalty) >= largest * (1 - 1e-5)
    if classes == 2:
        assert gradient_at(training, weights, 1 / penalty) == pytest.approx(largest, rel=1e-5)
    assert gradient_at(training, solve(training, 400.0).weights, 400.0) < GRADIENT


def test_images_beside_the_part_weigh_nothing() -> None:
    training = digits(200)
    part = np.arange(200) % 3 > 0
    spoiled = training.features.copy()
    spoiled[~part] = 1e3
    some = solve(Training(spoiled, training.labels, 10, part), 400.0)
    alone = solve(Training(training.features[part], training.labels[part], 10), 400.0)
    np.testing.assert_allclose(some.weights, alone.weights, atol=1e-4 * np.abs(alone.weights).max())


def test_folds_hold_every_image_out_once_and_keep_every_class() -> None:
    training = digits(100)
    folds = list(training.folds(seed=0))
    assert len(folds) == 5
    assert sorted(np.concatenate([held for _, held in folds])) == list(range(100))
    for rest, held in folds:
        assert not rest.part[held].any()
        assert rest.count + len(held) == 100
        assert rest.smallest >= 1
    again = [held.tolist() for _, held in training.folds(seed=0)]
    assert again == [held.tolist() for _, held in folds]
    assert again != [held.tolist() for _, held in training.folds(seed=1)]


def test_the_smallest_class_limits_the_folds() -> None:
    labels = np.array([0, 0, 1, 1, 1, 1, 1])
    training = Training(np.eye(7), labels, 2)
    assert len(list(training.folds(seed=0))) == 2


@pytest.mark.parametrize("C", [400.0, None])
def test_cross_validation_judges_by_what_has_not_seen_the_image(C) -> None:  # noqa: N803
    """Features that say which image it is, and nothing of its class, are learnt by heart."""
    training = Training(np.eye(60), np.arange(60, dtype=np.intp) % 6, 6)
    by_heart = solve(training, 400.0).answers(training.features, training.labels)
    assert (by_heart.guesses == training.labels).all()
    found = cross_validate(training, C, seed=0)
    assert (found.guesses == training.labels).mean() < 0.5
    assert found.in_five is not None


def test_cross_validation_of_digits_is_near_that_of_scikit_learn() -> None:
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    training = digits(300)
    found = cross_validate(training, 400.0, seed=3)
    peer = LogisticRegression(C=400.0, fit_intercept=False, tol=1e-12, max_iter=10_000)
    folds = StratifiedKFold(5, shuffle=True, random_state=3)
    wanted = cross_val_predict(peer, training.features, training.labels, cv=folds)
    assert (found.guesses == wanted).mean() > 0.99
    assert found.in_five.sum() > (found.guesses == training.labels).sum()


def test_a_strength_is_chosen_inside_the_training_images() -> None:
    training = digits(120)
    part = np.arange(120) < 80
    spoiled = training.features.copy()
    spoiled[~part] = np.random.default_rng(0).standard_normal((40, 64))
    found = choose(Training(spoiled, training.labels, 10, part), seed=0)
    alone = choose(Training(training.features[:80], training.labels[:80], 10), seed=0)
    assert found == alone
    assert found.shares[found.C] == max(found.shares.values())
    assert all(found.shares[C] < found.shares[found.C] for C in found.shares if C < found.C)
    assert all(low < high for low, high in pairwise(found.shares))


def test_a_missing_scikit_learn_is_one_line(monkeypatch) -> None:
    training = digits(20)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'msn-export\[fit\]'"):
        solve(training, 400.0)


MEMORY = """
import json, sys
import numpy as np
from msn_export.host import peak_rss, reset_peak, rss
from msn_export.logistic_regression import Training, solve

def training(images, width, classes):
    rows = np.random.default_rng(0).standard_normal((images, width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return Training(rows, np.arange(images) % classes, classes)

solve(training(40, 8, 4), 0.4)  # loads what is loaded once
large = training(*map(int, sys.argv[1:]))
before = rss()
reset_peak()
steps = solve(large, 40.0).steps
print(json.dumps([peak_rss() - before, steps]))
"""


@pytest.mark.slow
def test_the_memory_of_a_thousand_classes_is_what_the_rule_says() -> None:
    shape = (5000, 384, 1000)
    command = [sys.executable, "-c", MEMORY, *map(str, shape)]
    grown, steps = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert steps > 10  # so many lbfgs keeps
    assert 0.9 * solver_bytes(*shape) < grown < solver_bytes(*shape) + 48 * 2**20
