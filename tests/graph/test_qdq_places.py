"""A pair stands in front of a product, behind it, or where the reference has no place for it."""

import numpy as np
import onnx_ir as ir
import pytest

from msn_export.errors import GraphError
from msn_export.graph.qdq_places import output_scale, require_matched, result_of
from tests.builders.graphs import op_types, parse, random_feeds, run

GRAPH = """
g (float[b,4] x) => (float[b,2] y)
<float s = {{0.1}}, float t = {{0.2}}, float u = {{0.3}}, int8 z = {{0}},
 int8[4,2] w = {{1, 2, 3, 4, 5, 6, 7, 8}}, float[2] bias = {{1, 2}}>
{{
    xq = QuantizeLinear (x, s, z)   xd = DequantizeLinear (xq, s, z)   wd = DequantizeLinear (w, s)
    {body}
}}
"""
RAW = "m = MatMul (xd, wd)  q = QuantizeLinear (m, t, z)  d = DequantizeLinear (q, t, z) "
BODIES = {
    "none": ("m = MatMul (xd, wd)  y = Add (m, bias)", None, None),
    "before the bias": (RAW + "y = Add (d, bias)", 0.2, None),
    "behind it": (
        "m = MatMul (xd, wd)  a = Add (bias, m)  q = QuantizeLinear (a, u, z)"
        "  y = DequantizeLinear (q, u, z)",
        None, 0.3,
    ),
    "both": (
        RAW + "a = Add (d, bias)  e = QuantizeLinear (a, u, z)  y = DequantizeLinear (e, u, z)",
        0.2, 0.3,
    ),
    "behind a Gemm": (
        "m = Gemm (xd, wd, bias)  q = QuantizeLinear (m, u, z)  y = DequantizeLinear (q, u, z)",
        None, 0.3,
    ),
}  # fmt: skip


def graph(body: str) -> tuple[ir.Model, ir.Node]:
    model = parse(GRAPH.format(body=body))
    return model, next(node for node in model.graph if node.op_type in {"MatMul", "Gemm"})


@pytest.mark.parametrize(("body", "raw", "biased"), BODIES.values(), ids=BODIES.keys())
def test_scales_behind_a_product_are_found_on_either_side_of_its_bias(body, raw, biased) -> None:
    model, product = graph(body)
    found = [output_scale(product, biased=where) for where in (False, True)]
    assert found == [None if each is None else pytest.approx(each) for each in (raw, biased)]
    require_matched(model, {product})


def test_a_scale_for_each_channel_is_refused() -> None:
    _, product = graph(
        "two = Constant <value = float[2] {0.1, 0.2}> ()  zeros = Constant <value = int8[2] {0, 0}>"
        " ()"
        "  m = MatMul (xd, wd)  q = QuantizeLinear <axis = 1> (m, two, zeros)"
        "  y = DequantizeLinear <axis = 1> (q, two, zeros)"
    )
    with pytest.raises(GraphError, match="is not quantised with one constant scale"):
        output_scale(product, biased=False)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("m = MatMul (xd, wd)  r = Relu (m)  q = QuantizeLinear (r, t, z)"
         "  y = DequantizeLinear (q, t, z)", "r"),
        (RAW + "y = Add (d, m)", "m"),  # read beside the pair too
        ("m = MatMul (xd, wd)  n = ReduceSum (xd)  y = Add (m, n)", "x"),
        ("m = MatMul (xd, wd)  n = ReduceSum (wd)  y = Add (m, n)", "w"),
    ],
)  # fmt: skip
def test_a_pair_elsewhere_is_named(body, named) -> None:
    model, product = graph(body)
    with pytest.raises(GraphError) as raised:
        require_matched(model, {product})
    assert str(raised.value) == (
        f"the candidate also quantises {named!r}, where the reference cannot be quantised alike"
    )


def test_a_products_result_is_given_on_either_side_of_its_bias() -> None:
    _, product = graph("m = MatMul (xd, wd)  y = Add (m, bias)")
    assert [result_of(product, biased=where).name for where in (False, True)] == ["m", "y"]
    _, bare = graph("m = MatMul (xd, wd)  y = Relu (m)")
    with pytest.raises(GraphError, match="no bias is added behind 'MatMul3'"):
        result_of(bare, biased=True)


def test_a_gemm_is_taken_apart_for_its_result_before_the_bias() -> None:
    model, product = graph("y = Gemm (xd, wd, bias)")
    feeds = random_feeds(model)
    before = run(model, feeds)
    assert result_of(product, biased=True).name == "y"
    value = result_of(product, biased=False)
    assert value.producer() is product
    assert op_types(model)[-2:] == ["Gemm", "Add"]
    assert model.graph.outputs[0].name == "y"
    np.testing.assert_allclose(run(model, feeds), before, rtol=1e-6)
