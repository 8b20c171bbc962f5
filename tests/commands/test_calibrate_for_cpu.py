"""``msn-export calibrate`` for onnxruntime on a CPU: int8 beside fp32."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from click.testing import CliRunner

from msn_export.cli import main
from msn_export.commands.calibrate import CalibrateJob, run_calibrate
from msn_export.graph import io
from msn_export.runtime import open_runner
from msn_export.spec import Dtype, Target
from tests.builders.calibrations import PRODUCTS, QUICK, calibrate, done, refused
from tests.builders.checkpoints import hugging_face
from tests.builders.foreign import Reading, cls, encoder, scripted
from tests.builders.tiny_artifacts import classifier, pictures


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), 44)


@pytest.fixture(scope="module")
def cpu_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("cpu"), "--target", "onnxruntime")


def test_int8_for_onnxruntime_leaves_the_rest_in_fp32_and_is_timed_there(
    cpu_graph, images, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (999.0, 1.0, 1.0))
    output = tmp_path / "m.onnx"
    told = done(cpu_graph, images, output, "--int8", "--smooth", "off")
    assert (told["target"], told["quantization"]["base"]) == ("onnxruntime", "fp32")
    types = {value.dtype for node in io.load(output).graph for value in node.outputs}
    assert types & {ir.DataType.FLOAT16, ir.DataType.BFLOAT16} == set()
    assert told["attention"] == {"expected": 2, "fused": 2, "form": "3-D Attention"}
    assert told["quantization"]["compiled"] == {"reason": "int8 beside fp32 is for onnxruntime"}
    times = told["quantization"]["latency"]
    assert times["device"].endswith("CPUExecutionProvider")
    assert times["batch"] == 8
    assert told["quantization"]["worthwhile"]  # by its bytes: these times are too noisy
    assert times["ratio"]["int8"] > 0
    q1, q3 = times["quartiles"]["int8"]
    assert q1 <= times["ratio"]["int8"] <= q3
    assert times["rounds"] == 5
    assert times["load"] == 999.0
    assert "load average 999.0 on " in times["noisy"] or "quartiles" in times["noisy"]
    assert "Too noisy, use bench on an idle machine: " in told["quantization"]["verdict"]


def optimised_operators(graph: Path, optimised: Path) -> Counter[str]:
    """Count the operators that onnxruntime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimised)
    # beyond it the file is for this processor alone, and onnxruntime warns of that
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in io.load(optimised).graph)


def test_onnxruntime_multiplies_such_a_graph_in_8_bits(cpu_graph, images, tmp_path) -> None:
    output = tmp_path / "m.onnx"
    done(cpu_graph, images, output, "--int8", *QUICK)
    found = optimised_operators(output, tmp_path / "optimised.onnx")
    assert (found["MatMulIntegerToFloat"], found["MatMul"]) == (PRODUCTS, 0)


def test_separate_projections_of_another_tool_become_one_product_in_8_bits(
    images, tmp_path
) -> None:
    """onnxruntime would multiply queries, keys and values that share an input in fp32."""
    graph = scripted(tmp_path / "theirs.onnx", Reading(encoder("eager"), cls))
    separate = Counter(node.op_type for node in io.load(graph).graph)["MatMul"]
    assert separate == 2 * 6 + 2 * 2  # blocks of six, and attention's own products
    output = tmp_path / "m.onnx"
    done(graph, images, output, "--int8", "--base", "fp32", *QUICK)
    found = optimised_operators(output, tmp_path / "optimised.onnx")
    assert (found["MatMulIntegerToFloat"], found["MatMul"] + found["FusedMatMul"]) == (PRODUCTS, 4)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_a_graph_of_one_batch_size_is_quantised_and_runs(images, tmp_path, target) -> None:
    """onnxruntime's fusion of MatMul and Add, which fixed shapes invite, refuses its own work."""
    graph = classifier(tmp_path, "--target", target, "--batch", "3")
    output = tmp_path / "m.int8.onnx"
    told = done(graph, images, output, "--int8", *QUICK)
    assert told["quantization"]["products"] == PRODUCTS
    batch = np.zeros((3, 3, 32, 32), np.float32)
    with open_runner(output, providers=["cpu"]) as runner:
        assert runner(batch).logits.shape == (3, 3)


