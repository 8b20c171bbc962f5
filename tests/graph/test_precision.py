"""Typing casts where it must and nowhere else; what fp16 cannot hold stays fp32."""

import numpy as np
import onnx_ir as ir
import pytest

from msn_export.errors import GraphError
from msn_export.graph.emulate import emulate_bf16
from msn_export.graph.precision import (
    attention_in_bf16,
    fp32_nodes,
    fp32_products,
    graph_dtype,
    is_typed,
    observe,
    overflowing_weights,
    type_graph,
)
from msn_export.spec import Dtype
from tests.builders.graphs import op_types, parse, random_feeds, run

CHAIN = """
g (float[b,4] x) => (float[b,4] y)
<float[4,4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float[4] gain = {1,1,1,1}>
{
    h = MatMul (x, w)
    r = Relu (h)
    y = LayerNormalization <axis = -1> (r, gain)
}
"""


@pytest.mark.parametrize("dtype", [Dtype.FP16, Dtype.BF16])
@pytest.mark.parametrize(
    "taken", ["w.fp16", "w.bf16", "x.to_float16", "y.typed", "h.bf16", "h.rounded", "h.abs",
              "h.axes", "h.peak", "maxima"],
)  # fmt: skip
def test_a_foreign_graph_may_have_any_of_our_names(dtype, taken) -> None:
    text = "g (float[2] x) => (float[2] y) <float[2] w = {3,1}> { h = Mul (x, w)  a = Relu (h)"
    model = parse(f"{text}  y = Neg (a) }}")
    next(value for node in model.graph for value in node.outputs if value.name == "a").name = taken
    peaks = observe(model)
    maxima = run(peaks.model, {"x": np.array([0.5, -2.0], np.float32)})
    assert dict(zip(peaks.names, maxima, strict=True)) == {"h": 2.0, taken: 1.5, "y": 1.5}
    type_graph(model, dtype, ())
    names = [value.name for node in model.graph for value in node.outputs]
    assert len({*names, *model.graph.initializers}) == len(names) + len(model.graph.initializers)
    runnable = emulate_bf16(model) if dtype is Dtype.BF16 else model
    y = run(runnable, {"x": np.array([0.5, -2.0], np.float32)})
    assert y.tolist() == [-1.5, 0.0]


def types(model: ir.Model) -> dict[str, str]:
    return {
        value.name or "": value.dtype.name if value.dtype else "?"
        for node in model.graph
        for value in node.outputs
    }


@pytest.mark.parametrize(
    ("dtype", "onnx", "tolerance"),
    # a rounding a value: half of 2**-10 and 2**-7, times three nodes
    [(Dtype.FP16, "FLOAT16", 2e-3), (Dtype.BF16, "BFLOAT16", 2e-2)],
)
def test_only_the_ends_are_cast(dtype, onnx, tolerance) -> None:
    model = parse(CHAIN)
    feeds = random_feeds(model)
    before = run(model, feeds)
    type_graph(model, dtype)
    assert op_types(model) == ["Cast", "MatMul", "Relu", "LayerNormalization", "Cast"]
    assert types(model)["h"] == types(model)["r"] == onnx
    assert [value.dtype for value in model.graph.inputs] == [ir.DataType.FLOAT]
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT]
    assert graph_dtype(model) is dtype
    if dtype is Dtype.FP16:  # onnxruntime has no bf16 kernels on the CPU
        np.testing.assert_allclose(run(model, feeds), before, atol=tolerance)


PAIR = """
g (float[b,2] x) => (float[b,2] y)
<float[2,2] w = {1,2,3,4}, float[2,2] v = {1,0,0,1}>
{ h = MatMul (x, w)  y = MatMul (h, v) }
"""


def test_typed_are_all_products_but_those_of_islands() -> None:
    plain, typed = parse(PAIR), parse(PAIR)
    type_graph(typed, Dtype.FP16, ["y"])  # as many weights in either type
    assert not is_typed(plain, Dtype.FP16, {"h", "y"})  # whatever is called an island
    assert is_typed(typed, Dtype.FP16, {"y"})
    assert not is_typed(typed, Dtype.FP16, {})
    assert not is_typed(typed, Dtype.BF16, {"y"})
    assert not is_typed(typed, Dtype.INT8, {"y"})


def test_a_weight_that_nothing_reads_says_nothing_of_the_type() -> None:
    model = parse(PAIR)
    unread = ir.tensor(np.zeros(99, np.float16), name="unread")
    model.graph.register_initializer(ir.val("unread", const_value=unread))
    assert graph_dtype(model) is Dtype.FP32


