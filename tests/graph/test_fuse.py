"""The packed form drops every transposition around a packed projection."""

import numpy as np
import pytest

from msn_export.errors import FusionError
from msn_export.graph.fuse import fuse_attention
from msn_export.spec import AttentionForm
from tests.builders.graphs import op_types, parse, random_feeds, run

# dim 8 = 2 heads of 4; x holds q, k, v side by side
PACKED = """
g (float[b,5,24] x) => (float[b,5,8] y)
<int64[4] apart = {0, 5, 6, 4}, int64[3] together = {0, 5, 8}>
{
    heads = Reshape (x, apart)
    first = Transpose <perm = [0, 2, 1, 3]> (heads)
    q, k, v = Split <axis = 1, num_outputs = 3> (first)
    o = Attention (q, k, v)
    back = Transpose <perm = [0, 2, 1, 3]> (o)
    y = Reshape (back, together)
}
"""


def test_packed_form_is_one_split_and_one_attention() -> None:
    model = parse(PACKED)
    feeds = random_feeds(model)
    before = run(model, feeds)
    fuse_attention(model, AttentionForm.PACKED, expected=1)
    assert op_types(model) == ["Split", "Attention"]
    np.testing.assert_allclose(run(model, feeds), before, rtol=1e-6, atol=1e-7)
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_packed_form_refuses_separate_projections() -> None:
    model = parse("""
        g (float[b,2,5,4] q, float[b,2,5,4] k, float[b,2,5,4] v) => (float[b,2,5,4] y) {
            y = Attention (q, k, v)
        }""")
    with pytest.raises(FusionError, match="does not read one packed query-key-value projection"):
        fuse_attention(model, AttentionForm.PACKED)


def test_new_nodes_are_named_after_the_one_they_replace() -> None:
    model = parse(PACKED)
    next(node for node in model.graph if node.op_type == "Attention").name = "blocks.3.attn"
    fuse_attention(model, AttentionForm.PLAIN)
    added = [node.name for node in model.graph if (node.name or "").startswith("blocks.3.attn.")]
    assert added == [
        "blocks.3.attn.Transpose",
        "blocks.3.attn.Mul",
        "blocks.3.attn.Mul_2",
        "blocks.3.attn.MatMul",
        "blocks.3.attn.Softmax",
        "blocks.3.attn.MatMul_2",
    ]


@pytest.mark.parametrize("form", list(AttentionForm))
def test_every_form_is_written_from_every_other(form) -> None:
    feeds = random_feeds(parse(PACKED))
    wanted = run(parse(PACKED), feeds)
    for before in AttentionForm:
        model = parse(PACKED)
        fuse_attention(model, before)
        fuse_attention(model, form, expected=1)
        np.testing.assert_allclose(run(model, feeds), wanted, rtol=1e-5, atol=1e-6)


def test_plain_form_of_an_fp16_graph_stays_fp16() -> None:
    model = parse("""
        g (float16[b,2,5,4] q, float16[b,2,5,4] k, float16[b,2,5,4] v) => (float16[b,2,5,4] y) {
            y = Attention (q, k, v)
        }""")
    fuse_attention(model, AttentionForm.PLAIN, expected=1)
    assert {value.dtype.name for node in model.graph for value in node.outputs} == {"FLOAT16"}


def test_the_softmax_of_a_classifier_is_no_attention() -> None:
    model = parse("""
        g (float[b,2,5,4] q, float[b,2,5,4] k, float[b,2,5,4] v, float[b,3] logits)
            => (float[b,2,5,4] y, float[b,3] probabilities) {
            y = Attention (q, k, v)
            probabilities = Softmax (logits)
        }""")
    assert fuse_attention(model, AttentionForm.HEADS) == 1
    assert op_types(model) == ["Attention", "Softmax"]


def test_packed_form_refuses_tokens_that_are_split_instead_of_heads() -> None:
    model = parse("""
        g (float[b,15,8] x) => (float[b,5,8] y)
        <int64[4] apart = {0, 15, 2, 4}, int64[3] together = {0, 5, 8}> {
            heads = Reshape (x, apart)
            first = Transpose <perm = [0, 2, 1, 3]> (heads)
            q, k, v = Split <axis = 2, num_outputs = 3> (first)
            o = Attention (q, k, v)
            back = Transpose <perm = [0, 2, 1, 3]> (o)
            y = Reshape (back, together)
        }""")
    with pytest.raises(FusionError, match="does not read one packed query-key-value projection"):
        fuse_attention(model, AttentionForm.PACKED)
