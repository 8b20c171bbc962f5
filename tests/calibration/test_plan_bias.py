"""The mean error of a quantised product is measured and taken out of its bias."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from msn_export.calibration.plan import Plan, correct, corrections
from msn_export.calibration.ranges import Observer, Watch, histograms
from msn_export.spec import Dtype
from tests.builders.calibrated_graphs import feeds, planned
from tests.builders.graphs import parse, run

IMAGES = feeds(8)["x"]
LABELS = [f"{i}" for i in range(len(IMAGES))]


def measured(folder: Path, dtype: Dtype = Dtype.INT8) -> Plan:
    """Take ranges a quarter as wide as they should be: what is cut off has a mean."""
    plan = planned(folder, dtype)
    seen = histograms(Watch(plan.model, list(plan.watched), folder), [(IMAGES, LABELS)])
    plan = plan.measured(seen, Observer.MAX)
    return replace(plan, thresholds={name: limit / 4 for name, limit in plan.thresholds.items()})


def found(plan: Plan, folder: Path, batches) -> dict[str, np.ndarray]:
    watch = Watch(plan.model, [p.x for p in plan.projections], folder)
    return corrections(plan.model, plan.projections, plan.thresholds, plan.scheme, watch, batches)


def observed(model: ir.Model, name: str) -> np.ndarray:
    copy = model.clone()
    copy.graph.outputs[:] = [v for node in copy.graph for v in node.outputs if v.name == name]
    return run(copy, {"x": IMAGES})


def alone(plan: Plan, node: str) -> Plan:
    """Quantise one projection only: its input is then the fp32 graph's."""
    return replace(plan, projections=tuple(p for p in plan.projections if p.node == node))


@pytest.mark.parametrize("dtype", [Dtype.INT8, Dtype.FP8])
@pytest.mark.parametrize("layer", ["attn.qkv", "fc1", "fc2"])
def test_the_mean_error_of_a_product_is_gone(tmp_path, dtype, layer) -> None:
    plan = alone(measured(tmp_path, dtype), f"blocks.0.{layer}.MatMul")
    result = f"blocks.0.{layer}.Add_out"
    want = observed(plan.model, result).mean(axis=(0, 1))
    before = observed(plan.quantised(), result).mean(axis=(0, 1)) - want
    plan = replace(plan, corrections=found(plan, tmp_path, [(IMAGES, LABELS)]))
    after = observed(plan.quantised(), result).mean(axis=(0, 1)) - want
    assert np.abs(before).max() > 0.01
    # in another session a value on the edge of a step rounds the other way, one row of 40
    assert np.abs(after).max() < np.abs(before).max() * 0.03


def test_it_makes_no_difference_how_images_are_dealt(tmp_path) -> None:
    plan = measured(tmp_path)
    whole = found(plan, tmp_path, [(IMAGES, LABELS)])
    dealt = found(plan, tmp_path, [(IMAGES[:3], LABELS[:3]), (IMAGES[3:], LABELS[3:])])
    assert whole.keys() == dealt.keys() == {p.node for p in plan.projections}
    for name, error in whole.items():
        np.testing.assert_allclose(dealt[name], error, atol=1e-5)


GEMM = """
g (float[b,2] x) => (float[b,2] y)
<float[2,2] w = {1.0, 2.0, 3.0, 4.0}, float[2] c = {10.0, 20.0}>
{ y = Gemm (x, w, c) }
"""
BARE = """
g (float[b,2] x) => (float[b,2] y) <float[2,2] w = {1.0, 2.0, 3.0, 4.0}>
{ m = MatMul (x, w)  y = Relu (m) }
"""


def test_the_bias_of_a_gemm_is_corrected() -> None:
    model = parse(GEMM)
    x = {"x": np.zeros((1, 2), np.float32)}
    correct(model, {"Gemm0": np.array([1.0, -1.0], np.float32)})
    assert run(model, x).tolist() == [[9.0, 21.0]]


def test_a_product_without_a_bias_keeps_its_error() -> None:
    model = parse(BARE)
    x = {"x": np.ones((1, 2), np.float32)}
    correct(model, {"MatMul0": np.array([1.0, -1.0], np.float32)})
    assert run(model, x).tolist() == [[4.0, 6.0]]


def test_a_product_that_is_added_to_no_constant_keeps_its_error() -> None:
    model = parse(BARE.replace("Relu (m)", "Add (m, x)"))
    x = {"x": np.ones((1, 2), np.float32)}
    correct(model, {"MatMul0": np.array([1.0, -1.0], np.float32)})
    assert run(model, x).tolist() == [[5.0, 7.0]]


def test_a_bias_that_two_products_share_is_corrected_for_one() -> None:
    model = parse("""
        g (float[b,2] x) => (float[b,2] y)
        <float[2,2] w = {1.0, 2.0, 3.0, 4.0}, float[2] c = {10.0, 20.0}>
        { m = MatMul (x, w)  p = Add (m, c)  n = MatMul (p, w)  y = Add (n, c) }""")
    x = {"x": np.zeros((1, 2), np.float32)}
    before = run(model, x)
    correct(model, {"MatMul2": np.array([1.0, -1.0], np.float32)})
    assert (run(model, x) - before).tolist() == [[-1.0, 1.0]]
