"""Smoothing and the blocks that stay are chosen by what each choice costs, measured on images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from msn_export.calibration.plan import Plan
from msn_export.calibration.ranges import Observer, SmoothingRecord, Watch, histograms
from msn_export.calibration.search import (
    STRENGTHS,
    Exclusion,
    SensitivitySample,
    exclusions,
    replay,
    smooth,
)
from msn_export.calibration.smoothquant import find_smoothing_sites, fold
from msn_export.errors import GraphError
from msn_export.graph.precision import quantised_products
from msn_export.metrics.tolerances import Gate
from msn_export.progress import Silent
from tests.builders.calibrated_graphs import feeds, planned
from tests.builders.graphs import run

IMAGES = feeds(6)["x"]
NAMES = [f"{i}.png" for i in range(len(IMAGES))]


def probe_of(plan: Plan, folder: Path) -> SensitivitySample:
    return SensitivitySample.of(plan.model, IMAGES, NAMES, folder)


def measured(plan: Plan, folder: Path, observer: Observer = Observer.MAX) -> Plan:
    watch = Watch(plan.model, list(plan.watched), folder)
    return plan.measured(histograms(watch, [(IMAGES, NAMES)]), observer)


def with_outliers(plan: Plan, *names: str) -> Plan:
    """Make three channels of a seam 64 times as large, and what reads them as much smaller."""
    model = plan.model.clone()
    for site in find_smoothing_sites(model, plan.projections):
        if site.name in names:
            scale = np.ones(len(site.columns), np.float32)
            scale[[3, 11, 20]] = 1 / 64
            fold(model, site, scale)
    return replace(plan, model=model)


EVERY_NORM = tuple(f"blocks.{block}.norm{which}_out" for block in (0, 1) for which in (1, 2))


def test_error_is_the_relative_distance_of_the_worst_output(tmp_path) -> None:
    plan = measured(planned(tmp_path), tmp_path)
    probe = probe_of(plan, tmp_path)
    assert probe.error(plan.model) == 0.0
    candidate = plan.quantised()
    want, got = (run(model, {"x": IMAGES}) for model in (plan.model, candidate))
    wanted = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert probe.error(candidate) == pytest.approx(wanted, rel=0.02)


def test_what_is_not_a_number_is_infinitely_wrong_and_passes_nothing(tmp_path) -> None:
    plan = planned(tmp_path)
    probe = probe_of(plan, tmp_path)
    broken = plan.model.clone()
    weight = broken.graph.initializers["norm.bias"]
    weight.const_value = ir.tensor(np.full(32, np.nan, np.float32), name=weight.name)
    assert probe.error(broken) == np.inf
    assert probe.failures(broken, Gate(cosine_p1=-1.0))
    assert not probe.failures(plan.model, Gate(cosine_p1=1.0 - 1e-6))


def test_a_reference_that_is_not_finite_is_refused_with_its_image(tmp_path) -> None:
    plan = planned(tmp_path)
    bad = IMAGES.copy()
    bad[2] = np.nan
    message = r"tensor 'patch.Conv_out' is NaN on image 2\.png; nothing can"
    with pytest.raises(GraphError, match=message):
        SensitivitySample.of(plan.model, bad, NAMES, tmp_path)


def test_auto_smooths_planted_outliers_and_lowers_the_error(tmp_path) -> None:
    plan = with_outliers(planned(tmp_path), *EVERY_NORM)
    probe = probe_of(plan, tmp_path)
    smoothed, record = smooth(plan, None, probe, Observer.MAX)
    assert record.strength in STRENGTHS
    assert record.errors is not None
    assert set(record.errors) == {"off", "0.25", "0.5", "0.75"}
    assert record.errors[f"{record.strength:g}"] == min(record.errors.values())
    assert record.errors["off"] > 4 * min(record.errors.values())
    after = probe.error(measured(smoothed, tmp_path).quantised())
    assert after == pytest.approx(min(record.errors.values()), rel=0.05)


@pytest.mark.parametrize(
    ("errors", "strength"),
    [
        ((0.1, 0.1, 0.1, 0.1), None),
        ((0.1, 0.095, 0.091, 0.099), None),  # as images differ; docs/quantization.md
        ((0.1, 0.095, 0.089, 0.099), 0.5),
        ((np.inf, 0.1, 0.2, 0.3), 0.25),
        ((np.inf,) * 4, None),
    ],
)
def test_auto_leaves_a_graph_alone_unless_a_strength_leaves_a_tenth_less_error(
    tmp_path, monkeypatch, errors, strength
) -> None:
    plan = planned(tmp_path)
    probe = probe_of(plan, tmp_path)
    told = iter(errors)
    monkeypatch.setattr(SensitivitySample, "error", lambda self, model: next(told))
    chosen, record = smooth(plan, None, probe, Observer.MAX)
    assert record.strength == strength
    assert (chosen is plan) == (strength is None)
    assert (record.exponents is None) == (strength is None)
    assert record.errors == dict(zip(("off", "0.25", "0.5", "0.75"), errors, strict=True))


def test_a_strength_is_taken_as_it_is_said_and_tried_on_nothing(tmp_path) -> None:
    plan = with_outliers(planned(tmp_path), *EVERY_NORM)
    smoothed, record = smooth(plan, 0.5, probe_of(plan, tmp_path), Observer.MAX)
    assert (record.strength, record.errors) == (0.5, None)
    np.testing.assert_array_equal(
        run(smoothed.model, {"x": IMAGES}), run(plan.model, {"x": IMAGES})
    )


def test_a_record_gives_the_same_graph_again(tmp_path) -> None:
    plan = with_outliers(planned(tmp_path), *EVERY_NORM)
    smoothed, record = smooth(plan, 0.75, probe_of(plan, tmp_path), Observer.MAX)
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


def test_everything_is_quantised_where_that_reaches_the_gate(tmp_path) -> None:
    plan = measured(planned(tmp_path), tmp_path)
    found = next(exclusions(plan, probe_of(plan, tmp_path), Gate(cosine_p1=0.9), Silent()))
    assert found == Exclusion((), {})


@pytest.mark.parametrize("sick", [0, 1])
def test_the_block_that_costs_most_is_kept_first(tmp_path, sick) -> None:
    plan = with_outliers(planned(tmp_path), f"blocks.{sick}.norm1_out", f"blocks.{sick}.norm2_out")
    plan = measured(plan, tmp_path)
    probe = probe_of(plan, tmp_path)
    assert probe.failures(plan.quantised(), Gate(cosine_p1=0.999))
    found = list(exclusions(plan, probe, Gate(cosine_p1=0.999), Silent()))
    assert [choice.kept for choice in found] == [(sick,)]
    drift = found[0].drift
    assert drift[sick] > 3 * drift[1 - sick]
    names = quantised_products(plan.quantised(found[0].kept))
    assert {name.split(".")[1] for name in names} == {str(1 - sick)}


def test_no_choice_is_given_where_none_reaches_the_gate(tmp_path) -> None:
    plan = measured(planned(tmp_path), tmp_path)
    assert list(exclusions(plan, probe_of(plan, tmp_path), Gate(cosine_p1=1.0), Silent())) == []


def test_a_later_choice_is_measured_when_the_first_fails_elsewhere(tmp_path) -> None:
    plan = measured(planned(tmp_path), tmp_path)
    found = list(exclusions(plan, probe_of(plan, tmp_path), Gate(cosine_p1=0.9), Silent()))
    assert [len(choice.kept) for choice in found] == [0, 1]
    assert set(found[1].drift) == {0, 1}
