"""``msn-export calibrate``: a graph with its ranges and verdict, or one line and nothing."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from checkpoints import hugging_face
from click.testing import CliRunner, Result
from onnx import numpy_helper
from tiny_artifacts import classifier, foreign, pictures

from msn_export import manifest as manifests
from msn_export.cli import main
from msn_export.graph import io
from msn_export.graph.quantised import quantised_products
from msn_export.proof.artifact_facts import artifact_facts
from msn_export.quantise import measured

PRODUCTS = 8  # two blocks of four
QUICK = ("--no-compile", "--smooth", "off")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a tiny classifier of two blocks, 17 tokens, random weights."""
    return classifier(tmp_path_factory.mktemp("calibrate"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), 44)


def calibrate(graph: Path, images: Path, output: Path, *options: str) -> Result:
    arguments = ["calibrate", str(graph), "-o", str(output), "--images", str(images)]
    return CliRunner().invoke(main, [*arguments, *options])


def done(graph: Path, images: Path, output: Path, *options: str) -> dict[str, Any]:
    result = calibrate(graph, images, output, "--json", *options)
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def refused(graph: Path, images: Path, output: Path, *options: str) -> str:
    """Give the one line it is refused with; nothing is left at the output path or beside it."""
    result = calibrate(graph, images, output, *options)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert not [path for path in output.parent.iterdir() if path.name.startswith(output.stem)]
    line: str = result.stderr.strip().splitlines()[-1]
    return line


def ranges_of(output: Path) -> Path:
    return output.with_name(f"{output.stem}.ranges.json")


# --- what comes of it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int8(graph, images) -> tuple[Path, dict[str, Any]]:
    output = graph.with_name("int8.onnx")
    return output, done(graph, images, output, "--int8", "--no-compile")


def test_a_graph_comes_with_its_ranges_and_a_sealed_manifest(int8, graph) -> None:
    output, told = int8
    written = manifests.read(output)
    assert written is not None
    manifests.require_match(output, written)
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
    rows = dict(artifact_facts(output, live=None).rows)
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
    monkeypatch.setattr(measured, "compile_both", lambda *_: compiled)
    timed = {"fp16": 1.0, "int8": 1.5, "ratio": {"int8": 1.5}, "batch": 8, "device": "a GPU"}
    asked = []
    monkeypatch.setattr(measured, "time_engines", lambda *given: asked.append(given) or timed)
    output = tmp_path / "m.onnx"
    result = calibrate(graph, images, output, "--int8", "--smooth", "off")
    assert result.exit_code == 0, result.output
    ((engines, batch, baseline),) = asked
    assert (list(engines), batch.shape, baseline) == (["fp16", "int8"], (8, 3, 32, 32), "fp16")
    written = manifests.read(output)
    assert written is not None
    assert written.quantization is not None
    assert written.quantization.latency == timed
    assert written.quantization.verdict.startswith("keep fp16: the int8 engine is 30% smaller ")
    assert "batch 8, copies included: 1.00 ms fp16, 1.50 ms int8; on a GPU" in result.stdout


@pytest.fixture(scope="module")
def cpu_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("cpu"), "--target", "onnxruntime")


def test_int8_for_onnxruntime_leaves_the_rest_in_fp32_and_is_timed_there(
    cpu_graph, images, tmp_path
) -> None:
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
    assert (times["int8"] < times["fp32"]) == told["quantization"]["worthwhile"]
    assert times["ratio"]["int8"] > 0


def test_onnxruntime_multiplies_such_a_graph_in_8_bits(cpu_graph, images, tmp_path) -> None:
    output, optimised = tmp_path / "m.onnx", tmp_path / "optimised.onnx"
    done(cpu_graph, images, output, "--int8", *QUICK)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimised)
    # beyond it the file is for this processor alone, and onnxruntime warns of that
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(output, options, providers=["CPUExecutionProvider"])
    found = Counter(node.op_type for node in io.load(optimised).graph)
    assert (found["MatMulIntegerToFloat"], found["MatMul"]) == (PRODUCTS, 0)


def test_none_of_its_sums_saturates_whatever_the_processor(cpu_graph, images, tmp_path) -> None:
    """onnxruntime's exact kernels, which it does not use by default, give the same."""
    output = tmp_path / "m.onnx"
    done(cpu_graph, images, output, "--int8", *QUICK)
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


