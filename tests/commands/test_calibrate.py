"""``msn-export calibrate``: a graph with its ranges and verdict, and what TensorRT makes of it."""

import json
import os
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from click.testing import CliRunner

from msn_export import manifest as manifests
from msn_export.artifact import Artifact
from msn_export.calibration import verdict
from msn_export.cli import main
from msn_export.graph import io
from msn_export.graph.precision import quantised_products
from msn_export.reporting.describe import file_rows
from msn_export.reporting.gather import report_file
from msn_export.runtime import open_runner
from tests.builders.calibrations import PRODUCTS, QUICK, calibrate, done, ranges_of
from tests.builders.tiny_artifacts import classifier, pictures


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a tiny classifier of two blocks, 17 tokens, random weights."""
    return classifier(tmp_path_factory.mktemp("calibrate"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), 44)


# --- what comes of it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int8(graph, images) -> tuple[Path, dict[str, Any]]:
    output = graph.with_name("int8.onnx")
    return output, done(graph, images, output, "--int8", "--no-compile")


def test_a_graph_comes_with_its_ranges_and_a_sealed_manifest(int8, graph) -> None:
    output, told = int8
    written = manifests.read(output)
    assert written is not None
    record = written.quantization
    assert record is not None
    assert (
        len(quantised_products(io.load(output))) == record.products == record.expected == PRODUCTS
    )
    assert record.ranges.file == "int8.ranges.json"
    assert written.source is not None
    assert written.source.file == graph.name
    assert told["dtype"] == "int8"


def test_the_verdict_is_on_images_that_were_not_calibrated_on(int8) -> None:
    output, told = int8
    quantization = told["quantization"]
    assert (quantization["calibration_images"], len(quantization["held_out"])) == (33, 11)
    assert told["check"]["images"] == 11
    ranges = json.loads(ranges_of(output).read_text())
    assert len(ranges["images"]["sha256"]) == 33


def test_the_verdict_has_what_it_costs_beside_the_fp16_twin(int8) -> None:
    output, told = int8
    quantization = told["quantization"]
    assert told["check"]["cosine_p1"] >= 0.99
    assert quantization["twin"]["cosine_p1"] > told["check"]["cosine_p1"]
    for shares in (quantization["neighbours"], quantization["classes"]):
        assert set(shares) == {"fp16", "int8"}
        assert 0.5 < shares["int8"] <= shares["fp16"] <= 1
    assert quantization["sizes"]["int8"] == output.stat().st_size
    assert quantization["sizes"]["int8"] < quantization["sizes"]["fp16"]
    assert quantization["sizes"]["fp16"] < quantization["sizes"]["fp32"]


def test_a_report_shows_the_split_and_the_verdict(int8) -> None:
    output, told = int8
    shown = report_file(Artifact.examine(output), live=None)
    rows = dict(file_rows(shown.inspection, shown.manifest))
    assert rows["quantised"] == f"{PRODUCTS} of {PRODUCTS} products to int8"
    assert rows["images"].startswith("33 calibrated on, 11 held out (seed ")
    assert rows["in short"] == told["quantization"]["verdict"]


def test_the_rest_is_fp16_and_attention_stays_one_operator(int8) -> None:
    model = io.load(int8[0])
    attention = [node for node in model.graph if node.op_type == "Attention"]
    assert [node.outputs[0].dtype for node in attention] == [ir.DataType.FLOAT16] * 2


def test_two_runs_give_the_same_bytes(int8, graph, images, tmp_path) -> None:
    first, second = int8[0], tmp_path / "again.onnx"
    done(graph, images, second, "--int8", "--no-compile")
    assert first.read_bytes() == second.read_bytes()
    assert ranges_of(first).read_bytes() == ranges_of(second).read_bytes()


def test_so_do_two_runs_in_fp8(graph, images, tmp_path) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    for output in (first, second):
        done(graph, images, output, "--fp8", *QUICK)
    assert first.read_bytes() == second.read_bytes()
    assert ranges_of(first).read_bytes() == ranges_of(second).read_bytes()


def test_known_ranges_give_the_same_graph(int8, graph, images, tmp_path) -> None:
    output, _ = int8
    again = tmp_path / "again.onnx"
    told = done(graph, images, again, "--int8", "--no-compile", "--ranges", str(ranges_of(output)))
    assert again.read_bytes() == output.read_bytes()
    assert told["quantization"]["ranges"]["file"] == "int8.ranges.json"
    assert not ranges_of(again).exists()


def test_known_ranges_serve_another_format(int8, graph, images, tmp_path) -> None:
    options = ("--fp8", "--no-compile", "--ranges", str(ranges_of(int8[0])))
    told = done(graph, images, tmp_path / "fp8.onnx", *options)
    assert (told["dtype"], told["quantization"]["products"]) == ("fp8", PRODUCTS)


@pytest.mark.parametrize(
    ("option", "products", "name"),
    [("--quantize-patch", 9, "patch"), ("--quantize-head", 9, "classifier")],
)
def test_patch_and_head_are_quantised_where_asked(
    graph, images, tmp_path, option, products, name
) -> None:
    output = tmp_path / "more.onnx"
    told = done(graph, images, output, "--int8", *QUICK, option)
    assert told["quantization"]["products"] == told["quantization"]["expected"] == products
    assert any(name in product for product in quantised_products(io.load(output)))


def test_corrected_biases_are_told(graph, images, tmp_path) -> None:
    output = tmp_path / "m.onnx"
    told = done(graph, images, output, "--int8", *QUICK, "--bias-correction")
    assert told["quantization"]["bias_correction"] is True


def test_a_person_reads_the_verdict_in_a_table(graph, images, tmp_path) -> None:
    result = calibrate(graph, images, tmp_path / "m.onnx", "--int8", *QUICK)
    assert result.exit_code == 0, result.output
    for said in (
        "8 of 8 products to int8",
        "ranges by mse, smoothing off; the rest in fp16",
        "33 calibrated on, 11 held out (seed 0); m.ranges.json",
        "not asked for (--no-compile)",
    ):
        assert said in result.stdout


@pytest.mark.parametrize("name", ["twin.fp16.onnx", "watched.onnx", "observed.onnx"])
def test_no_name_of_an_output_is_one_of_ours(graph, images, tmp_path, name) -> None:
    done(graph, images, tmp_path / name, "--int8", *QUICK)
    assert len(quantised_products(io.load(tmp_path / name))) == PRODUCTS


# --- what TensorRT makes of it --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "options"),
    [("int8", ()), ("fp8", ()), ("int8", ("--quantize-attention", "--smooth", "off"))],
)
def test_every_product_multiplies_in_8_bits_and_attention_stays_fused(
    graph, images, tmp_path, dtype, options
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    told = done(graph, images, tmp_path / "m.onnx", f"--{dtype}", *options)
    compiled = told["quantization"]["compiled"]
    assert compiled["compiler"].endswith("for SM 8.9")
    one, twin = compiled[dtype], compiled["fp16"]
    assert (one["multiplied"], one["products"]) == (PRODUCTS, PRODUCTS)
    assert one["fused_attention"] == twin["fused_attention"] == 2
    assert one["gemm_dtypes"][{"int8": "Int8", "fp8": "FP8"}[dtype]] == PRODUCTS
    assert twin["gemm_dtypes"].keys() == {"Half"}
    assert told["quantization"]["latency"]["reason"].startswith("no NVIDIA driver")


def test_the_verdict_compiles_for_the_gpu_that_is_named(graph, images, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    options = ("--int8", "--smooth", "off", "--compute-capability", "12.0")
    told = done(graph, images, tmp_path / "m.onnx", *options)
    assert told["quantization"]["compiled"]["compiler"].endswith("for SM 12.0")


def test_trt_takes_the_graph_and_holds_the_engine_to_it(int8, images, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    target = ["--backend", "tensorrt-rtx", "--compute-capability", "8.9", "--json"]
    arguments = ["trt", str(int8[0]), "-o", str(tmp_path / "m.engine"), "--images", str(images)]
    result = CliRunner().invoke(main, [*arguments, *target])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["dtype"] == told["engine"]["precision"] == "int8"
    assert told["engine"]["gemm_dtypes"]["Int8"] == told["engine"]["quantised_products"] == PRODUCTS
    assert told["engine"]["fused_attention"] == 2
    assert told["check"]["passed"] is True


def test_a_quantised_graph_can_be_tested_elsewhere(int8) -> None:
    with open_runner(int8[0], providers=["cpu"]) as runner:
        found = runner.selftest()
    assert found.passed
    assert found.agreement.max_abs == 0.0


def test_the_rest_may_be_bf16(graph, images, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    output = tmp_path / "m.onnx"
    told = done(graph, images, output, "--int8", "--base", "bf16", "--smooth", "off")
    compiled = told["quantization"]["compiled"]
    assert compiled["int8"]["multiplied"] == compiled["int8"]["products"] == PRODUCTS
    assert (compiled["int8"]["fused_attention"], compiled["bf16"]["fused_attention"]) == (2, 2)
    assert "bf16 emulated" in told["check"]["executed_on"]
    attention = [node for node in io.load(output).graph if node.op_type == "Attention"]
    assert [node.outputs[0].dtype for node in attention] == [ir.DataType.BFLOAT16] * 2


def test_attention_that_is_taken_apart_is_no_gain(graph, images, tmp_path) -> None:
    """TensorRT-RTX 1.7 has no fused fp8 attention for so few tokens: 17 here, 65 it has."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    options = ("--fp8", "--quantize-attention", "--gate-cosine", "0.9", "--smooth", "off")
    told = done(graph, images, tmp_path / "m.onnx", *options)
    assert told["quantization"]["compiled"]["fp8"]["fused_attention"] == 0
    assert told["quantization"]["worthwhile"] is False
    assert told["quantization"]["verdict"].startswith("keep fp16: ")
    assert "fused attention in 0 of 2 blocks" in told["quantization"]["verdict"]