def test_an_island_is_neither_written_nor_read_in_fp16() -> None:
    model = parse(CHAIN)
    feeds = {"x": np.array([[1e5, 1, -2, 3]], np.float32)}
    wanted = run(model, feeds)
    narrow = parse(CHAIN)
    type_graph(narrow, Dtype.FP16)
    assert not np.isfinite(run(narrow, feeds)).all()
    typed = type_graph(model, Dtype.FP16, ["h", "r"])
    assert typed.islands == ("h", "r")
    assert types(model)["h"] == types(model)["r"] == types(model)["y"] == "FLOAT"
    assert op_types(model) == ["MatMul", "Relu", "LayerNormalization"]
    np.testing.assert_array_equal(run(model, feeds), wanted)


def test_the_nodes_that_stay_are_named_and_are_found_again_in_the_typed_graph() -> None:
    model = parse(CHAIN)
    typed = type_graph(model, Dtype.FP16, ["h"])
    product, relu, norm = (node.name for node in parse(CHAIN).graph)
    assert typed.fp32_nodes == (product, relu)
    assert fp32_nodes(model) == (product, relu)
    assert norm not in typed.fp32_nodes


def test_a_value_read_in_both_types_is_cast_once() -> None:
    model = parse("""
        g (float[4] x) => (float[4] y, float[4] z) {
            h = Relu (x)
            big = Exp (h)
            huge = Softplus (h)
            a = Tanh (h)
            c = Sigmoid (h)
            y = Add (a, c)
            z = Sub (big, huge)
        }""")
    type_graph(model, Dtype.FP16, ["big", "huge"])
    assert op_types(model).count("Cast") == 3  # x down, h up for both islands, y up
    assert types(model)["z"] == "FLOAT"


def test_weights_that_overflow_are_islands_by_themselves() -> None:
    text = CHAIN.replace("{1,1,1,1}", "{1e5,1,1,1}")
    assert overflowing_weights(parse(text), Dtype.FP16) == {"gain": 1e5}
    assert overflowing_weights(parse(text), Dtype.BF16) == {}
    model = parse(text)
    typed = type_graph(model, Dtype.FP16)
    assert typed.islands == ("gain",)
    assert typed.weights == {"gain": 1e5}
    assert np.isfinite(run(model, random_feeds(model))).all()


def test_the_result_of_a_product_with_such_a_weight_is_read_in_fp32() -> None:
    """A cast back to fp16 right behind it makes TensorRT-RTX multiply in fp16."""
    model = parse(CHAIN.replace("{1,0,0,0,", "{-1e5,0,0,0,"))
    typed = type_graph(model, Dtype.FP16)
    assert typed.islands == ("w",)
    assert op_types(model) == ["MatMul", "Relu", "Cast", "LayerNormalization", "Cast"]
    assert fp32_products(model, {"w": 1e5}) == ()
    assert fp32_products(model, {}) == ("MatMul0",)
    assert fp32_products(parse(CHAIN), {"h"}) == ()


def test_bytes_are_cast_straight_to_fp16() -> None:
    model = parse("g (uint8[4] x) => (float[4] y) { f = Cast <to = 1> (x)  y = Relu (f) }")
    type_graph(model, Dtype.FP16)
    assert op_types(model) == ["Cast", "Relu", "Cast"]
    assert types(model)["f"] == "FLOAT16"


def test_an_unknown_island_is_refused() -> None:
    with pytest.raises(GraphError, match=r"island 'blocks\.9\.Add' is no value of this graph"):
        type_graph(parse(CHAIN), Dtype.FP16, ["blocks.9.Add"])


def test_a_typed_graph_is_refused() -> None:
    model = parse(CHAIN)
    type_graph(model, Dtype.FP16)
    with pytest.raises(GraphError, match="is FLOAT16 already; give the fp32 graph"):
        type_graph(model, Dtype.FP16)


def test_an_operator_with_fixed_float_inputs_is_refused() -> None:
    model = parse("""
        g (float[1,1,4,4] x) => (float[1,1,8,8] y) <float[4] scales = {1, 1, 2, 2}> {
            y = Resize <mode = "nearest"> (x, , scales)
        }""")
    with pytest.raises(GraphError, match=r"node 'Resize0' \(Resize\) cannot be retyped"):
        type_graph(model, Dtype.FP16)


def test_an_attention_in_bf16_still_gives_its_output_in_the_graphs_type() -> None:
    model = parse("g (float[b,2,5,4] x) => (float[b,2,5,4] y) { y = Attention (x, x, x) }")
    attention_in_bf16(model, ["Attention0"])
    assert op_types(model) == ["Cast", "Cast", "Cast", "Attention", "Cast"]
    (output,) = model.graph.outputs
    assert output.dtype == ir.DataType.FLOAT
    assert output.producer().op_type == "Cast"