def test_the_rest_may_be_said(cpu_graph, images, tmp_path) -> None:
    options = ("--int8", "--base", "fp16", *QUICK)
    told = done(cpu_graph, images, tmp_path / "half.onnx", *options)
    assert (told["target"], told["quantization"]["base"]) == ("tensorrt", "fp16")
    told = done(cpu_graph, images, tmp_path / "fp8.onnx", "--fp8", *QUICK)
    assert told["quantization"]["base"] == "fp16"


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


# --- bad input ------------------------------------------------------------------------------------


def test_a_folder_without_images_is_refused(graph, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(graph, tmp_path / "empty", tmp_path / "m.onnx", "--int8")
    assert message.startswith(
        f"error: image folder {tmp_path / 'empty'} holds no picture; expected"
    )


def test_fewer_than_32_images_are_a_warning(graph, images, tmp_path) -> None:
    told = done(graph, images, tmp_path / "m.onnx", "--int8", *QUICK, "--limit", "12")
    assert told["notes"][0] == (
        "only 12 images were calibrated on: ranges of fewer than 32 say little about others; give "
        "more with --images"
    )


def test_broken_images_are_named_and_counted(graph, tmp_path) -> None:
    folder = pictures(tmp_path / "pictures", 12, broken=(3, 8))
    told = done(graph, folder, tmp_path / "m.onnx", "--int8", *QUICK)
    assert "2 broken images skipped" in told["notes"]
    assert sum(note.startswith("skipped: ") for note in told["notes"]) == 2


def test_a_graph_that_is_quantised_already_is_refused(int8, images, tmp_path) -> None:
    output, _ = int8
    message = refused(output, images, tmp_path / "twice.onnx", "--int8")
    assert message == (
        f"error: {output} is quantised to int8 already; give the fp32 graph it was made from"
    )


def test_ranges_of_another_graph_are_refused(int8, images, tmp_path) -> None:
    other = classifier(tmp_path / "other", heads=("cls",))
    ranges = ranges_of(int8[0])
    options = ("--int8", "--ranges", str(ranges))
    message = refused(other, images, tmp_path / "m.onnx", *options)
    assert message.startswith(f"error: --ranges {ranges} were taken of another graph (sha256 ")
    assert message.endswith("leave --ranges out to take them anew")


def test_ranges_taken_after_another_smoothing_are_refused(int8, graph, images, tmp_path) -> None:
    ranges = ranges_of(int8[0])
    options = ("--int8", "--ranges", str(ranges), "--smooth", "0.9")
    message = refused(graph, images, tmp_path / "m.onnx", *options)
    assert f"--smooth 0.9: --ranges {ranges} were taken after --smooth " in message
    assert message.endswith("; leave one of the two out")


def test_ranges_without_attention_are_refused_for_it(int8, graph, images, tmp_path) -> None:
    options = ("--int8", "--ranges", str(ranges_of(int8[0])), "--quantize-attention")
    message = refused(graph, images, tmp_path / "m.onnx", *options)
    assert "which --quantize-attention needs; leave --ranges out to take them anew" in message


def test_a_typed_graph_is_refused(graph, images, tmp_path) -> None:
    typed = tmp_path / "typed" / "fp16.onnx"
    typed.parent.mkdir()
    checkpoint = str(graph.parent / "checkpoint")
    options = ["-o", str(typed), "--dtype", "fp16", "--islands", "none", "--no-check"]
    assert CliRunner().invoke(main, ["onnx", checkpoint, *options]).exit_code == 0
    message = refused(typed, images, tmp_path / "m.onnx", "--int8")
    assert message == f"error: {typed} is typed fp16; calibrate takes the fp32 graph"


def changed(graph: Path, output: Path, **scale: Any) -> Path:
    """Copy a graph, without its manifest, with constants multiplied whose names end so."""
    model = onnx.load(graph)
    found = 0
    for tensor in model.graph.initializer:
        for ending, factor in scale.items():
            if tensor.name.endswith(ending.replace("_", ".")):
                array = numpy_helper.to_array(tensor) * np.float32(factor)
                tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
                found += 1
    assert found == len(scale)
    onnx.save(model, output)
    return output


def test_nan_names_the_first_tensor_that_has_it_and_an_image(graph, images, tmp_path) -> None:
    sick = changed(graph, tmp_path / "sick.onnx", blocks_1_norm1_weight=np.nan)
    message = refused(sick, images, tmp_path / "m.onnx", "--int8")
    assert message.startswith("error: tensor 'blocks.1.norm1.LayerNormalization' is NaN on image ")
    assert message.endswith(
        ".png; nothing can be calibrated on that: check the weights and the preprocessing"
    )


def test_what_fp16_cannot_hold_stays_fp32_and_is_listed(graph, images, tmp_path) -> None:
    large = changed(
        graph, tmp_path / "large.onnx", blocks_0_mlp_fc1_weight=3e4, blocks_0_mlp_fc2_weight=1 / 3e4
    )
    output = tmp_path / "m.onnx"
    told = done(large, images, output, "--int8", *QUICK)
    assert told["quantization"]["kept"] == {
        "blocks.0.mlp.fc1.MatMul": "fp32: its result passes what fp16 can hold"
    }
    assert told["quantization"]["products"] == PRODUCTS - 1
    assert max(told["islands"].values()) > 65504 / 4
    assert told["check"]["cosine_p1"] >= 0.99


def test_a_channel_that_is_always_zero_does_no_harm(graph, images, tmp_path) -> None:
    dead = changed(graph, tmp_path / "dead.onnx", blocks_0_norm1_weight=0, blocks_0_norm1_bias=0)
    told = done(dead, images, tmp_path / "m.onnx", "--int8", *QUICK)
    assert told["check"]["cosine_p1"] >= 0.99


def test_a_graph_of_another_tool_is_calibrated_and_what_was_assumed_is_told(
    graph, images, tmp_path
) -> None:
    foreign = changed(graph, tmp_path / "foreign.onnx")
    told = done(foreign, images, tmp_path / "m.onnx", "--int8", *QUICK)
    assert told["quantization"]["products"] == PRODUCTS
    assert "foreign.onnx has no manifest: preprocessing hf assumed" in told["notes"][-1]


def test_a_graph_that_is_no_vit_is_refused(images, tmp_path) -> None:
    path = tmp_path / "cnn.onnx"
    foreign(path, ["b", 3, 32, 32], {"embedding": 3})
    message = refused(path, images, tmp_path / "m.onnx", "--int8")
    assert message == (
        "error: the graph has no Softmax and no Attention; expected a vision transformer"
    )


def test_more_than_512_tokens_of_int8_attention_are_refused(images, tmp_path) -> None:
    output = tmp_path / "wide" / "m.onnx"
    hugging_face(output.parent / "checkpoint", image_size=96, patch_size=4, num_hidden_layers=1)
    arguments = ["onnx", str(output.parent / "checkpoint"), "-o", str(output), "--no-check"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    options = ("--int8", "--quantize-attention")
    assert refused(output, images, tmp_path / "q.onnx", *options) == (
        "error: --quantize-attention: TensorRT has fused int8 attention up to 512 tokens and this "
        "graph has 577; leave attention in fp16, or use --fp8"
    )


def test_an_existing_file_is_not_replaced(graph, images, tmp_path) -> None:
    for name in ("m.onnx", "m.ranges.json"):
        (tmp_path / name).write_text("mine")
        result = calibrate(graph, images, tmp_path / "m.onnx", "--int8")
        assert result.exit_code == 1
        assert str(tmp_path / name) in result.stderr
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --int8 or --fp8"),
        (("--fp8", "--observer", "entropy"), "--observer: fp8 has no even steps to compare with"),
        (("--fp8", "--base", "fp32"), "--base: fp32 is for onnxruntime, which multiplies no fp8"),
        (("--int8", "--smooth", "1.5"), "'--smooth'"),
        (("--int8", "--limit", "0"), "'--limit'"),
        (("--int8", "--gate-cosine", "1.5"), "'--gate-cosine'"),
    ],
)
def test_usage_names_the_option(graph, images, tmp_path, options, message) -> None:
    result = calibrate(graph, images, tmp_path / "m.onnx", *options)
    assert result.exit_code == 2
    assert message in result.stderr