def test_time_that_is_lost_is_told_with_both_engines_times(
    graph, images, tmp_path, monkeypatch
) -> None:
    built = {
        "kernels": 20, "fused_attention": 2, "gemm_dtypes": {}, "products": 8, "multiplied": 8,
        "bytes": 70,
    }  # fmt: skip
    compiled = {"compiler": "pretended", "fp16": {**built, "bytes": 100}, "int8": built}
    monkeypatch.setattr(verdict, "_compile", lambda *_: compiled)
    timed = {"fp16": 1.0, "int8": 1.5, "ratio": {"int8": 1.5}, "batch": 8, "device": "a GPU"}
    asked = []
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))  # else no time decides
    monkeypatch.setattr(verdict, "time_engines", lambda *given: asked.append(given) or timed)
    output = tmp_path / "m.onnx"
    result = calibrate(graph, images, output, "--int8", "--smooth", "off")
    assert result.exit_code == 0, result.output
    ((engines, batch, baseline),) = asked
    assert (list(engines), batch.shape, baseline) == (["fp16", "int8"], (8, 3, 32, 32), "fp16")
    written = manifests.read(output)
    assert written is not None
    assert written.quantization is not None
    latency = written.quantization.latency
    assert {**latency, **timed} == latency
    assert latency.keys() - timed.keys() == {"load", "noisy"}
    assert written.quantization.verdict.startswith("keep fp16: the int8 engine is 30% smaller ")
    assert "batch 8, copies included: 1.00 ms fp16, 1.50 ms int8; on a GPU" in result.stdout


def test_a_gpu_without_fp8_is_named(graph, images, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    output = tmp_path / "fp8.onnx"
    done(graph, images, output, "--fp8", *QUICK)
    target = ["--backend", "tensorrt-rtx", "--compute-capability", "8.6", "--no-check"]
    engine = tmp_path / "m.engine"
    result = CliRunner().invoke(main, ["trt", str(output), "-o", str(engine), *target])
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "error: the graph computes in fp8, which --compute-capability 8.6 cannot; it takes 8.9 or "
        "later"
    )
    assert not engine.exists()
