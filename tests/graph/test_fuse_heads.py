"""A 3-D Attention becomes the 4-D one that compiles best, and computes the same."""

import numpy as np
import pytest

from msn_export.graph.fuse import attention_3d_to_4d
from tests.builders.graphs import op_types, parse, random_feeds, run

SEPARATE = """
g (float[b,5,8] q, float[b,7,8] k, float[b,7,8] v) => (float[b,5,8] y)
{ y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) }
"""
PACKED = """
g (float[b,5,24] x) => (float[b,5,8] y)
{
    q, k, v = Split <axis = -1, num_outputs = 3> (x)
    y = Attention <q_num_heads = 2, kv_num_heads = 2, scale = 0.25> (q, k, v)
}
"""
APART = ["Reshape", "Transpose"]


@pytest.mark.parametrize(
    ("text", "ops"),
    [
        (SEPARATE, [*APART * 3, "Attention", "Transpose", "Reshape"]),
        # the projection is laid out once, not three times
        (PACKED, [*APART, "Split", "Attention", "Transpose", "Reshape"]),
    ],
    ids=["separate", "packed"],
)
def test_heads_are_set_apart_and_the_numbers_stay(text, ops) -> None:
    model = parse(text)
    feeds = random_feeds(model)
    before = run(model, feeds)
    attention_3d_to_4d(model)
    assert op_types(model) == ops
    np.testing.assert_allclose(run(model, feeds), before, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "text",
    [
        # grouped queries: two query heads share one of keys
        """g (float[b,5,8] q, float[b,5,4] k, float[b,5,4] v) => (float[b,5,8] y)
           { y = Attention <q_num_heads = 2, kv_num_heads = 1> (q, k, v) }""",
        # how many tokens is not known
        """g (float[b,n,8] q, float[b,n,8] k, float[b,n,8] v) => (float[b,n,8] y)
           { y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) }""",
        "g (float[b,2,5,4] q) => (float[b,2,5,4] y) { y = Attention (q, q, q) }",
        # keys and values come out too, which the 4-D form would give in another shape
        """g (float[b,5,8] q, float[b,7,8] k, float[b,7,8] v) => (float[b,5,8] y, float[b,2,7,4] pk)
           { y, pk, pv = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, v) }""",
    ],
    ids=["grouped", "dynamic", "4-D", "with a cache"],
)
def test_what_cannot_be_set_apart_is_left(text) -> None:
    model = parse(text)
    attention_3d_to_4d(model)
    assert op_types(model) == ["Attention"]
