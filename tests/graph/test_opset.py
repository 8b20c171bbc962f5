"""A graph of opset 23 written for opset 17 computes the same, with operators 17 knows."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from msn_export.errors import GraphError
from msn_export.graph.opset import lower_opset, raise_opset
from tests.builders.graphs import op_types, parse, random_feeds, run

BODIES = {
    "gelu": "y = Gelu (x)",
    "gelu, tanh": 'y = Gelu <approximate = "tanh"> (x)',
    "split": "a, c = Split <axis = 1, num_outputs = 2> (x)  y = Concat <axis = 1> (c, a)",
    "mean": """axes = Constant <value = int64[1] {1}> ()
               m = ReduceMean <keepdims = 1> (x, axes)  y = Sub (x, m)""",
}


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # the same arithmetic, written out: rounding of a handful of operations
    [("float", 1e-6), ("float16", 4e-3)],
)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_lowered_graph_is_valid_at_17_and_computes_the_same(body, dtype, tolerance) -> None:
    model = lifted(f"g ({dtype}[b,6] x) => ({dtype}[b,6] y) {{ {body} }}")
    feeds = random_feeds(model)
    before = run(model, feeds)
    lower_opset(model, 17)
    assert model.graph.opset_imports[""] == 17
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    np.testing.assert_allclose(run(model, feeds), before, rtol=tolerance, atol=tolerance)


def test_gelu_stays_whole_at_20() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Gelu (x) }")
    lower_opset(model, 20)
    assert op_types(model) == ["Gelu"]


def test_an_operator_without_an_older_form_is_refused() -> None:
    model = parse("""g (float[1,1,2,4] x) => (float[1,1,2,4] y) { y = Attention (x, x, x) }""")
    with pytest.raises(GraphError, match="opset 17 has no form of Attention"):
        lower_opset(model, 17)


@pytest.mark.parametrize(
    ("x", "z", "is_known"),
    [("float", "int8", True), ("float16", "int8", False), ("float", "float8e4m3fn", False)],
)
def test_quantisation_is_known_at_17_with_fp32_scales_and_integers(x, z, is_known) -> None:
    half = "0.5" if x == "float" else "14336"
    model = parse(f"""
        g ({x}[b,6] x) => ({x}[b,6] y) <{x} s = {{{half}}}, {z} z = {{0}}>
        {{ q = QuantizeLinear (x, s, z)  y = DequantizeLinear (q, s, z) }}""")
    if is_known:
        feeds = random_feeds(model)
        before = run(model, feeds)
        lower_opset(model, 17)
        np.testing.assert_array_equal(run(model, feeds), before)
    else:
        with pytest.raises(GraphError, match=r"opset 17 has no form of .*QuantizeLinear"):
            lower_opset(model, 17)


def test_raising_converts_older_graphs_and_leaves_newer_ones() -> None:
    model = parse(
        "g (float[b,6] x) => (float[b,1] y) { y = ReduceMean <axes = [1]> (x) }", opset=17
    )
    feeds = random_feeds(model)
    raised = raise_opset(model)
    assert raised.graph.opset_imports[""] == 23
    np.testing.assert_array_equal(run(raised, feeds), run(model, feeds))
    assert raise_opset(raised) is raised


def lifted(text: str) -> ir.Model:
    model = parse(text)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model
