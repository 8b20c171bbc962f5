"""An output that reads one token needs one token of the last block; the numbers stay."""

import numpy as np
import pytest

from msn_export.graph.cls_only import narrow_to_first_token
from msn_export.graph.fuse import fuse_attention
from msn_export.graph.summary import macs
from msn_export.graph.torch_reference import trace
from msn_export.models.checkpoint import load_checkpoint
from msn_export.preprocessing import preset
from msn_export.spec import AttentionForm, BatchRange, Head, ImageSize, InputFormat
from tests.builders.checkpoints import hugging_face
from tests.builders.graphs import op_types, parse, random_feeds, run

PICK = "zero = Constant <value = int64 {0}> ()  y = Gather <axis = 1> (t, zero)"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    hugging_face(folder, labels=3)
    return load_checkpoint(str(folder)).model


def traced(model, *heads: Head):
    return trace(
        model,
        heads=heads,
        input_format=InputFormat.FLOAT,
        batch=BatchRange(),
        preprocessing=preset("hf", ImageSize(32, 32)),
    )


@pytest.mark.parametrize("form", list(AttentionForm))
@pytest.mark.parametrize("heads", [(Head.CLS,), (Head.LOGITS,), (Head.CLS, Head.LOGITS)])
def test_the_last_block_for_cls_alone_gives_the_same_numbers(model, heads, form) -> None:
    graph = traced(model, *heads)
    feeds = random_feeds(graph)
    before, work = run(graph, feeds), macs(graph)
    products = op_types(graph).count("MatMul")
    assert narrow_to_first_token(graph) > 0
    assert op_types(graph).count("MatMul") == products + 1
    assert macs(graph) < 0.7 * work
    fuse_attention(graph, form, expected=2)
    # fewer rows, the same sums: another blocking of the same products
    np.testing.assert_allclose(run(graph, feeds), before, atol=1e-5)


def test_the_packed_projection_stays_where_that_takes_fewer_kernels(model) -> None:
    graph = traced(model, Head.CLS)
    feeds = random_feeds(graph)
    before, products = run(graph, feeds), op_types(graph).count("MatMul")
    assert narrow_to_first_token(graph, split_projection=False) > 0
    assert op_types(graph).count("MatMul") == products
    np.testing.assert_allclose(run(graph, feeds), before, atol=1e-5)


@pytest.mark.parametrize("heads", [(Head.TOKENS,), (Head.MEAN,), (Head.CLS, Head.MEAN)])
def test_an_output_that_reads_all_tokens_keeps_them(model, heads) -> None:
    graph = traced(model, *heads)
    nodes = op_types(graph)
    assert narrow_to_first_token(graph) == 0
    assert op_types(graph) == nodes


def test_keys_and_values_are_still_computed_for_every_token(model) -> None:
    graph = traced(model, Head.CLS)
    narrow_to_first_token(graph)
    attention = [node for node in graph.graph if node.op_type == "Attention"][-1]
    sizes = [list(value.shape)[2] for value in attention.inputs]
    assert sizes == [1, 17, 17]


def test_rowwise_operators_pass_the_row_and_broadcast_operands_stay() -> None:
    model = parse(f"""
        g (float[b,5,4] x) => (float[b,4] y)
        <float[4] bias = {{1, 2, 3, 4}}, float[1,5,4] pos = {{{", ".join(map(str, range(20)))}}}>
        {{ a = Add (x, bias)  c = Add (a, pos)  t = Gelu (c)  {PICK} }}""")
    lift(model)
    feeds = random_feeds(model)
    before = run(model, feeds)
    assert narrow_to_first_token(model) == 3
    assert op_types(model).count("Slice") == 2  # x and pos; the bias has no tokens
    np.testing.assert_array_equal(run(model, feeds), before)


@pytest.mark.parametrize("axis", [-1, 2])
def test_a_norm_over_channels_passes_the_row_however_its_axis_is_counted(axis) -> None:
    model = parse(f"""
        g (float[b,5,4] x) => (float[b,4] y)
        <float[4] gain = {{1, 2, 3, 4}}, float[4] bias = {{4, 3, 2, 1}}>
        {{ t = LayerNormalization <axis = {axis}> (x, gain, bias)  {PICK} }}""")
    lift(model)
    feeds = random_feeds(model)
    before = run(model, feeds)
    assert narrow_to_first_token(model) == 1
    assert op_types(model)[0] == "Slice"
    np.testing.assert_array_equal(run(model, feeds), before)


MIXERS = {
    "a norm over tokens and channels": f"""
        gain = Constant <value = float[5, 4] {{{", ".join("1" * 20)}}}> ()
        t = LayerNormalization <axis = 1> (x, gain)""",
    "softmax over tokens": "t = Softmax <axis = 1> (x)",
    "a value read elsewhere": "t = Relu (x)  z = ReduceSum <keepdims = 0> (t)",
}


@pytest.mark.parametrize("body", MIXERS.values(), ids=MIXERS.keys())
def test_what_mixes_tokens_or_is_read_whole_is_left_alone(body) -> None:
    more = ", float z" if " z = " in body else ""
    model = parse(f"g (float[b,5,4] x) => (float[b,4] y{more}) {{ {body}  {PICK} }}")
    lift(model)
    assert narrow_to_first_token(model) == 0


@pytest.mark.parametrize(
    ("axis", "sizes"), [("<axis = 2>", "b,5"), ("<axis = 0>", "5,4"), ("", "5,4")]
)
def test_what_reads_the_first_of_another_axis_reads_all_tokens(axis, sizes) -> None:
    model = parse(f"""
        g (float[b,5,4] x) => (float[{sizes}] y) <int64 zero = {{0}}>
        {{ t = Relu (x)  y = Gather {axis} (t, zero) }}""")
    assert narrow_to_first_token(model) == 0


def test_the_last_axis_holds_no_tokens() -> None:
    model = parse("""
        g (float[b,2] x) => (float[b] y) <int64 zero = {0}, float[2] gain = {1, 1}>
        { t = LayerNormalization <axis = -1> (x, gain)  y = Gather <axis = 1> (t, zero) }""")
    assert narrow_to_first_token(model) == 0


def lift(model) -> None:
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
