"""A plan says what is quantised; any mix of blocks comes of it, and the fp32 graph stays."""

import numpy as np
import pytest

from msn_export.calibration.plan import Plan
from msn_export.calibration.qdq import Role
from msn_export.calibration.ranges import Histogram, Observer, threshold
from msn_export.errors import GraphError
from msn_export.graph.precision import quantised_products
from msn_export.spec import Dtype
from tests.builders.calibrated_graphs import feeds, planned, scheme, vit
from tests.builders.graphs import op_types, run


def counted(*values: float) -> Histogram:
    histogram = Histogram()
    histogram.add(np.asarray(values, np.float32))
    return histogram


def measured(plan: Plan, observer: Observer = Observer.MAX) -> Plan:
    return plan.measured(dict.fromkeys(plan.watched, counted(3.0)), observer)


def test_the_inputs_of_the_four_projections_are_watched(tmp_path) -> None:
    plan = planned(tmp_path)
    assert plan.depth == 2
    assert set(plan.watched.values()) == {""}
    assert list(plan.watched)[:4] == [
        "blocks.0.norm1_out", "blocks.0.attn.merge.Reshape_out", "blocks.0.norm2_out",
        "blocks.0.gelu_out",
    ]  # fmt: skip


def test_each_option_watches_what_it_quantises(tmp_path) -> None:
    plan = Plan.of(vit(tmp_path), scheme(), attention=True, extra=[Role.PATCH])
    options = plan.watched
    assert options["x"] == "--quantize-patch"
    assert sum(option == "--quantize-attention" for option in options.values()) == 8


def test_probabilities_are_measured_for_int8_and_known_for_fp8(tmp_path) -> None:
    for dtype, watched in ((Dtype.INT8, True), (Dtype.FP8, False)):
        plan = planned(tmp_path, dtype, attention=True)
        p = plan.operands[0].p
        assert (p in plan.watched) is watched
        assert measured(plan).thresholds[p] == (3.0 if watched else 1.0)


def test_thresholds_are_the_observers(tmp_path) -> None:
    plan = planned(tmp_path)
    histogram = counted(*np.random.default_rng(0).standard_normal(1000), 50.0)
    for observer in (Observer.MAX, Observer.MSE):
        got = plan.measured(dict.fromkeys(plan.watched, histogram), observer).thresholds
        assert set(got.values()) == {threshold(histogram, observer, plan.scheme.form)}


def test_any_mix_of_blocks_comes_of_one_plan_and_the_graph_stays(tmp_path) -> None:
    plan = measured(planned(tmp_path))
    before = run(plan.model, feeds())
    for kept, count in (((), 8), ((0,), 4), ((1,), 4), ((0, 1), 0)):
        assert len(quantised_products(plan.quantised(kept))) == count
    np.testing.assert_array_equal(run(plan.model, feeds()), before)
    np.testing.assert_array_equal(run(plan.unquantised(), feeds()), before)


def test_patch_and_head_stay_unless_they_are_asked_for(tmp_path) -> None:
    asked = Plan.of(vit(tmp_path), scheme(), attention=False, extra=[Role.PATCH])
    assert "patch.Conv" in quantised_products(measured(asked).quantised())
    assert "patch.Conv" not in quantised_products(measured(planned(tmp_path)).quantised())


def test_a_quantised_patch_convolution_computes_nearly_the_same(tmp_path) -> None:
    plan = Plan.of(vit(tmp_path), scheme(), attention=False, extra=[Role.PATCH])
    only = [p for p in plan.projections if p.role is Role.PATCH]
    plan = measured(type(plan)(plan.model, plan.scheme, tuple(only), ()))
    want, got = run(plan.model, feeds()), run(plan.quantised(), feeds())
    # steps of 3/127 on pixels of variance 1; measured 0.02
    assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.05


@pytest.mark.parametrize("attention", [False, True])
def test_attention_is_in_the_form_each_needs(tmp_path, attention) -> None:
    types = op_types(planned(tmp_path, attention=attention).model)
    assert types.count("Softmax") == (2 if attention else 0)
    assert op_types(planned(tmp_path, attention=attention).unquantised()).count("Attention") == 2


def test_int8_attention_is_refused_before_anything_is_run(tmp_path) -> None:
    model = vit(tmp_path, size=32 * 17, patch=16, depth=1)  # 1157 tokens
    with pytest.raises(GraphError, match="up to 512 tokens and this graph has 1157; leave atten"):
        Plan.of(model, scheme(), attention=True)
    Plan.of(vit(tmp_path, size=32 * 17, patch=16, depth=1), scheme(Dtype.FP8), attention=True)


def test_so_many_tokens_are_no_matter_to_onnxruntime(tmp_path) -> None:
    model = vit(tmp_path, size=32 * 17, patch=16, depth=1)
    plan = Plan.of(model, scheme(base=Dtype.FP32), attention=True)
    assert len(plan.operands) == 1
