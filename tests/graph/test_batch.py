"""Images of a batch are shown to stay apart by what every operator does, or a node is named."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from msn_export.graph import io
from msn_export.graph.batch import find_mixing
from msn_export.spec import Dtype, Target
from tests.builders.checkpoints import hugging_face, processor
from tests.builders.exports import export

HEADS = ["--head", "cls", "--head", "tokens", "--head", "mean", "--head", "features"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    hugging_face(folder)
    processor(folder, size={"height": 32, "width": 32})
    return folder


@pytest.mark.parametrize("target", [one.value for one in Target])
@pytest.mark.parametrize("input_format", ["float", "uint8"])
def test_our_graphs_keep_images_apart(checkpoint, target, input_format, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    options = ["--target", target, "--input", input_format, "--no-check"]
    result = export(checkpoint, path, *HEADS, *options)
    assert result.exit_code == 0, result.output
    assert find_mixing(io.load(path)) == ""


@pytest.mark.parametrize("dtype", [Dtype.FP16, Dtype.BF16])
def test_typed_graphs_do_too(checkpoint, dtype, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    assert export(checkpoint, path, "--dtype", dtype, "--no-check").exit_code == 0
    assert find_mixing(io.load(path)) == ""


def model(body: str, *, x: str = "float[b, 6, 4]", y: str = "float[b, n, m]") -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g ({x} x) => ({y} y)
    <float one = {{1}}, float[4] row = {{1,2,3,4}}, float[4, 4] square = {{1,0,0,0,0,1,0,0,0,0,1,0,0,0,0,1}},
     float[8, 1, 1] images = {{1,2,3,4,5,6,7,8}}, int64[1] first = {{0}}, int64[1] second = {{1}},
     int64[3] folded = {{-1, 3, 8}}, int64[3] joined = {{-1, 12, 4}}, int64[3] fixed = {{8, 6, 4}},
     int64 last = {{0}}>
    {{ {body} }}"""  # noqa: E501  one line a kind of constant
    found = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    io.infer_shapes(found)
    return found


@pytest.mark.parametrize(
    "body",
    [
        "y = Add (x, row)",
        "y = MatMul (x, square)",
        "t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (x, t)",
        "y = Reshape (x, folded)",
        "y = Softmax <axis = -1> (x)",
        "y = LayerNormalization <axis = 1> (x, row)",
        "y = ReduceMean (x, second)",
        "y = Gather <axis = 1> (x, second)",
        "a, c = Split <axis = 1, num_outputs = 2> (x) y = Concat <axis = 2> (c, a)",
        "t = ReduceMean <keepdims = 0> (x, second) y = Unsqueeze (t, second)",
    ],
)
def test_what_stays_in_its_row_keeps_images_apart(body) -> None:
    assert find_mixing(model(body)) == ""


@pytest.mark.parametrize(
    ("body", "culprit"),
    [
        ("t = ReduceMean (x, first) y = Sub (x, t)", "ReduceMean"),
        ("t = ReduceMax (x) y = Sub (x, t)", "ReduceMax"),  # over all axes
        ("y = Add (x, images)", "Add"),  # another number for each place in the batch
        ("t = Transpose <perm = [1, 0, 2]> (x) y = Relu (t)", "Transpose"),
        ("t = Transpose (x) y = Relu (t)", "Transpose"),
        ("y = Reshape (x, joined)", "Reshape"),  # two images in one row
        ("y = Reshape (x, fixed)", "Reshape"),
        ("y = Softmax <axis = 0> (x)", "Softmax"),
        ("y = LayerNormalization <axis = 0> (x, one)", "LayerNormalization"),
        ("y = Gather (x, second)", "Gather"),
        ("t = Gather <axis = 1> (x, last) y = MatMul (x, t)", "MatMul"),
        ("a, c = Split <num_outputs = 2> (x) y = Concat <axis = 1> (a, c)", "Split"),
        ("y = Concat <axis = 0> (x, x)", "Concat"),
        ("y = Slice (x, first, second)", "Slice"),  # along the axes from the first on
        ("y = CumSum (x, last)", "CumSum"),
        ("t = Shape <end = 1> (x) u = Cast <to = 1> (t) y = Mul (x, u)", "Shape"),
        ("q, s, z = DynamicQuantizeLinear (x) y = DequantizeLinear (q, s, z)", "DynamicQuantize"),
        ("y = Where (true_, x, x)", "Where"),
    ],
)  # fmt: skip
def test_what_may_mix_images_is_named(body, culprit) -> None:
    if "true_" in body:  # a condition for each place in the batch
        body = body.replace("true_", "c")
        body = f"c = Greater (images, one) {body}"
    assert find_mixing(model(body)).startswith(culprit)


def test_a_constant_output_does_not_depend_on_the_images() -> None:
    assert "does not depend on the images" in find_mixing(model("y = Add (images, one)"))


@pytest.mark.parametrize(
    ("body", "culprit"),
    [
        ("y = Relu (x)", ""),
        ("y = MatMul (x, square)", ""),
        ("y = ReduceMean <keepdims = 1> (x, first)", "ReduceMean"),
        ("y = Add (x, images)", "Add"),  # a constant with a row for each
        ("y = Reshape (x, fixed)", "Reshape"),  # by sizes alone it may be any axis
    ],
)
def test_a_fixed_batch_is_looked_at_as_an_open_one(body, culprit) -> None:
    found = model(body, x="float[8, 6, 4]")
    assert find_mixing(found).split(" ")[0] == culprit
    assert [*found.graph.inputs[0].shape] == [8, 6, 4]


def test_a_body_may_read_what_its_node_does_not_list() -> None:
    branches = "then_branch = t () => (float[b, 6, 4] p) { p = CumSum (x, last) }"
    other = "else_branch = e () => (float[b, 6, 4] q) { q = Relu (x) }"
    condition = "c = Cast <to = 9> (last)"
    body = f"{condition} i = If <{branches}, {other}> (c) y = Add (x, i)"
    assert find_mixing(model(body)).startswith("If")


def test_an_operator_of_another_domain_is_named() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
    g (float[b, 4] x) => (float[b, 4] y) { y = com.microsoft.Gelu (x) }"""
    found = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    assert find_mixing(found).startswith("Gelu")
