"""The packed projection is recognised, and a near miss is not."""

import pytest

from msn_export.graph.cls_only import find_packed
from tests.builders.graphs import parse

ADDITION = "a = Add (m, bias)"
TRANSPOSE = "t = Transpose <perm = [0, 2, 1, 3]> (h)"


def body(addition: str = ADDITION, transpose: str = TRANSPOSE, projected: str = "a") -> str:
    return f"""
    g (float[b,5,8] x) => (float[b,2,5,4] q, float[b,2,5,4] k, float[b,2,5,4] v)
    <float[8,24] w = {{{", ".join("1" * 192)}}}, float[24] bias = {{{", ".join("1" * 24)}}},
     int64[4] apart = {{0, 5, 6, 4}}>
    {{
        m = MatMul (x, w)
        {addition}
        h = Reshape ({projected}, apart)
        {transpose}
        q, k, v = Split <axis = 1, num_outputs = 3> (t)
    }}"""


def split_of(text: str):
    model = parse(text)
    return next(node for node in model.graph if node.op_type == "Split")


def test_weight_bias_and_input_are_found() -> None:
    packed = find_packed(split_of(body()))
    assert packed is not None
    assert (packed.x.name, packed.weight.name) == ("x", "w")
    assert packed.bias is not None
    assert packed.bias.name == "bias"


def test_a_projection_without_bias_is_found() -> None:
    packed = find_packed(split_of(body("", projected="m")))
    assert packed is not None
    assert packed.bias is None


NEAR_MISSES = {
    "multiplied, not added": body("a = Mul (m, bias)"),
    "transposed twice": body(transpose="u = Transpose <perm = [0, 2, 1, 3]> (h)  t = Identity (u)"),
    "read elsewhere": body("a = Add (m, bias)  z = Neg (a)"),
}


@pytest.mark.parametrize("text", NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_a_near_miss_is_none(text) -> None:
    assert find_packed(split_of(text)) is None


def test_nothing_is_none() -> None:
    assert find_packed(None) is None
