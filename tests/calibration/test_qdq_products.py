"""Projections are found by what they do in a graph; one that is no ViT is told what it lacks."""

import numpy as np
import onnx_ir as ir
import pytest

from msn_export.calibration.qdq import (
    Projection,
    Role,
    find_by_weight,
    find_cores,
    find_projections,
)
from msn_export.errors import GraphError
from tests.builders.calibrated_graphs import PACKINGS, block, vit
from tests.builders.graphs import parse


def roles(model) -> list[tuple[str, int | None]]:
    return [(str(p.role), p.block) for p in find_projections(model)]


def test_each_block_has_its_four_and_the_patches_theirs(tmp_path) -> None:
    assert roles(vit(tmp_path)) == [
        ("patch", None),
        *((role, index) for index in range(2) for role in ("qkv", "out", "fc1", "fc2")),
    ]


def test_names_are_those_of_node_input_and_weight(tmp_path) -> None:
    fc1 = next(p for p in find_projections(vit(tmp_path)) if p.role is Role.FC1)
    assert (fc1.node, fc1.x) == ("blocks.0.fc1.MatMul", "blocks.0.norm2_out")
    assert (fc1.weight, fc1.axis) == ("blocks.0.fc1.weight", 1)


@pytest.mark.parametrize("packing", PACKINGS)
def test_however_queries_keys_and_values_are_packed(packing) -> None:
    assert roles(block(packing)) == [("qkv", 0), ("out", 0), ("fc1", 0), ("fc2", 0)]


SEPARATE = """
g (float[b,5,4] x) => (float[b,5,3] y)
<float[4,4] wq, float[4,4] wk, float[4,4] wv, float[4,4] wo, float[8,4] up, float[8,4] down,
 float[3,4] head, int64[4] apart = {0, 5, 2, 2}, int64[3] together = {0, 5, 4},
 int64[2] flat = {-1, 4}, int64[2] flat8 = {-1, 8}, int64[3] three = {-1, 5, 3}>
{
    pq = MatMul (x, wq)
    pk = MatMul (x, wk)
    pv = MatMul (x, wv)
    hq = Reshape (pq, apart)
    hk = Reshape (pk, apart)
    hv = Reshape (pv, apart)
    q = Transpose <perm = [0, 2, 1, 3]> (hq)
    k = Transpose <perm = [0, 2, 1, 3]> (hk)
    v = Transpose <perm = [0, 2, 1, 3]> (hv)
    o = Attention (q, k, v)
    back = Transpose <perm = [0, 2, 1, 3]> (o)
    joined = Reshape (back, together)
    out = MatMul (joined, wo)
    rows = Reshape (out, flat)
    wide = Gemm <transB = 1> (rows, up)
    bent = Relu (wide)
    narrow = Gemm <transB = 0> (bent, down)
    told = Gemm <transB = 1> (narrow, head)
    y = Reshape (told, three)
}
"""


def separate():
    """Parse it with its weights as initializers: sizes alone matter."""
    text, weights = SEPARATE, {}
    for name, shape in {"wq": "4,4", "wk": "4,4", "wv": "4,4", "wo": "4,4", "up": "8,4",
                        "down": "8,4", "head": "3,4"}.items():  # fmt: skip
        count = eval(shape.replace(",", "*"))  # noqa: S307
        weights[name] = f"float[{shape}] {name} = {{{', '.join(['1.0'] * count)}}}"
        text = text.replace(f"float[{shape}] {name}", weights[name])
    return parse(text)


def test_separate_projections_a_classifier_and_transposed_gemms_are_known() -> None:
    found = find_projections(separate())
    assert [(str(p.role), p.block, p.axis) for p in found] == [
        ("qkv", 0, 1), ("qkv", 0, 1), ("qkv", 0, 1), ("out", 0, 1),
        ("fc1", 0, 0), ("fc2", 0, 1), ("head", None, 0),
    ]  # fmt: skip


def test_a_graph_without_attention_is_no_vit() -> None:
    model = parse("g (float[b,4] x) => (float[b,4] y) { y = Relu (x) }")
    with pytest.raises(GraphError, match="the graph has no attention core; expected a ViT"):
        find_projections(model)


