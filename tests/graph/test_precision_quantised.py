"""A quantised graph is read for what it is; what no TensorRT compiles is named."""

import pytest

from msn_export.calibration.ranges import Histogram, Observer
from msn_export.errors import GraphError
from msn_export.graph.fuse import fuse_attention
from msn_export.graph.precision import (
    is_quantised_core,
    quantised_dtype,
    quantised_products,
    type_beside,
)
from msn_export.spec import AttentionForm, Dtype
from tests.builders.calibrated_graphs import feeds, planned, vit
from tests.builders.graphs import parse

PAIR = """
g (float[2,3] x) => (float[2,3] y) <float s = {{0.1}}, {type} z = {{0}}>
{{ q = QuantizeLinear{attributes} (x, s{with_zero})  y = DequantizeLinear (q, s{with_zero}) }}
"""


def pair(kind: str, attributes: str = "", with_zero: str = ", z"):
    return parse(PAIR.format(type=kind, attributes=attributes, with_zero=with_zero))


def quantised(tmp_path, *, attention: bool = False):
    plan = planned(tmp_path, attention=attention)
    histogram = Histogram()
    histogram.add(feeds()["x"])
    return plan.measured(dict.fromkeys(plan.watched, histogram), Observer.MAX).quantised()


def test_int8_pairs_are_int8() -> None:
    assert quantised_dtype(pair("int8")) is Dtype.INT8


def test_a_graph_without_pairs_is_not_quantised(tmp_path) -> None:
    assert quantised_dtype(vit(tmp_path)) is None
    assert quantised_products(vit(tmp_path)) == ()


def test_uint8_is_named_also_where_it_is_the_default() -> None:
    for model in (pair("uint8"), pair("uint8", with_zero="")):
        with pytest.raises(
            GraphError, match="node 'QuantizeLinear0' quantises to uint8, which TensorRT does not"
        ):
            quantised_dtype(model)


def test_a_zero_point_other_than_0_is_named() -> None:
    model = parse(
        PAIR.replace("z = {{0}}", "z = {{3}}").format(type="int8", attributes="", with_zero=", z")
    )
    with pytest.raises(GraphError, match="'QuantizeLinear0' has a zero point other than 0, which"):
        quantised_dtype(model)


def test_the_type_beside_8_bits_is_that_of_most_scales_that_bring_values_back() -> None:
    model = parse("""
        g (float[2,3] x) => (float[2,3] y) <float16 h = {0}, float s = {0.1}, int8 z = {0}> {
            q = QuantizeLinear (x, s, z)
            a = DequantizeLinear (q, s, z)
            b = DequantizeLinear (z, h)
            c = DequantizeLinear (z, h)
            d = Add (b, c)
            e = Cast <to = 1> (d)
            y = Add (a, e)
        }""")
    assert type_beside(model) is Dtype.FP16
    assert type_beside(parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")) is Dtype.FP32


def test_a_type_may_be_said_by_attribute() -> None:
    assert quantised_dtype(pair("uint8", " <output_dtype = 3>", "")) is Dtype.INT8


def test_fp8_of_another_kind_is_named() -> None:
    model = pair("uint8", " <output_dtype = 19>", "")  # FLOAT8E5M2
    with pytest.raises(GraphError, match="quantises to float8e5m2, which TensorRT does not take"):
        quantised_dtype(model)


def test_both_formats_in_one_graph_are_refused() -> None:
    model = parse("""
        g (float[2,3] x) => (float[2,3] y) <float s = {0.1}, int8 z = {0}> {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            e = QuantizeLinear <output_dtype = 17> (d, s)
            y = DequantizeLinear (e, s)
        }""")
    with pytest.raises(GraphError, match=r"the graph mixes int8 and fp8 .*; quantise it to one"):
        quantised_dtype(model)


def test_integer_operators_are_named_with_the_way_out() -> None:
    model = parse("""
        g (int8[2,3] x) => (int32[2,2] y) <int8[3,2] w = {1,2,3,4,5,6}> {
            y = MatMulInteger (x, w)
        }""")
    with pytest.raises(
        GraphError,
        match=r"node 'MatMulInteger0' is MatMulInteger: int8 without QuantizeLinear and Dequantize"
        r"Linear, which no TensorRT parser reads; quantise the fp32 graph with msn-export calib",
    ):
        quantised_dtype(model)


def test_a_bias_in_int32_says_nothing() -> None:
    model = parse("""
        g (float[2] x) => (float[2] y) <float s = {0.1}, int32[2] b = {1, 2}> {
            d = DequantizeLinear (b, s)
            y = Add (x, d)
        }""")
    assert quantised_dtype(model) is None


def test_products_are_those_with_a_dequantised_weight(tmp_path) -> None:
    names = quantised_products(quantised(tmp_path, attention=True))
    # attention's own products have no weight
    assert names == tuple(
        f"blocks.{block}.{layer}.MatMul"
        for block in range(2)
        for layer in ("attn.qkv", "attn.proj", "fc1", "fc2")
    )


def test_a_core_is_quantised_with_all_four_operands_or_not_at_all(tmp_path) -> None:
    model = quantised(tmp_path, attention=True)
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    assert [is_quantised_core(node) for node in softmaxes] == [True, True]
    values = next(u.node for u in softmaxes[0].outputs[0].uses())  # QuantizeLinear
    product = values.outputs[0].uses()[0].node.outputs[0].uses()[0].node
    v = product.inputs[1].producer()
    product.replace_input_with(1, v.inputs[0].producer().inputs[0])
    assert not is_quantised_core(softmaxes[0])


def test_quantised_cores_count_as_fused_and_stay(tmp_path) -> None:
    model = quantised(tmp_path, attention=True)
    before = len(model.graph)
    assert fuse_attention(model, AttentionForm.HEADS, expected=2) == 2
    assert len(model.graph) == before
