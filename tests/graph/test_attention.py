"""Every form an exporter writes an attention core in is found; near misses say what they lack."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from msn_export.errors import FusionError
from msn_export.graph.attention import AttentionCore, match
from msn_export.graph.fuse import fuse_attention
from msn_export.spec import AttentionForm
from tests.builders.graphs import op_types, parse, random_feeds, run

# b 2, h 2, n 5, d 4; each body computes y from q, k, v [b, h, n, d] or [b, n, h, d]
CORES = {
    "operator": "y = Attention (q, k, v)",
    "operator with a scale": "y = Attention <scale = 0.25> (q, k, v)",
    "operator with a mask of all true": f"""
        all = Constant <value = bool[1, 1, 5, 5] {{{", ".join("1" * 25)}}}> ()
        y = Attention (q, k, v, all)""",
    "scores scaled": """
        c = Constant <value = float {0.5}> ()
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul (q, kt)
        z = Mul (s, c)
        p = Softmax <axis = -1> (z)
        y = MatMul (p, v)""",
    "scores divided": """
        c = Constant <value = float {2.0}> ()
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul (q, kt)
        z = Div (s, c)
        p = Softmax <axis = 3> (z)
        y = MatMul (p, v)""",
    "q and k scaled": """
        c = Constant <value = float {0.7}> ()
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        qs = Mul (c, q)
        ks = Mul (kt, c)
        s = MatMul (qs, ks)
        p = Softmax <axis = -1> (s)
        y = MatMul (p, v)""",
    "k transposed by way of three axes": """
        merged = Constant <value = int64[3] {-1, 5, 4}> ()
        back = Constant <value = int64[4] {2, 2, 4, 5}> ()
        k3 = Reshape (k, merged)
        kt3 = Transpose <perm = [0, 2, 1]> (k3)
        kt = Reshape (kt3, back)
        s = MatMul (q, kt)
        p = Softmax <axis = -1> (s)
        y = MatMul (p, v)""",
    "zero mask and a guard against rows without tokens": """
        yes = Constant <value = bool[1, 1, 1, 5] {1, 1, 1, 1, 1}> ()
        zero = Constant <value = float {0.0}> ()
        low = Constant <value = float {-1000.0}> ()
        mask = Where (yes, zero, low)
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul (q, kt)
        m = Add (s, mask)
        p = Softmax <axis = -1> (m)
        bad = IsNaN (p)
        safe = Where (bad, zero, p)
        y = MatMul (safe, v)""",
    "a cast of the probabilities": """
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul (q, kt)
        p = Softmax <axis = -1> (s)
        same = Cast <to = 1> (p)
        y = MatMul (same, v)""",
}
SIGNATURE = "g (float[2,2,5,4] q, float[2,2,5,4] k, float[2,2,5,4] v) => (float[2,2,5,4] y) {"


def graph(body: str):
    model = parse(SIGNATURE + body + "}")
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


@pytest.mark.parametrize("body", CORES.values(), ids=CORES.keys())
@pytest.mark.parametrize("form", [AttentionForm.HEADS, AttentionForm.PLAIN])
def test_every_form_becomes_the_other_and_computes_the_same(body, form) -> None:
    model = graph(body)
    feeds = random_feeds(model)
    before = run(model, feeds)
    assert fuse_attention(model, form, expected=1) == 1
    # softmax in another order of operations: a few units in the last place
    np.testing.assert_allclose(run(model, feeds), before, rtol=1e-5, atol=1e-6)
    if form is AttentionForm.HEADS:
        assert op_types(model) == ["Attention"]
    else:
        assert op_types(model) == ["Transpose", "Mul", "Mul", "MatMul", "Softmax", "MatMul"]


def test_keys_from_tokens_first_are_transposed_once() -> None:
    model = parse("""
        g (float[2,2,5,4] q, float[2,5,2,4] k, float[2,2,5,4] v) => (float[2,2,5,4] y) {
            kt = Transpose <perm = [0, 2, 3, 1]> (k)
            s = MatMul (q, kt)
            p = Softmax <axis = -1> (s)
            y = MatMul (p, v)
        }""")
    feeds = random_feeds(model)
    before = run(model, feeds)
    fuse_attention(model, AttentionForm.HEADS)
    assert op_types(model) == ["Transpose", "Attention"]
    np.testing.assert_allclose(run(model, feeds), before, rtol=1e-5, atol=1e-6)


NEAR_MISSES = {
    "its is_causal is 1": "y = Attention <is_causal = 1> (q, k, v)",
    "its softcap is 2": "y = Attention <softcap = 2.0> (q, k, v)",
    "softmax runs over axis 2": """
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul (q, kt)
        p = Softmax <axis = 2> (s)
        y = MatMul (p, v)""",
    "are not a MatMul's": """
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul (q, kt)
        m = Add (s, s)
        p = Softmax <axis = -1> (m)
        y = MatMul (p, v)""",
    "are not a transposed tensor": """
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        z = Relu (kt)
        s = MatMul (q, z)
        p = Softmax <axis = -1> (s)
        y = MatMul (p, v)""",
    "are not multiplied with values once": """
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul (q, kt)
        p = Softmax <axis = -1> (s)
        o = MatMul (p, v)
        t = MatMul (p, o)
        y = Add (o, t)""",
    "is not known to let every token through": """
        some = Constant <value = bool[1, 1, 1, 5] {1, 1, 1, 1, 0}> ()
        y = Attention (q, k, v, some)""",
}


@pytest.mark.parametrize(("reason", "body"), NEAR_MISSES.items())
def test_a_near_miss_is_refused_by_name(reason, body) -> None:
    with pytest.raises(FusionError, match=f"fused 0 of 1 attention cores: .*{reason}"):
        fuse_attention(graph(body), AttentionForm.HEADS, expected=1)


@pytest.mark.parametrize("number", ["0.0", "inf", "-inf", "nan"])
@pytest.mark.parametrize("step", ["Div (s, c)", "Mul (s, c)", "Mul (c, s)"])
def test_scores_times_what_is_no_scale_are_no_core(number, step) -> None:
    """Fused, such a constant would become an attribute of which every kernel makes another NaN."""
    body = f"""
        c = Constant <value = float {{1.0}}> ()
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul (q, kt)
        z = {step}
        p = Softmax <axis = -1> (z)
        y = MatMul (p, v)"""
    model = graph(body)
    constant = next(v for v in model.graph.initializers.values() if v.const_value.size == 1)
    constant.const_value = ir.tensor(np.array(float(number), np.float32))
    with pytest.raises(FusionError, match=r"fused 0 of 1 attention cores: .* are not a MatMul's"):
        fuse_attention(model, AttentionForm.HEADS, expected=1)


@pytest.mark.parametrize("mask", ["Where (some, zero, low)", "Where (all, low, zero)", "Neg (low)"])
def test_a_mask_that_hides_a_token_belongs_to_no_core(mask) -> None:
    body = f"""
        some = Constant <value = bool[5] {{1, 1, 1, 1, 0}}> ()
        all = Constant <value = bool[5] {{1, 1, 1, 1, 1}}> ()
        zero = Constant <value = float {{0.0}}> ()
        low = Constant <value = float {{-1000.0}}> ()
        mask = {mask}
        kt = Transpose <perm = [0, 1, 3, 2]> (k)
        s = MatMul (q, kt)
        m = Add (s, mask)
        p = Softmax <axis = -1> (m)
        y = MatMul (p, v)"""
    with pytest.raises(FusionError, match=r"fused 0 of 1 attention cores: .* are not a MatMul's"):
        fuse_attention(graph(body), AttentionForm.HEADS, expected=1)


def test_too_few_cores_are_an_error() -> None:
    with pytest.raises(FusionError, match="fused 1 of 2 attention cores: there is no other"):
        fuse_attention(graph(CORES["operator"]), AttentionForm.HEADS, expected=2)


def test_a_graph_without_attention_is_an_error() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Relu (x) }")
    with pytest.raises(FusionError, match="has no Softmax and no Attention; expected a vision tr"):
        fuse_attention(model, AttentionForm.HEADS)


def test_the_operators_default_scale_is_one_over_root_d() -> None:
    model = graph(CORES["operator"])
    core = match(next(iter(model.graph)))
    assert isinstance(core, AttentionCore)
    assert core.scale == 0.5