def test_queries_that_come_from_nowhere_are_named() -> None:
    model = parse("""
        g (float[b,2,5,4] q, float[b,2,5,4] k, float[b,2,5,4] v) => (float[b,2,5,4] y) {
            y = Attention (q, k, v)
        }""")
    with pytest.raises(
        GraphError,
        match=r"queries, keys and values of block 0 \('y'\) come from no product with a constant "
        "weight; expected a projection",
    ):
        find_projections(model)


def test_a_block_that_lacks_a_projection_is_named() -> None:
    model = block("thirds")
    fc2 = next(node for node in model.graph if node.outputs[0].name == "y")
    fc2.replace_input_with(1, fc2.inputs[0])  # no constant weight any more
    with pytest.raises(
        GraphError,
        match=r"block 0 has 2 products with a constant weight after its attention \('MatMul12', '"
        r"MatMul14'\); expected output projection, fc1 and fc2",
    ):
        find_projections(model)


def test_a_middle_block_with_one_more_is_named(tmp_path) -> None:
    model = vit(tmp_path)
    gelu = next(node for node in model.graph if node.name == "blocks.0.gelu")
    weight = model.graph.initializers["blocks.1.attn.proj.weight"]
    other = next(node for node in model.graph if node.name == "blocks.0.norm2").outputs[0]
    extra = type(gelu)("", "MatMul", [other, weight], name="extra")
    model.graph.insert_before(gelu, extra)
    with pytest.raises(GraphError, match=r"block 0 has 4 products .*'extra'.*; expected output pr"):
        find_projections(model)


def products(weights: dict[str, np.ndarray]) -> tuple[ir.Model, tuple[Projection, ...]]:
    """A graph with one product for each weight, and what is known of them."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 24]))
    held = [ir.Value(name=f"{n}.w", const_value=ir.tensor(w)) for n, w in weights.items()]
    nodes = [ir.node("MatMul", [x, w], name=n) for n, w in zip(weights, held, strict=True)]
    for value in held:
        value.shape = value.const_value.shape
    graph = ir.Graph([x], [n.outputs[0] for n in nodes], nodes=nodes, initializers=held)
    roles = {"proj": Role.OUT, "fc1": Role.FC1}
    known = tuple(Projection(roles.get(n, Role.QKV), 0, n, "x", f"{n}.w", 1) for n in weights)
    return ir.Model(graph, ir_version=11), known


def test_the_products_of_another_graph_are_found_by_their_weights() -> None:
    rng = np.random.default_rng(0)
    sizes = {"qkv": (24, 72), "proj": (24, 24), "fc1": (24, 24)}
    weights = {n: rng.standard_normal(size).astype(np.float32) for n, size in sizes.items()}
    rounded = {n: np.rint(w * rng.choice([8, 16, 32], (24, 1))) for n, w in weights.items()}
    parts = np.split(rounded.pop("qkv"), 3, axis=1)
    model, known = products(weights)
    other, others = products({**dict(zip("qkv", parts, strict=True)), **rounded})

    pairs = find_by_weight(known, model, other, {"q", "k", "v", "proj", "fc1"})
    assert [own.node for own, _ in pairs] == ["qkv", "proj", "fc1"]
    assert [found.node for _, found in pairs][1:] == ["proj", "fc1"]
    assert pairs[0][1].node in {"q", "k", "v"}
    assert all((f.role, f.block) == (own.role, own.block) for own, f in pairs)
    back = find_by_weight(others, other, model, {"qkv", "proj"})
    assert [(own.node, found.node) for own, found in back] == [
        ("q", "qkv"), ("k", "qkv"), ("v", "qkv"), ("proj", "proj"),
    ]  # fmt: skip


def test_a_product_with_a_weight_of_its_own_is_named() -> None:
    rng = np.random.default_rng(0)
    weights = {"fc1": rng.standard_normal((24, 24)), "proj": rng.standard_normal((24, 24))}
    model, known = products(weights)
    other, _ = products({**weights, "fc1": rng.standard_normal((24, 24))})
    assert len(find_by_weight(known, model, other, {"proj"})) == 1
    with pytest.raises(GraphError, match="product 'fc1' of the candidate has the weight of none"):
        find_by_weight(known, model, other, {"fc1", "proj"})


def test_cores_come_in_the_order_of_the_graph(tmp_path) -> None:
    names = [core.node.name for core in find_cores(vit(tmp_path))]
    assert names == ["blocks.0.attn.Attention", "blocks.1.attn.Attention"]