def test_trt_types_what_is_fp32_beside_int8_and_says_so(cpu_graph, images, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    output = tmp_path / "m.int8.onnx"
    done(cpu_graph, images, output, "--int8", *QUICK)
    arguments = ["trt", str(output), "-o", str(tmp_path / "m.engine")]
    result = CliRunner().invoke(main, [*arguments, "--backend", "tensorrt-rtx", "--json"])
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert "what m.int8.onnx computes in fp32 beside int8 is fp16" in told["notes"]
    assert told["engine"]["fused_attention"] == told["attention"]["expected"]


def test_attentions_own_products_are_multiplied_in_8_bits_too_where_asked(
    cpu_graph, images, tmp_path
) -> None:
    output, optimised = tmp_path / "m.onnx", tmp_path / "optimised.onnx"
    told = done(cpu_graph, images, output, "--int8", "--quantize-attention", *QUICK)
    assert (told["target"], told["quantization"]["base"]) == ("onnxruntime", "fp32")
    assert told["attention"] == {
        "expected": 2, "fused": 2, "form": "MatMul, Softmax, MatMul in int8",
    }  # fmt: skip
    found = optimised_operators(output, optimised)
    assert found["MatMulIntegerToFloat"] + found["QLinearMatMul"] == PRODUCTS + 4
    assert found["MatMul"] == 0


@pytest.mark.parametrize("options", [(), ("--quantize-attention",)])
def test_none_of_its_sums_saturates_whatever_the_processor(
    cpu_graph, images, tmp_path, options
) -> None:
    """onnxruntime's exact kernels, which it does not use by default, give the same."""
    output = tmp_path / "m.onnx"
    done(cpu_graph, images, output, "--int8", *QUICK, *options)
    eight = io.load(output).graph.initializers.values()
    largest = [
        np.abs(value.const_value.numpy().astype(int)).max()
        for value in eight
        if value.const_value is not None and value.dtype is ir.DataType.INT8 and value.shape
    ]
    assert largest == [64] * PRODUCTS
    exact = onnxruntime.SessionOptions()
    exact.add_session_config_entry("session.x64quantprecision", "1")
    batch = np.random.default_rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32)
    fast, slow = (
        onnxruntime.InferenceSession(output, options, providers=["CPUExecutionProvider"]).run(
            None, {"pixel_values": batch}
        )[0]
        for options in (onnxruntime.SessionOptions(), exact)
    )
    np.testing.assert_allclose(fast, slow, atol=1e-5)


def test_a_person_reads_which_is_faster_on_the_cpu(cpu_graph, images, tmp_path) -> None:
    result = calibrate(cpu_graph, images, tmp_path / "m.onnx", "--int8", "--smooth", "off")
    assert "no: int8 beside fp32 is for onnxruntime" in result.stdout
    assert re.search(r"batch 8: [0-9.]+ ms fp32, [0-9.]+ ms int8; on onnxruntime", result.stdout)


def test_a_graph_whose_last_block_is_written_for_tensorrt_says_what_to_export(
    images, tmp_path
) -> None:
    hugging_face(tmp_path / "hf", num_attention_heads=4)
    narrowed = tmp_path / "narrowed.onnx"
    made = CliRunner().invoke(main, ["onnx", str(tmp_path / "hf"), "-o", str(narrowed)])
    assert made.exit_code == 0, made.output
    message = refused(narrowed, images, tmp_path / "m.onnx", "--int8", "--base", "fp32")
    assert message == (
        "error: int8 beside fp32 is for onnxruntime, and the last block of this graph is written "
        "for TensorRT; export it with --target onnxruntime, or choose another --base"
    )


def test_from_python_the_rest_is_chosen_as_by_the_command(cpu_graph, images, tmp_path) -> None:
    job = CalibrateJob(cpu_graph, Dtype.INT8, images, tmp_path / "m.onnx", smooth="off", limit=8)
    _, manifest = run_calibrate(job)
    assert manifest.quantization is not None
    assert (manifest.target, manifest.quantization.base) == (Target.ONNXRUNTIME, "fp32")
    with open_runner(tmp_path / "m.onnx", providers=["cpu"]) as runner:
        assert runner.selftest().passed


def test_the_rest_may_be_said(cpu_graph, images, tmp_path) -> None:
    options = ("--int8", "--base", "fp16", *QUICK)
    told = done(cpu_graph, images, tmp_path / "half.onnx", *options)
    assert (told["target"], told["quantization"]["base"]) == ("tensorrt", "fp16")
    told = done(cpu_graph, images, tmp_path / "fp8.onnx", "--fp8", *QUICK)
    assert told["quantization"]["base"] == "fp16"
