"""Q/DQ stands where 8-bit kernels come of it, with scales its graph can hold, and nowhere else."""

import numpy as np
import onnx_ir as ir
import pytest

from msn_export.calibration.plan import Plan
from msn_export.calibration.qdq import (
    INT8_ATTENTION_TOKENS,
    Projection,
    Role,
    find_operands,
    find_parts,
    find_projections,
    quantise_projections,
    quantise_results,
    quantise_weights,
    require_fusable,
)
from msn_export.calibration.ranges import Histogram, Observer
from msn_export.errors import GraphError
from msn_export.graph.precision import (
    products_of_quantised_weights,
    quantised_dtype,
    quantised_products,
)
from msn_export.spec import Dtype
from tests.builders.calibrated_graphs import feeds, planned, scheme, vit
from tests.builders.graphs import op_types, parse, run

RANGE = 6.0


def quantised(plan: Plan, kept=()) -> ir.Model:
    """Quantise with one range for all."""
    histogram = Histogram()
    histogram.add(np.array([RANGE], np.float32))
    return plan.measured(dict.fromkeys(plan.watched, histogram), Observer.MAX).quantised(kept)


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def dequantised(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    assert node.op_type == "DequantizeLinear"
    return node


FORMATS = pytest.mark.parametrize("dtype", [Dtype.INT8, Dtype.FP8])


@FORMATS
def test_a_product_reads_a_pair_per_tensor_and_a_weight_per_channel(tmp_path, dtype) -> None:
    plan = planned(tmp_path, dtype)
    model = quantised(plan)
    node = node_of(model, "blocks.0.fc1.MatMul")
    x, weight = (dequantised(value) for value in node.inputs)
    assert x.inputs[0].producer().op_type == "QuantizeLinear"
    form = plan.scheme.form
    assert x.inputs[1].const_value.numpy() >= RANGE / form.largest
    assert x.inputs[1].const_value.numpy() == np.float16(x.inputs[1].const_value.numpy())
    assert x.inputs[2].dtype == form.onnx
    assert not x.inputs[2].const_value.numpy().astype(np.float32).any()  # zero point 0
    held, scale = (value.const_value for value in weight.inputs[:2])
    assert (held.dtype, list(held.shape), list(scale.shape)) == (form.onnx, [32, 128], [128])
    assert weight.attributes["axis"].as_int() == 1
    assert quantised_dtype(model) is dtype


@FORMATS
def test_weights_are_held_to_half_a_step(tmp_path, dtype) -> None:
    plan = planned(tmp_path, dtype)
    weight = dequantised(node_of(quantised(plan), "blocks.1.fc2.MatMul").inputs[1])
    held, scale = (value.const_value.numpy().astype(np.float32) for value in weight.inputs[:2])
    wanted = plan.model.graph.initializers["blocks.1.fc2.weight"].const_value.numpy()
    # int8 has steps of one scale, E4M3 four-bit mantissas: 2**-4 of the value
    step = scale if dtype is Dtype.INT8 else np.maximum(np.abs(wanted) / 8, scale * 2**-9)
    assert (np.abs(held * scale - wanted) <= step / 2 * 1.001).all()


@pytest.mark.parametrize(
    ("dtype", "base", "largest"),
    [
        (Dtype.INT8, Dtype.FP16, 127),
        (Dtype.INT8, Dtype.BF16, 127),
        (Dtype.INT8, Dtype.FP32, 64),  # for onnxruntime, whose sums of two may saturate
        (Dtype.FP8, Dtype.FP16, 448),
    ],
)
def test_weights_use_the_whole_range_wherever_no_sum_saturates(
    tmp_path, dtype, base, largest
) -> None:
    plan = Plan.of(vit(tmp_path), scheme(dtype, base), attention=False)
    ranges = dict.fromkeys(plan.watched, RANGE)
    quantise_projections(plan.model, plan.projections, ranges, plan.scheme)
    weight = dequantised(node_of(plan.model, "blocks.0.fc1.MatMul").inputs[1])
    held = weight.inputs[0].const_value.numpy().astype(np.float32)
    assert np.abs(held).max() == largest


@FORMATS
def test_the_blocks_products_are_quantised_and_nothing_else(tmp_path, dtype) -> None:
    model = quantised(planned(tmp_path, dtype))
    assert len(quantised_products(model)) == 8
    assert {name.rsplit(".", 2)[-2] for name in quantised_products(model)} == {
        "qkv", "proj", "fc1", "fc2"
    }  # fmt: skip
    types = op_types(model)
    assert (types.count("QuantizeLinear"), types.count("DequantizeLinear")) == (8, 16)
    assert (types.count("Attention"), types.count("Conv")) == (2, 1)
    assert node_of(model, "patch.Conv").inputs[1].is_initializer()


def test_weights_alone_are_quantised_where_that_is_asked_for(tmp_path) -> None:
    plan, whole = planned(tmp_path), quantised(planned(tmp_path))
    quantise_weights(plan.model, plan.projections, plan.scheme)
    types = op_types(plan.model)
    assert (types.count("QuantizeLinear"), types.count("DequantizeLinear")) == (0, 8)
    assert quantised_products(plan.model) == ()
    assert products_of_quantised_weights(plan.model) == quantised_products(whole)
    for name in quantised_products(whole):
        alone, beside = (dequantised(node_of(m, name).inputs[1]) for m in (plan.model, whole))
        for one, other in zip(alone.inputs, beside.inputs, strict=True):
            np.testing.assert_array_equal(one.const_value.numpy(), other.const_value.numpy())


def test_a_result_is_quantised_for_all_that_reads_it(tmp_path) -> None:
    model = vit(tmp_path)
    value = node_of(model, "blocks.0.fc2.MatMul").outputs[0]
    name, readers = value.name, [use.node for use in value.uses()]
    output = model.graph.outputs[0].name
    quantise_results(model, [name, output], {name: RANGE, output: RANGE}, scheme())
    assert op_types(model).count("QuantizeLinear") == 2
    (rounded,) = (use.node for use in value.uses())
    assert rounded.op_type == "QuantizeLinear"
    (pair,) = (use.node for use in rounded.outputs[0].uses())
    assert [use.node for use in pair.outputs[0].uses()] == readers
    assert model.graph.outputs[0].name == output
    assert model.graph.outputs[0].producer().op_type == "DequantizeLinear"


def test_the_parts_of_a_packed_product_are_found_by_their_weights(tmp_path) -> None:
    model = vit(tmp_path)
    own = next(p for p in find_projections(model) if p.role is Role.QKV)
    weight = model.graph.initializers[own.weight].const_value.numpy()
    parts = dict(zip("qkv", np.split(weight, 3, axis=own.axis), strict=True))
    held = ", ".join(
        f"float[32,32] w{name} = {{{', '.join(map(str, 2 * part.ravel()))}}}"
        for name, part in parts.items()
    )
    other = parse(f"""
    g (float[b,5,32] x) => (float[b,5,32] y) <{held}>
    {{ k = MatMul (x, wk)  v = MatMul (x, wv)  q = MatMul (x, wq)  y = Sum (k, v, q) }}""")
    names = {node.outputs[0].name: node.name for node in other.graph}
    wanted = tuple(names[name] for name in "qkv")
    assert find_parts(own, model, other, set(wanted)) == wanted
    assert find_parts(own, model, model, {own.node}) == (own.node,)
    with pytest.raises(GraphError, match=f"{own.node!r} of the reference has the weight of none"):
        find_parts(own, model, other, {names["k"]})


def test_blocks_that_are_kept_have_none(tmp_path) -> None:
    names = quantised_products(quantised(planned(tmp_path), kept=[0]))
    assert len(names) == 4
    assert all(name.startswith("blocks.1.") for name in names)


SEPARATE = """
g (float[b,5,4] x) => (float[b,5,12] y)
<float[4,4] w0 = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16},
 float[4,4] w1 = {1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1},
 float[4,4] w2 = {0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0}>
{
    a = MatMul (x, w0)
    b2 = MatMul (x, w1)
    c = MatMul (x, w2)
    y = Concat <axis = 2> (a, b2, c)
}
"""


@pytest.mark.parametrize("base", [Dtype.FP16, Dtype.FP32])
def test_projections_of_one_value_become_one_product(base) -> None:
    model = parse(SEPARATE)
    found = [Projection(Role.QKV, 0, f"MatMul{i}", "x", f"w{i}", 1) for i in range(3)]
    given = {"x": np.random.default_rng(0).uniform(-1, 1, (2, 5, 4)).astype(np.float32)}
    before = run(model, given)
    quantise_projections(model, found, {"x": 1.0}, scheme(Dtype.INT8, base))
    types = op_types(model)
    assert (types.count("QuantizeLinear"), types.count("MatMul"), types.count("Split")) == (1, 1, 1)
    got = run(model, given)
    # a step of x is 1/127, and 16 + 12 + 8 + 4 of w0's largest column add up half of it each,
    # with half a step of the weights (16/128, or 16/254) times |x| <= 1 four times over
    assert np.abs(got - before).max() <= 40 / 254 + 4 * 16 / 128
    assert not got[..., 8:].any()  # a weight that is zero stays zero, and nothing is NaN


def test_two_classifiers_of_one_value_keep_their_names_and_share_its_pair() -> None:
    text = SEPARATE.replace("(float[b,5,12] y)", "(float[b,5,4] a, float[b,5,4] c)")
    model = parse(text.replace("    y = Concat <axis = 2> (a, b2, c)\n", ""))
    found = [Projection(Role.HEAD, None, f"MatMul{i}", "x", f"w{i}", 1) for i in (0, 2)]
    quantise_projections(model, found, {"x": 1.0}, scheme())
    types = op_types(model)
    assert (types.count("QuantizeLinear"), types.count("Split")) == (1, 0)
    assert [value.name for value in model.graph.outputs] == ["a", "c"]


def test_a_range_of_zero_gives_a_graph_that_runs(tmp_path) -> None:
    plan = planned(tmp_path)
    model = plan.measured({name: Histogram() for name in plan.watched}, Observer.MSE).quantised()
    assert np.isfinite(run(model, feeds())).all()


@FORMATS
def test_it_computes_nearly_the_same(tmp_path, dtype) -> None:
    plan = planned(tmp_path, dtype)
    want, got = run(plan.model, feeds()), run(quantised(plan), feeds())
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    # 8 bits of a range that is twice the values'; measured 0.02 and 0.04
    assert 1e-4 < error < 0.08


@FORMATS
def test_attention_is_quantised_with_all_four_operands(tmp_path, dtype) -> None:
    model = quantised(planned(tmp_path, dtype, attention=True))
    types = op_types(model)
    assert types.count("Attention") == 0
    assert types.count("QuantizeLinear") == 8 + 8
    for node in model.graph:
        if node.op_type == "Softmax":
            scores = node.inputs[0].producer()
            assert [dequantised(value) for value in scores.inputs]
    if dtype is Dtype.FP8:  # the probabilities' range is 1, whatever the images
        p = next(n for n in model.graph if n.op_type == "Softmax").outputs[0].uses()[0].node
        assert p.inputs[1].const_value.numpy() == np.float16(1 / 448) or (
            0 <= p.inputs[1].const_value.numpy() - 1 / 448 < 2e-6
        )


def test_a_kept_block_keeps_the_attention_operator(tmp_path) -> None:
    types = op_types(quantised(planned(tmp_path, attention=True), kept=[1]))
    assert (types.count("Attention"), types.count("Softmax")) == (1, 1)


def test_operands_are_named(tmp_path) -> None:
    plan = planned(tmp_path, attention=True)
    first = find_operands(plan.model)[0]
    assert (first.block, first.v) == (0, "blocks.0.attn.Squeeze.2_out")
    values = {value.name for node in plan.model.graph for value in node.outputs}
    assert {first.q, first.k, first.p, first.v} <= values


def test_int8_attention_is_refused_above_512_tokens_and_fp8_is_not() -> None:
    require_fusable(INT8_ATTENTION_TOKENS, scheme())
    require_fusable(3137, scheme(Dtype.FP8))
    with pytest.raises(
        GraphError,
        match=r"--quantize-attention: TensorRT has fused int8 attention up to 512 tokens and this "
        r"graph has 513; leave attention in fp16, or use --fp8",
    ):
        require_fusable(513, scheme())


def test_a_weight_that_is_not_finite_is_named(tmp_path) -> None:
    plan = planned(tmp_path)
    value = plan.model.graph.initializers["blocks.0.fc1.weight"]
    array = value.const_value.numpy().copy()
    array[0, 0] = np.nan
    value.const_value = ir.tensor(array, name=value.name)
    with pytest.raises(GraphError, match=r"weight 'blocks\.0\.fc1\.weight' is not finite; export "):
        quantised(plan)
