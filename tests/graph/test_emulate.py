"""A graph runs in another arithmetic: bf16 and fp16 as rounded fp32, fp64, without 8 bits."""

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from msn_export.errors import GraphError
from msn_export.graph.emulate import emulate_bf16, in_fp64, round_values, widen
from msn_export.graph.precision import type_graph
from msn_export.spec import Dtype
from tests.builders.graphs import parse, random_feeds, run


def bf16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def test_each_result_is_rounded_once() -> None:
    model = parse("""
        g (float[b,4] x) => (float[b,2] y) <float[4,4] w = {
            1.001,0.3,0.2,2, 0.1,1,0,0, 0,0.7,1,0, 0,3,0.33,1}>
        { m = MatMul (x, w)  r = Tanh (m)  y, z = Split <axis = 1, num_outputs = 2> (r) }""")
    w = model.graph.initializers["w"].const_value.numpy().copy()
    x = random_feeds(model)["x"]
    type_graph(model, Dtype.BF16)
    wanted = bf16(np.tanh(bf16(bf16(x) @ bf16(w))))[:, :2]
    # fp32 products of four terms may be added in another order before they are rounded
    np.testing.assert_allclose(run(emulate_bf16(model), {"x": x}), wanted, rtol=2**-7)
    assert {v.dtype.name for v in model.graph.initializers.values()} == {"BFLOAT16"}


MIXED = """
    g (float[b,3,8,8] x, float[4,3,4,4] w, float[4] c, float[4] g, float[4] k) => (float[b,4,4] y)
    { p = Conv <strides = [4, 4], kernel_shape = [4, 4]> (x, w, c)
      s = Constant <value_ints = [0, 4, -1]> ()
      f = Reshape (p, s)  t = Transpose <perm = [0, 2, 1]> (f)
      n = LayerNormalization <axis = -1> (t, g, k)
      a = Gelu (n)  m = Softmax (a)  y = Add (m, t) }"""


def mixed() -> ir.Model:
    model = parse(MIXED)
    rng = np.random.default_rng(0)
    for value in model.graph.inputs[1:]:
        array = rng.standard_normal([int(size) for size in value.shape]).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    del model.graph.inputs[1:]
    return model


def exactly(model: ir.Model, x: np.ndarray) -> np.ndarray:
    """Compute MIXED in fp64, apart from the code under test."""
    held = {n: v.const_value.numpy().astype(float) for n, v in model.graph.initializers.items()}
    patches = x.reshape(len(x), 3, 2, 4, 2, 4).transpose(0, 2, 4, 1, 3, 5).reshape(len(x), 4, 48)
    t = patches.astype(float) @ held["w"].reshape(4, 48).T + held["c"]
    centred = t - t.mean(axis=-1, keepdims=True)
    n = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5) * held["g"] + held["k"]
    erf = np.vectorize(math.erf)
    a = n / 2 * (1 + erf(n / math.sqrt(2)))
    m = np.exp(a - a.max(axis=-1, keepdims=True))
    return m / m.sum(axis=-1, keepdims=True) + t


def error(have: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(have - want) / np.linalg.norm(want))


X = np.random.default_rng(1).standard_normal((5, 3, 8, 8)).astype(np.float32)


def test_in_fp64_is_far_nearer_to_what_is_right_than_fp32() -> None:
    model = mixed()
    want = exactly(model, X)
    got = run(in_fp64(model), {"x": X})
    assert got.dtype == np.float64
    assert error(got, want) < 3e-8 < error(run(model, {"x": X}), want)  # Erf stays fp32


def test_a_convolution_whose_patches_overlap_has_no_fp64_form() -> None:
    model = parse("""
        g (float[b,3,8,8] x, float[4,3,4,4] w) => (float[b,4,3,3] y)
        { y = Conv <strides = [2, 2], kernel_shape = [4, 4]> (x, w) }""")
    with pytest.raises(GraphError, match=r"is a convolution that has no fp64 form here"):
        in_fp64(model)


@pytest.mark.parametrize("sizes", ["h,8", "8,w"])
def test_a_convolution_over_images_of_any_size_has_none_either(sizes) -> None:
    model = parse(f"""
        g (float[b,1,{sizes}] x) => (float[b,2,m,n] y) <float[2,1,1,1] w = {{1.0, 2.0}}>
        {{ y = Conv (x, w) }}""")
    with pytest.raises(GraphError, match=r"node 'Conv0' takes images of no fixed size"):
        in_fp64(model)


@pytest.mark.parametrize(("dtype", "ulp"), [(Dtype.FP16, 2**-11), (Dtype.BF16, 2**-8)])
def test_every_result_is_rounded_and_what_is_kept_is_not(dtype, ulp) -> None:
    model = mixed()
    want = exactly(model, X)
    cost = error(run(round_values(model, dtype), {"x": X}), want)
    assert ulp / 4 < cost < 4 * ulp
    everything = {v.name for node in model.graph for v in node.outputs} | {
        *model.graph.initializers
    }
    kept = run(round_values(model, dtype, everything), {"x": X})
    np.testing.assert_array_equal(kept, run(model, {"x": X}))
    # one result alone
    rounded = run(round_values(model, dtype, everything - {"y"}), {"x": X})
    kind = np.float16 if dtype is Dtype.FP16 else ml_dtypes.bfloat16
    np.testing.assert_array_equal(rounded, kept.astype(kind).astype(np.float32))


def test_a_typed_graph_is_widened_to_the_fp32_function_of_its_weights() -> None:
    model = mixed()
    typed = model.clone()
    type_graph(typed, Dtype.FP16)
    for value in model.graph.initializers.values():
        rounded = value.const_value.numpy().astype(np.float16).astype(np.float32)
        value.const_value = ir.tensor(rounded, name=value.name)
    np.testing.assert_allclose(
        run(widen(typed), {"x": X}), run(model, {"x": X}), rtol=1e-5, atol=1e-6
    )


def test_a_quantised_graph_is_widened_to_the_floats_that_its_integers_stand_for() -> None:
    model = parse("""
        g (float[b,4] x) => (float[b,2] y)
        <int8[4,2] w = {1,-2, 3,4, -5,6, 7,-8}, float[2] s = {0.5, 0.25}, int8[2] z = {1, 2},
         float t = {0.1}, int8 o = {0}>
        { q = QuantizeLinear (x, t, o)  d = DequantizeLinear (q, t, o)
          f = DequantizeLinear <axis = 1> (w, s, z)  y = MatMul (d, f) }""")
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    weights = (np.array([[1, -2], [3, 4], [-5, 6], [7, -8]]) - [1, 2]) * [0.5, 0.25]
    wide = widen(model)
    assert [node.op_type for node in wide.graph] == ["MatMul"]
    np.testing.assert_allclose(run(wide, {"x": x}), x @ weights.astype(np.float32), rtol=1e-6)


def test_an_output_that_is_quantised_keeps_its_name() -> None:
    model = parse("""
        g (float[b,4] x) => (float[b,4] y) <float t = {0.1}, int8 o = {0}>
        { a = Relu (x)  q = QuantizeLinear (a, t, o)  y = DequantizeLinear (q, t, o) }""")
    wide = widen(model)
    assert [node.op_type for node in wide.graph] == ["Relu"]
    assert [value.name for value in wide.graph.outputs] == ["y"]
