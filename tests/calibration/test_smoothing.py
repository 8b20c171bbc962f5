"""A smoothing is chosen by what 8 bits cost each product, and taken only for a tenth of that."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msn_export.calibration import smoothing
from msn_export.calibration.plan import Plan
from msn_export.calibration.qdq import Role, scales
from msn_export.calibration.ranges import Observer, SmoothingRecord, Watch
from msn_export.calibration.smoothing import STRENGTHS, ActivationSample, replay, smooth
from msn_export.calibration.smoothquant import find_smoothing_sites, fold
from msn_export.errors import GraphError
from msn_export.spec import Dtype
from tests.builders.calibrated_graphs import feeds, planned
from tests.builders.graphs import run

IMAGES = feeds(6)["x"]
EVERY_NORM = tuple(f"blocks.{block}.norm{which}_out" for block in (0, 1) for which in (1, 2))


def with_outliers(plan: Plan, *names: str) -> Plan:
    """Make three channels of a site 64 times as large, and what reads them as much smaller."""
    model = plan.model.clone()
    for site in find_smoothing_sites(model, plan.projections):
        if site.name in names:
            scale = np.ones(len(site.columns), np.float32)
            scale[[3, 11, 20]] = 1 / 64
            fold(model, site, scale)
    return replace(plan, model=model)


def sampled(plan: Plan, folder: Path) -> ActivationSample:
    activations = ActivationSample.of(plan)
    watch = Watch(plan.model, activations.names, folder)
    for part in (IMAGES[:4], IMAGES[4:]):
        activations.add(watch(part))
    return activations


def test_a_sample_has_the_maxima_of_all_rows_and_some_of_the_rows(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(smoothing, "ROWS", 3)
    plan = planned(tmp_path)
    activations = sampled(plan, tmp_path)
    whole = Watch(plan.model, activations.names, tmp_path)(IMAGES)
    for name in activations.names:
        np.testing.assert_allclose(
            activations.maxima[name], np.abs(whole[name]).max(axis=(0, 1)), rtol=1e-5
        )
        rows = np.concatenate(activations.rows[name])  # the first, middle and last of five tokens
        wanted = whole[name][:, [0, 2, 4]].reshape(len(rows), -1)
        np.testing.assert_allclose(rows, wanted, rtol=1e-4, atol=1e-5)


def test_the_error_is_that_of_all_products_each_quantised_by_itself(tmp_path) -> None:
    plan = planned(tmp_path)
    activations = sampled(plan, tmp_path)
    errors = smooth(plan, None, activations, Observer.MAX)[1].errors
    form, squares = plan.scheme.form, []
    for product in (one for one in plan.projections if one.role is not Role.PATCH):
        x = np.concatenate(activations.rows[product.x]).astype(np.float64)
        weight = plan.model.graph.initializers[product.weight].const_value.numpy()
        weight = np.moveaxis(weight, product.axis, -1)
        carried = form.carry(x, scales(activations.maxima[product.x].max(), form, Dtype.FP16))
        held = form.carry(weight, scales(np.abs(weight).max(axis=0), form, Dtype.FP16))
        exact = x @ weight
        squares.append(np.square(carried @ held - exact).sum() / np.square(exact).sum())
    assert errors is not None
    assert errors["off"] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-3)


@pytest.mark.parametrize("observer", [Observer.MAX, Observer.MSE])
def test_auto_smooths_planted_outliers(tmp_path, observer) -> None:
    plan = with_outliers(planned(tmp_path), *EVERY_NORM)
    smoothed, record = smooth(plan, None, sampled(plan, tmp_path), observer)
    assert record.strength in STRENGTHS
    assert record.errors is not None
    assert set(record.errors) == {"off", "0.25", "0.5", "0.75"}
    assert record.errors[f"{record.strength:g}"] == min(record.errors.values())
    assert record.errors["off"] > 4 * min(record.errors.values())
    # what was foreseen for the graph is what the smoothed graph has, measured anew
    again = smooth(smoothed, None, sampled(smoothed, tmp_path), observer)[1].errors
    assert again is not None
    assert again["off"] == pytest.approx(min(record.errors.values()), rel=0.02)


def test_outliers_cost_fp8_nothing_and_nothing_is_smoothed(tmp_path) -> None:
    plan = with_outliers(planned(tmp_path, Dtype.FP8), *EVERY_NORM)
    chosen, record = smooth(plan, None, sampled(plan, tmp_path), Observer.MSE)
    assert chosen is plan
    assert record.strength is None


@pytest.mark.parametrize(
    ("errors", "strength"),
    [
        ((0.1, 0.1, 0.1, 0.1), None),
        ((0.1, 0.095, 0.091, 0.099), None),
        ((0.1, 0.095, 0.089, 0.099), 0.5),
        ((np.inf, 0.1, 0.2, 0.3), 0.25),
        ((np.inf,) * 4, None),
        ((np.nan,) * 4, None),
    ],
)
def test_auto_leaves_a_graph_alone_unless_a_strength_leaves_a_tenth_less_error(
    tmp_path, monkeypatch, errors, strength
) -> None:
    plan = planned(tmp_path)
    activations = sampled(plan, tmp_path)
    found = dict(zip(("off", "0.25", "0.5", "0.75"), errors, strict=True))
    monkeypatch.setattr(smoothing, "_errors", lambda *_: found)
    chosen, record = smooth(plan, None, activations, Observer.MAX)
    assert record.strength == strength
    assert (chosen is plan) == (strength is None)
    assert (record.exponents is None) == (strength is None)
    assert record.errors is found


def test_a_strength_is_taken_as_it_is_said_and_tried_on_nothing(tmp_path) -> None:
    plan = with_outliers(planned(tmp_path), *EVERY_NORM)
    smoothed, record = smooth(plan, 0.5, sampled(plan, tmp_path), Observer.MAX)
    assert (record.strength, record.errors) == (0.5, None)
    np.testing.assert_array_equal(
        run(smoothed.model, {"x": IMAGES}), run(plan.model, {"x": IMAGES})
    )


def test_a_record_gives_the_same_graph_again(tmp_path) -> None:
    plan = with_outliers(planned(tmp_path), *EVERY_NORM)
    smoothed, record = smooth(plan, 0.75, sampled(plan, tmp_path), Observer.MAX)
    again = replay(plan, record)
    for name, value in smoothed.model.graph.initializers.items():
        other = again.model.graph.initializers[name].const_value
        assert value.const_value is not None
        assert other is not None
        assert value.const_value.tobytes() == other.tobytes()
    assert replay(plan, SmoothingRecord()) is plan


def test_a_record_of_another_graph_is_refused(tmp_path) -> None:
    record = SmoothingRecord(0.5, {"elsewhere": (0,)})
    with pytest.raises(GraphError, match="'elsewhere' cannot be smoothed here; leave --ranges out"):
        replay(planned(tmp_path), record)
