"""Multiply-adds are counted from shapes."""

import pytest

from msn_export.graph.summary import macs
from tests.builders.graphs import parse

GRAPHS = {
    # [2, 3, 4] x [4, 5]
    "product": ("g (float[2,3,4] x, float[4,5] w) => (float[2,3,5] y) { y = MatMul (x, w) }", 120),
    "dynamic batch": (
        "g (float[b,3,4] x, float[4,5] w) => (float[b,3,5] y) { y = MatMul (x, w) }",
        60,
    ),
    # 7 outputs of 2 x 2 positions, each over 3 channels of 2 x 2
    "convolution": (
        "g (float[1,3,4,4] x, float[7,3,2,2] w) => (float[1,7,2,2] y)"
        " { y = Conv <strides = [2, 2]> (x, w) }",
        7 * 4 * 12,
    ),
    # 2 heads, 1 query, 5 keys of size 4: scores and sums
    "attention": (
        "g (float[1,2,1,4] q, float[1,2,5,4] k) => (float[1,2,1,4] y) { y = Attention (q, k, k) }",
        2 * 2 * 5 * 4,
    ),
    "packed attention": (
        "g (float[1,3,8] q, float[1,5,8] k) => (float[1,3,8] y)"
        " { y = Attention <q_num_heads = 2, kv_num_heads = 2> (q, k, k) }",
        2 * 3 * 5 * 8,
    ),
    "transposed operand": (
        "g (float[4,3] x, float[4,5] w) => (float[3,5] y) { y = Gemm <transA = 1> (x, w) }",
        60,
    ),
    "nothing": ("g (float[8] x) => (float[8] y) { y = Relu (x) }", 0),
}


@pytest.mark.parametrize(("text", "expected"), GRAPHS.values(), ids=GRAPHS.keys())
def test_counts(text, expected) -> None:
    assert macs(parse(text)) == expected
