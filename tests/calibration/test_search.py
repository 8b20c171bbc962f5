"""The blocks that stay are chosen by what each choice costs, measured on images."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from msn_export.calibration.plan import Plan
from msn_export.calibration.ranges import Observer, Watch, histograms
from msn_export.calibration.search import Exclusion, FirstRun, SensitivitySample, exclusions
from msn_export.errors import GraphError
from msn_export.graph.precision import floats_of, quantised_products
from msn_export.metrics.tolerances import Gate
from msn_export.progress import Silent
from tests.builders.calibrated_graphs import feeds, planned
from tests.builders.graphs import run
from tests.calibration.test_smoothing import with_outliers

IMAGES = feeds(6)["x"]
NAMES = [f"{i}.png" for i in range(len(IMAGES))]


def probe_of(plan: Plan, folder: Path) -> SensitivitySample:
    return SensitivitySample.of(plan.model, IMAGES, NAMES, folder)


def measured(plan: Plan, folder: Path, observer: Observer = Observer.MAX) -> Plan:
    watch = Watch(plan.model, list(plan.watched), folder)
    return plan.measured(histograms(watch, [(IMAGES, NAMES)]), observer)


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


def test_one_run_gives_outputs_histograms_and_maxima(tmp_path) -> None:
    plan = planned(tmp_path)
    first = FirstRun.of(plan, IMAGES, NAMES, tmp_path, maxima=True)
    np.testing.assert_allclose(
        first.probe.reference["norm_out"], run(plan.model, {"x": IMAGES}), atol=1e-5
    )
    alone = histograms(Watch(plan.model, list(plan.watched), tmp_path), [(IMAGES, NAMES)])
    assert first.histograms.keys() == alone.keys()
    for name, histogram in alone.items():
        assert first.histograms[name].counts.sum() == histogram.counts.sum()
        assert first.histograms[name].peak == pytest.approx(histogram.peak, rel=1e-5)
        assert first.maxima[name] == first.histograms[name].peak
    assert set(first.maxima) == set(floats_of(plan.unquantised()))
    assert not FirstRun.of(plan, IMAGES, NAMES, tmp_path, maxima=False).maxima


def test_everything_is_quantised_where_that_reaches_the_gate(tmp_path) -> None:
    plan = measured(planned(tmp_path), tmp_path)
    found, model = next(exclusions(plan, probe_of(plan, tmp_path), Gate(cosine_p1=0.9), Silent()))
    assert found == Exclusion((), {})
    assert len(quantised_products(model)) == 8


@pytest.mark.parametrize("sick", [0, 1])
def test_the_block_that_costs_most_is_kept_first(tmp_path, sick) -> None:
    plan = with_outliers(planned(tmp_path), f"blocks.{sick}.norm1_out", f"blocks.{sick}.norm2_out")
    plan = measured(plan, tmp_path)
    probe = probe_of(plan, tmp_path)
    assert probe.failures(plan.quantised(), Gate(cosine_p1=0.999))
    found = list(exclusions(plan, probe, Gate(cosine_p1=0.999), Silent()))
    assert [choice.kept for choice, _ in found] == [(sick,)]
    choice, model = found[0]
    assert choice.drift[sick] > 3 * choice.drift[1 - sick]
    names = quantised_products(model)
    assert {name.split(".")[1] for name in names} == {str(1 - sick)}


def test_no_choice_is_given_where_none_reaches_the_gate(tmp_path) -> None:
    plan = measured(planned(tmp_path), tmp_path)
    assert list(exclusions(plan, probe_of(plan, tmp_path), Gate(cosine_p1=1.0), Silent())) == []


def test_a_later_choice_is_measured_when_the_first_fails_elsewhere(tmp_path) -> None:
    plan = measured(planned(tmp_path), tmp_path)
    found = list(exclusions(plan, probe_of(plan, tmp_path), Gate(cosine_p1=0.9), Silent()))
    assert [len(choice.kept) for choice, _ in found] == [0, 1]
    assert set(found[1][0].drift) == {0, 1}
