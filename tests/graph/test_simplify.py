"""Simplification is kept only if it is smaller and the same."""

import numpy as np
import onnx_ir as ir
import onnxsim
import pytest

from msn_export.graph import simplify as module
from msn_export.graph.simplify import simplify
from tests.builders.graphs import op_types, parse, random_feeds, run

ROUNDABOUT = """
g (float[b,4] x) => (float[b,4] y) <int64[2] shape = {-1, 4}, float[4,4] w = {
    1,0,0,2, 0,1,0,0, 0,0,1,0, 0,3,0,1}, float[4] bias = {1,2,3,4}>
{
    a = Identity (x)
    t = Transpose <perm = [1, 0]> (a)
    back = Transpose <perm = [1, 0]> (t)
    r = Reshape (back, shape)
    m = MatMul (r, w)
    y = Add (m, bias)
}
"""


def test_what_cancels_is_dropped_and_the_result_is_the_same() -> None:
    model = parse(ROUNDABOUT)
    feeds = random_feeds(model)
    simplified, reason = simplify(model)
    assert len(simplified.graph) < len(model.graph) == 6
    assert reason == f"kept: {6 - len(simplified.graph)} nodes fewer"
    assert "Transpose" not in op_types(simplified)
    np.testing.assert_allclose(run(simplified, feeds), run(model, feeds), rtol=1e-6)


def test_the_bias_of_a_batched_product_is_left_where_it_is() -> None:
    model = parse("""
        g (float[b,5,4] x) => (float[b,5,4] y)
        <float[4,4] w = {1,0,0,2, 0,1,0,0, 0,0,1,0, 0,3,0,1}, float[4] bias = {1,2,3,4}>
        { m = MatMul (x, w)  y = Add (m, bias) }""")
    simplified, reason = simplify(model)
    assert op_types(simplified) == ["MatMul", "Add"]
    assert reason == "nothing left to simplify"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("g (float[b,4] x) => (float[b,4] y) { y = Neg (x) }", "not kept: outputs moved by"),
        (
            """g (float[b,4] x) => (float[b,4] y) {
            a = Abs (x)  c = Abs (a)  d = Abs (c)  e = Abs (d)  f = Abs (e)  h = Abs (f)
            y = Abs (h) }""",
            "not kept: 7 nodes instead of 6",
        ),
    ],
)
def test_a_wrong_or_larger_result_is_not_kept(text, reason, monkeypatch) -> None:
    wrong = ir.to_proto(parse(text))
    monkeypatch.setattr(onnxsim, "simplify", lambda *_, **__: (wrong, True))
    model = parse(ROUNDABOUT)
    simplified, said = simplify(model)
    assert simplified is model
    assert said.startswith(reason)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [("simplify", "not kept: no such pass"), ("run", "not kept: no kernel here")],
)
def test_a_failure_of_a_library_costs_the_smaller_graph_and_nothing_else(
    broken, reason, monkeypatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(reason.removeprefix("not kept: "))

    if broken == "simplify":
        monkeypatch.setattr(onnxsim, "simplify", fail)
    else:
        monkeypatch.setattr(module, "_run", fail)
    model = parse(ROUNDABOUT)
    simplified, said = simplify(model)
    assert simplified is model
    assert said == reason


def test_the_input_is_not_changed() -> None:
    model = parse(ROUNDABOUT)
    before = op_types(model)
    simplify(model)
    assert op_types(model) == before
    assert module.HARMFUL_PASSES == ["fuse_matmul_add_bias_into_gemm_batched"]


def test_what_onnxsim_cannot_fold_is_left_and_nothing_printed(capfd) -> None:
    # it would print the names of a hostile graph, and a traceback, on stderr by itself
    model = parse(
        """
        g (float[4] x) => (float[4] y) <int64[3] s = {1048576, 4096, 1024}>
        { bomb = ConstantOfShape (s)  b = ReduceSum <keepdims = 0> (bomb)  y = Add (x, b) }
        """
    )
    assert len(simplify(model)[0].graph) == 3
    assert capfd.readouterr().err == ""


def test_small_outputs_are_compared_as_they_are_and_large_ones_by_their_size() -> None:
    small, moved, large = (
        parse(f"g (float[b] x) => (float[b] y) <float c = {{{c}}}> {{ y = Mul (x, c) }}")
        for c in (0.25, 0.5, 1000)
    )
    (x,) = np.random.default_rng(0).random(1) * 2
    assert module._difference(small, moved) == pytest.approx(0.25 * x, rel=1e-6)
    assert module._difference(large, small) == pytest.approx(1 - 0.25 / 1000, rel=1e-6)
