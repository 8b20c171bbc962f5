"""A bf16 graph runs on a CPU as fp32 arithmetic with every result rounded."""

import ml_dtypes
import numpy as np
from graphs import parse, random_feeds, run

from msn_export.graph.emulate import emulate_bf16
from msn_export.graph.precision import type_graph
from msn_export.spec import Dtype


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
