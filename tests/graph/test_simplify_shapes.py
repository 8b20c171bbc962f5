"""Shapes that follow from weights and the input are written down; the batch stays open."""

import numpy as np
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from msn_export.graph import simplify
from msn_export.graph.simplify import resolve_shapes
from tests.builders.graphs import op_types, parse, random_feeds, run


def lifted(text: str, *, opset: int = 17):
    model = parse(text, opset=opset, ir_version=8)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def test_a_target_computed_from_the_running_batch_becomes_constant() -> None:
    model = lifted("""
        g (float[b,3,4,4] x) => (float[b,n,d] y)
        <int64 first = {0}, int64[1] axis = {0}, int64[1] rest = {-1}, int64[1] three = {3}> {
            s = Shape (x)
            batch = Gather <axis = 0> (s, first)
            one = Unsqueeze (batch, axis)
            target = Concat <axis = 0> (one, three, rest)
            y = Reshape (x, target)
        }""")
    feeds = random_feeds(model)
    before = run(model, feeds)
    resolve_shapes(model)
    assert op_types(model) == ["Reshape"]
    (reshape,) = model.graph
    assert reshape.inputs[1].const_value.numpy().tolist() == [-1, 3, 16]
    np.testing.assert_array_equal(run(model, feeds), before)


def test_what_depends_on_the_batch_stays_computed() -> None:
    model = lifted("""
        g (float[b,3] x) => (float[b,1,3] y)
        <float[1,1,3] token = {1, 2, 3}, int64[1] start = {0}, int64[1] end = {1},
         int64[2] ones = {1, 3}> {
            s = Shape (x)
            batch = Slice (s, start, end)
            target = Concat <axis = 0> (batch, ones)
            y = Expand (token, target)
        }""")
    assert resolve_shapes(model) == 0
    assert op_types(model) == ["Shape", "Slice", "Concat", "Expand"]
    for count in (1, 4):
        assert run(model, {"x": np.zeros((count, 3), np.float32)}).shape == (count, 1, 3)


def test_a_constant_of_no_axis_has_none_when_it_is_computed() -> None:
    # as converters to fp16 leave a scalar of an operator that stays fp32
    model = lifted("""
        g (float[b,3] x) => (float[b,3] y) <double root = {1.5}> {
            wide = Cast <to = 1> (root)
            y = Div (x, wide)
        }""")
    resolve_shapes(model)
    (division,) = model.graph
    assert division.inputs[1].const_value.shape == ()
    assert division.inputs[1].shape == ()


RESIZE = """
g (float[b,4] x) => (float[b,4] y)
<float[1,1,1,2] table = {1, 3}, float[0] roi = {}, float[4] twice = {1, 1, 1, 2},
 int64[1] flat = {4}> {
    larger = Resize <mode = "linear"> (table, roi, twice)
    row = Reshape (larger, flat)
    y = Add (x, row)
}"""


def test_operators_on_constants_are_computed_once(monkeypatch) -> None:
    computed, compute = [], simplify._compute
    monkeypatch.setattr(
        simplify, "_compute", lambda node, *rest: computed.append(node) or compute(node, *rest)
    )
    model = lifted(RESIZE)
    feeds = random_feeds(model)
    before = run(model, feeds)
    assert resolve_shapes(model) >= 1
    assert op_types(model) == ["Add"]
    assert len(set(computed)) == len(computed) > 0
    np.testing.assert_allclose(run(model, feeds), before, rtol=1e-6)


def test_the_shape_of_what_an_unknown_operator_gives_stays_computed() -> None:
    model = lifted("g (float[b,6] x) => (int64[2] y) { r = Relu (x)  y = Shape (r) }")
    model.graph[0].op_type = "Unknown"
    assert resolve_shapes(model) == 0
    assert op_types(model) == ["Unknown", "Shape"]


def test_a_constant_of_any_size_is_not_made() -> None:
    model = lifted("""
        g (float[b,1] x) => (float[b,n] y)
        <float[1,1] one = {1}, int64[2] large = {1, 100000000}> {
            wide = Expand (one, large)
            y = Mul (x, wide)
        }""")
    assert resolve_shapes(model) == 0
    assert op_types(model) == ["Expand", "Mul"]


def test_weights_in_8_bits_stay_so_and_biases_become_floats() -> None:
    model = lifted("""
        g (float[b,2] x) => (float[b,2] y)
        <int8[2,2] w = {1, 2, 3, 4}, int32[2] bias = {5, 6}, int8[2] gain = {1, 2},
         float step = {0.5}, int8 zero = {0}, int32 wide = {0}> {
            weight = DequantizeLinear (w, step, zero)
            m = MatMul (x, weight)
            held = DequantizeLinear (bias, step, wide)
            a = Add (m, held)
            g = DequantizeLinear (gain, step, zero)
            y = Mul (a, g)
        }""")
    resolve_shapes(model)
    assert op_types(model) == ["DequantizeLinear", "MatMul", "Add", "Mul"]


def test_a_fixed_batch_makes_every_shape_constant() -> None:
    model = lifted("""
        g (float[2,3,4] x) => (float[n,d] y) <int64[1] rest = {-1}, int64[1] start = {0},
        int64[1] end = {1}> {
            s = Shape (x)
            batch = Slice (s, start, end)
            target = Concat <axis = 0> (batch, rest)
            y = Reshape (x, target)
        }""")
    resolve_shapes(model)
    (reshape,) = model.graph
    assert reshape.inputs[1].const_value.numpy().tolist() == [2, -1]
