"""``msn-export calibrate`` of a graph of opset 17: it stays one, and trt types it."""

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import CliRunner

from msn_export.cli import main
from msn_export.graph import io
from tests.builders.calibrations import PRODUCTS, QUICK, done, refused
from tests.builders.foreign import Reading, cls, encoder, scripted
from tests.builders.tiny_artifacts import classifier, pictures


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), 48)


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("portable"), "--target", "portable")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    return scripted(folder / "theirs.onnx", Reading(encoder(), cls), 17)


def scales_of(model: ir.Model) -> list[ir.TensorProtocol]:
    nodes = [n for n in model.graph if n.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    scales = [node.inputs[1].const_value for node in nodes if node.inputs[1] is not None]
    return [scale for scale in scales if scale is not None]


# ours packs query, key and value into one product, theirs has three, which are joined
@pytest.mark.parametrize("graph", ["portable", "theirs"])
def test_it_stays_opset_17_with_plain_attention_and_fp32_scales(
    graph, images, tmp_path, request
) -> None:
    source, output = request.getfixturevalue(graph), tmp_path / "m.onnx"
    told = done(source, images, output, "--int8", *QUICK)
    assert (told["opset"], told["target"], told["dtype"]) == (17, "portable", "int8")
    assert (told["quantization"]["base"], told["quantization"]["products"]) == ("fp32", PRODUCTS)
    model = io.load(output)
    operators = [node.op_type for node in model.graph]
    assert "Attention" not in operators
    assert operators.count("Softmax") == 2
    scales = scales_of(model)
    assert {scale.dtype for scale in scales} == {ir.DataType.FLOAT}
    assert sum(scale.size > 1 for scale in scales) == PRODUCTS  # a scale for each output channel
    for scale in scales:  # numbers that fp16 holds: what trt makes of them is the same
        values = scale.numpy()
        np.testing.assert_array_equal(values.astype(np.float16).astype(np.float32), values)


def test_it_runs_in_onnxruntime_and_compiles_fused(portable, images, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    output = tmp_path / "m.onnx"
    done(portable, images, output, "--int8", *QUICK)
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"pixel_values": np.zeros((2, 3, 32, 32), np.float32)})
    assert all(np.isfinite(values).all() for values in outputs)
    arguments = ["trt", str(output), "-o", str(tmp_path / "m.engine"), "--fp16", "--json"]
    arguments += ["--backend", "tensorrt-rtx", "--compute-capability", "8.9"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["attention"]["expected"], told["engine"]["fused_attention"]) == (2, 2)
    assert told["engine"]["quantised_products"] == PRODUCTS
    assert "what m.onnx computes in fp32 beside int8 is fp16" in told["notes"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--fp8",), "opset 17, which has no fp8; quantise it to int8, or export it with --target"),
        (("--int8", "--base", "bf16"), "fp32 scales only: --base bf16 cannot be written"),
        (("--int8", "--base", "fp16"), "fp32 scales only: --base fp16 cannot be written"),
    ],
)
def test_what_opset_17_cannot_hold_is_refused_before_any_work(
    portable, tmp_path, options, reason
) -> None:
    empty = tmp_path / "empty"  # would be refused as soon as a picture is looked for
    empty.mkdir()
    line = refused(portable, empty, tmp_path / "m.onnx", *options)
    assert line.startswith(f"error: {portable} is for portable, opset 17, ")
    assert reason in line


def test_another_tools_opset_17_is_raised_where_half_precision_is_asked_for(
    theirs, images, tmp_path
) -> None:
    told = done(theirs, images, tmp_path / "m.onnx", "--int8", "--base", "fp16", *QUICK)
    assert (told["opset"], told["target"]) == (23, "tensorrt")
