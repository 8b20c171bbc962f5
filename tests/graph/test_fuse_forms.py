"""Softmax, keys and LayerNorm as exporters write them become one node each, and stay the same."""

import numpy as np
import pytest
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from msn_export.graph.fuse import write_plainly
from tests.builders.graphs import op_types, parse, random_feeds, run

HEAD = "g (float[b,5,5,5] s) => (float[b,5,5,5] y) <int64[1] last = {-1}, int64[2] rows = {-1, 5}, "
HEAD += "int64[4] back = {-1, 5, 5, 5}> "
SOFTMAXES = {
    "in parts": """{
        m = ReduceMax <keepdims = 1> (s, last)
        z = Sub (s, m)
        e = Exp (z)
        t = ReduceSum <keepdims = 1> (e, last)
        y = Div (e, t)
    }""",
    "in parts, not shifted": """{
        e = Exp (s)
        t = ReduceSum <keepdims = 1> (e, last)
        y = Div (e, t)
    }""",
    "of rows": """{
        r = Reshape (s, rows)
        p = Softmax <axis = 1> (r)
        y = Reshape (p, back)
    }""",
    "flattened": """{
        r = Flatten <axis = 3> (s)
        p = Softmax <axis = -1> (r)
        y = Reshape (p, back)
    }""",
}


@pytest.mark.parametrize("body", SOFTMAXES.values(), ids=SOFTMAXES.keys())
def test_a_softmax_is_one_node_over_the_last_axis(body) -> None:
    model = parse(HEAD + body)
    feeds = random_feeds(model)
    before = run(model, feeds)
    write_plainly(model)
    assert op_types(model) == ["Softmax"]
    np.testing.assert_allclose(run(model, feeds), before, rtol=1e-5, atol=1e-7)


NEAR_MISSES = {
    "a sum over another axis": """{
        e = Exp (s)
        first = Constant <value = int64[1] {2}> ()
        t = ReduceSum <keepdims = 1> (e, first)
        y = Div (e, t)
    }""",
    "a sum that drops its axis": """{
        e = Exp (s)
        t = ReduceSum <keepdims = 0> (e, last)
        y = Div (e, t)
    }""",
    "a sum of something else": """{
        e = Exp (s)
        t = ReduceSum <keepdims = 1> (s, last)
        y = Div (e, t)
    }""",
    "rows of two axes": """{
        both = Constant <value = int64[2] {-1, 25}> ()
        r = Reshape (s, both)
        p = Softmax <axis = 1> (r)
        y = Reshape (p, back)
    }""",
}


@pytest.mark.parametrize("body", NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_what_only_looks_like_it_is_left(body) -> None:
    model = parse(HEAD + body)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    before = op_types(model)
    write_plainly(model)
    assert op_types(model) == before


def test_keys_by_way_of_three_axes_are_one_transpose() -> None:
    model = parse("""
        g (float[1,b,2,5,4] k) => (float[b,2,4,5] y)
        <int64[3] merged = {-1, 5, 4}, int64[4] apart = {-1, 2, 4, 5}> {
            m = Reshape (k, merged)
            t = Transpose <perm = [0, 2, 1]> (m)
            y = Reshape (t, apart)
        }""")
    feeds = random_feeds(model)
    before = run(model, feeds)
    write_plainly(model)
    assert op_types(model) == ["Reshape", "Transpose"]
    np.testing.assert_array_equal(run(model, feeds), before)


NORM = """
g (float[b,3,4] x) => (float[b,3,4] y)
<int64[1] last = {-1}, float two = {2}, float eps = {0.000001},
 float[4] gain = {1, 2, 3, 4}, float[4] bias = {0, 1, 0, 1}> {
    m = ReduceMean (x, last)
    c = Sub (x, m)
    q = SQUARE
    v = ReduceMean (q, last)
    e = Add (v, eps)
    d = Sqrt (e)
    n = Div (c, d)
    g = Mul (n, gain)
    y = Add (g, bias)
}"""


@pytest.mark.parametrize("square", ["Pow (c, two)", "Mul (c, c)"])
def test_a_layer_norm_written_out_is_one_node(square) -> None:
    model = parse(NORM.replace("SQUARE", square))
    feeds = random_feeds(model)
    before = run(model, feeds)
    write_plainly(model)
    assert op_types(model) == ["LayerNormalization"]
    (norm,) = model.graph
    assert norm.attributes["epsilon"].as_float() == pytest.approx(1e-6)
    np.testing.assert_allclose(run(model, feeds), before, rtol=1e-5, atol=1e-6)


def test_a_norm_of_another_mean_is_left() -> None:
    text = NORM.replace("SQUARE", "Mul (c, c)").replace("v = ReduceMean (q", "v = ReduceMean (x")
    model = parse(text)
    write_plainly(model)
    assert "LayerNormalization" not in op_types(model)
