"""Smoothing moves outliers and changes no bit of what an fp32 graph computes."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from msn_export.calibration import smoothquant
from msn_export.calibration.plan import Plan
from msn_export.calibration.qdq import Role, find_projections
from msn_export.calibration.smoothquant import (
    LARGEST_EXPONENT,
    SmoothingSite,
    factors,
    find_smoothing_sites,
    fold,
    largest_weights,
)
from msn_export.errors import GraphError
from tests.builders.calibrated_graphs import PACKINGS, block, feeds, planned
from tests.builders.graphs import parse, random_feeds, run


def seams_of(plan: Plan) -> dict[str, SmoothingSite]:
    return {site.name: site for site in find_smoothing_sites(plan.model, plan.projections)}


def value(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def observed(model: ir.Model, name: str, given: dict[str, np.ndarray]) -> np.ndarray:
    copy = model.clone()
    copy.graph.outputs[:] = [value(copy, name)]
    return run(copy, given)


def powers(count: int, seed: int = 1) -> np.ndarray:
    return np.exp2(np.random.default_rng(seed).integers(-5, 6, count)).astype(np.float32)


def test_a_block_has_three_seams_none_of_them_behind_gelu(tmp_path) -> None:
    assert list(seams_of(planned(tmp_path))) == [
        "blocks.0.norm1_out", "blocks.0.norm2_out", "blocks.1.norm1_out", "blocks.1.norm2_out",
        "blocks.0.attn.merge.Reshape_out", "blocks.1.attn.merge.Reshape_out",
    ]  # fmt: skip


@pytest.mark.parametrize("attention", [False, True], ids=["fused", "plain"])
def test_the_smoothed_graph_gives_the_same_bytes(tmp_path, attention) -> None:
    plan = planned(tmp_path, attention=attention)
    before = run(plan.model, feeds())
    for index, site in enumerate(seams_of(plan).values()):
        fold(plan.model, site, powers(len(site.columns), index))
    np.testing.assert_array_equal(run(plan.model, feeds()), before)


@pytest.mark.parametrize("packing", PACKINGS)
def test_so_does_one_of_another_packing(packing) -> None:
    model = block(packing)
    given = random_feeds(model)
    before = run(model, given)
    sites = find_smoothing_sites(model, find_projections(model))
    assert len(sites) == 3
    for index, site in enumerate(sites):
        fold(model, site, powers(len(site.columns), index))
    np.testing.assert_array_equal(run(model, given), before)


@pytest.mark.parametrize("name", ["blocks.0.norm1_out", "blocks.1.attn.merge.Reshape_out"])
def test_each_channel_is_divided_by_its_factor(tmp_path, name) -> None:
    plan = planned(tmp_path)
    before = observed(plan.model, name, feeds())
    scale = powers(before.shape[-1])
    fold(plan.model, seams_of(plan)[name], scale)
    np.testing.assert_array_equal(observed(plan.model, name, feeds()), before / scale)


def test_a_planted_outlier_is_moved_away(tmp_path) -> None:
    plan = planned(tmp_path)
    site = seams_of(plan)["blocks.0.norm1_out"]
    planted = np.ones(32, np.float32)
    planted[7] = 1 / 64
    fold(plan.model, site, planted)  # channel 7 is 64 times as large from here on
    maxima = np.abs(observed(plan.model, site.name, feeds())).reshape(-1, 32).max(axis=0)
    assert maxima[7] > 30 * np.median(maxima)
    fold(plan.model, site, factors(maxima, largest_weights(plan.model, site), 0.5))
    after = np.abs(observed(plan.model, site.name, feeds())).reshape(-1, 32).max(axis=0)
    assert after.max() < 4 * np.median(after)


def test_factors_are_those_of_the_paper_to_the_nearest_power_of_two(tmp_path) -> None:
    plan = planned(tmp_path)
    site = seams_of(plan)["blocks.0.norm2_out"]
    maxima = np.random.default_rng(0).uniform(0.1, 10, 32).astype(np.float32)
    weight = plan.model.graph.initializers["blocks.0.fc1.weight"].const_value.numpy()
    for strength in (0.0, 0.25, 0.5, 1.0):
        # arXiv 2211.10438, equation 4, and all by one factor so that the median channel stays
        wanted = maxima**strength / np.abs(weight).max(axis=1) ** (1 - strength)
        wanted /= 2 ** np.median(np.log2(wanted))
        got = factors(maxima, largest_weights(plan.model, site), strength)
        assert np.isin(np.log2(got), np.arange(-10, 11)).all()
        assert np.abs(np.log2(got / wanted)).max() <= 0.5 + 1e-3


def test_channels_that_are_zero_stay_and_none_moves_too_far(tmp_path) -> None:
    plan = planned(tmp_path)
    site = seams_of(plan)["blocks.0.norm2_out"]
    maxima = np.ones(32, np.float32)
    maxima[3], maxima[4] = 0.0, 1e30
    weights = largest_weights(plan.model, site)
    got = factors(maxima, weights, 1.0)
    assert got[3] == 1.0
    assert got[4] == 2.0**LARGEST_EXPONENT
    assert factors(np.zeros(32, np.float32), weights, 0.5).tolist() == [1.0] * 32


def test_a_norm_that_something_else_reads_is_no_seam(tmp_path) -> None:
    plan = planned(tmp_path)
    plan.model.graph.outputs.append(value(plan.model, "blocks.0.norm1_out"))
    assert "blocks.0.norm1_out" not in seams_of(plan)


def test_a_value_projection_that_something_else_reads_is_no_seam() -> None:
    model = block("thirds")
    assert len(find_smoothing_sites(model, find_projections(model))) == 3
    model.graph.outputs.append(value(model, "product"))
    sites = find_smoothing_sites(model, find_projections(model))
    assert [site.name for site in sites] == ["n", "between"]


@pytest.mark.parametrize(
    "text", ["v = Relu (x)", "v = Sub (x, c)", "r = Relu (x)  v = Add (r, c)", "v = Add (x, c)"]
)
def test_values_that_are_no_product_are_not_scaled(text) -> None:
    model = parse(f"""
        g (float[b,2] x) => (float[b,2] y) <float[2] c = {{1.0, 2.0}}>
        {{ {text}  y = Relu (v) }}""")
    assert smoothquant._affine(value(model, "v")) is None
    assert smoothquant._affine(model.graph.inputs[0]) is None


def test_a_norm_whose_reader_is_not_quantised_is_no_seam(tmp_path) -> None:
    plan = planned(tmp_path)
    fewer = tuple(p for p in plan.projections if (p.role, p.block) != (Role.FC1, 0))
    assert "blocks.0.norm2_out" not in seams_of(replace(plan, projections=fewer))


def test_an_affine_that_two_norms_share_is_changed_for_one(tmp_path) -> None:
    plan = planned(tmp_path)
    norms = {node.name: node for node in plan.model.graph}
    shared = norms["blocks.0.norm1"].inputs[1]
    norms["blocks.1.norm1"].replace_input_with(1, shared)
    before = run(plan.model, feeds())
    fold(plan.model, seams_of(plan)["blocks.0.norm1_out"], powers(32))
    np.testing.assert_array_equal(run(plan.model, feeds()), before)
    assert norms["blocks.1.norm1"].inputs[1] is shared


def test_factors_for_another_width_are_refused(tmp_path) -> None:
    plan = planned(tmp_path)
    with pytest.raises(
        GraphError, match=r"31 factors do not fit 'blocks\.0\.norm1_out'; collect the ranges again"
    ):
        fold(plan.model, seams_of(plan)["blocks.0.norm1_out"], np.ones(31, np.float32))
