"""``msn-export trt`` with the real TensorRT-RTX: the engine is what was asked for, or none is."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from msn_export import manifest
from msn_export.artifact import GraphFile
from msn_export.cli import main
from msn_export.commands.trt import TrtJob, run_trt
from msn_export.commands.trt_graph import written_for
from msn_export.engine.options import Backend
from msn_export.errors import GraphError
from msn_export.graph import io
from msn_export.host import NoDriver, find_driver
from msn_export.runtime.versions import row_for
from msn_export.spec import AttentionForm, Dtype
from tests.builders.checkpoints import hugging_face
from tests.builders.engine_builds import NEEDS_RTX
from tests.builders.graphs import parse, run
from tests.contracts import faults

pytestmark = NEEDS_RTX
RTX = ("--backend", "tensorrt-rtx", "--compute-capability", "8.9")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a tiny checkpoint, all tokens out: an fp32 graph of two blocks."""
    folder = tmp_path_factory.mktemp("trt")
    hugging_face(folder / "hf")
    output = folder / "m.onnx"
    result = CliRunner().invoke(
        main, ["onnx", str(folder / "hf"), "-o", str(output), "--head", "tokens"]
    )
    assert result.exit_code == 0, result.output
    return output


def build(model: Path, output: Path, *options: str, target: tuple[str, ...] = RTX):
    arguments = ["trt", str(model), "-o", str(output), "--json", *target, *options]
    return CliRunner().invoke(main, arguments)


def told(result) -> dict:
    assert result.exit_code == 0, result.output
    parsed: dict = json.loads(result.stdout)
    return parsed


def test_contradicting_precisions_are_refused(graph, tmp_path) -> None:
    result = build(graph, tmp_path / "m.engine", "--fp16", "--bf16")
    assert result.exit_code == 2
    assert "--fp16 and --bf16 contradict each other; give one" in result.stderr


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            ("--compute-capability", "5.0"),
            "cannot compile for compute capability 5.0; it can for",
        ),
        (("--version-compatible",), "cannot take --version-compatible: TensorRT-RTX ships without"),
    ],
)
def test_what_the_compiler_cannot_take_is_refused_before_anything_is_run(
    graph, tmp_path, monkeypatch, target, message
) -> None:
    monkeypatch.setattr("msn_export.commands.trt.draw", None)
    options = ("--backend", "tensorrt-rtx", *target)
    result = build(graph, tmp_path / "m.engine", "--fp16", target=options)
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.parametrize("option", ["--fp32", "--fp16"])
def test_a_graph_that_does_not_give_its_own_golden_result_is_refused(
    graph, tmp_path, option
) -> None:
    wrong = faults.plant(graph, tmp_path / "wrong.onnx", faults.scaled("last_hidden_state", 1.5))
    result = build(wrong, tmp_path / "m.engine", option)
    assert result.exit_code == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith(
        f"error: {wrong} does not give the golden result in its manifest: selftest failed "
        "(relative error 5.00e-01, "
    )
    assert message.endswith("; export it again")
    assert not (tmp_path / "m.engine").exists()


def test_another_normalisation_has_a_golden_result_of_its_own(graph, tmp_path) -> None:
    said = told(build(graph, tmp_path / "m.engine", "--fp16", "--preprocess", "raw"))
    golden, sealed = said["golden"], manifest.read(graph).golden
    assert golden["values"] != sealed.values
    assert golden["reference"].startswith("m.onnx in onnxruntime ")
    assert golden["limit"] == said["check"]["limits"]["last_hidden_state"]["image"]


@pytest.mark.parametrize(
    ("option", "gemms", "sums"),
    [("--fp16", {"Half": 8}, {"fp16": 2}), ("--bf16", {"BFloat16": 8}, {"fp32": 2})],
)
def test_a_half_precision_engine_is_half_and_fused(graph, tmp_path, option, gemms, sums) -> None:
    output = tmp_path / "m.engine"
    said = told(build(graph, output, option))
    engine = said["engine"]
    assert engine["gemm_dtypes"] == gemms
    assert engine["fused_attention"] == 2
    assert engine["accumulators"] == sums
    assert set(engine["kernels_per_block"]) == {"0", "1"}
    assert engine["compute_capabilities"] == ["8.9"]
    assert said["check"]["passed"] is True
    assert said["check"]["batches"] == [1, 3]  # each of four images once
    assert said["check"]["images_apart"] is True
    assert said["source"]["file"] == "m.onnx"
    written = manifest.read(output)
    assert written is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.engine", "m.engine.json"]


@pytest.mark.parametrize("target", ["onnxruntime", "portable"])
def test_a_graph_for_another_target_compiles_into_as_few_kernels(graph, target, tmp_path) -> None:
    other = tmp_path / "other.onnx"
    source = str(graph.parent / "hf")
    arguments = ["onnx", source, "-o", str(other), "--head", "tokens", "--target", target]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    said = told(build(other, tmp_path / "other.engine", "--fp16"))
    own = told(build(graph, tmp_path / "own.engine", "--fp16", "--no-check"))
    assert said["engine"]["kernels"] == own["engine"]["kernels"]
    assert said["engine"]["fused_attention"] == 2
    assert said["check"]["passed"] is True
    assert said["opset"] == 23


@pytest.mark.parametrize(
    ("version", "opset", "missing"),
    [("8.6.1", 17, {"Attention", "Gelu"}), ("10.9.0", 20, {"Attention"}), ("10.16.1", 23, set())],
)
def test_a_graph_is_written_as_an_older_parser_reads_it(graph, version, opset, missing) -> None:
    row = row_for("tensorrt", version)
    assert row is not None
    source = GraphFile.read(graph)
    feeds = {"pixel_values": np.random.default_rng(0).random((2, 3, 32, 32), np.float32)}
    before = run(source.graph, feeds)
    model, form, cores = written_for(Backend(row, version), source, Dtype.FP16)
    assert model.graph.opset_imports[""] == opset
    assert cores == 2
    assert (form is AttentionForm.PLAIN) == ("Attention" in missing)
    assert not missing & {node.op_type for node in model.graph}
    np.testing.assert_allclose(run(model, feeds), before, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not isinstance(find_driver(), NoDriver), reason="a driver is found here")
def test_without_a_driver_the_manifest_says_that_nothing_ran(graph, tmp_path) -> None:
    engine = told(build(graph, tmp_path / "m.engine", "--fp16"))["engine"]
    assert engine["executed"] is False
    assert engine["reason"].startswith("compiled, not executed: no NVIDIA driver")


def test_an_fp32_engine_has_its_attention_taken_apart(graph, tmp_path) -> None:
    engine = told(build(graph, tmp_path / "m.engine", "--fp32"))["engine"]
    assert set(engine["gemm_dtypes"]) == {"Float"}
    assert engine["precision"] == "fp32"


def test_two_builds_give_the_same_bytes(graph, tmp_path) -> None:
    for name in ("a", "b"):
        told(build(graph, tmp_path / f"{name}.engine", "--fp16"))
    assert (tmp_path / "a.engine").read_bytes() == (tmp_path / "b.engine").read_bytes()


def test_several_batches_are_several_profiles_each_checked(graph, tmp_path) -> None:
    said = told(build(graph, tmp_path / "m.engine", "--fp16", "--batch", "1", "--batch", "2:4:6"))
    assert said["profiles"] == [{"min": 1, "opt": 1, "max": 1}, {"min": 2, "opt": 4, "max": 6}]
    assert said["check"]["batches"] == [1, 2, 4, 6]
    assert said["check"]["images_apart"] is False  # larger batches than these were not left out


def test_an_ignored_option_is_told(graph, tmp_path) -> None:
    said = told(build(graph, tmp_path / "m.engine", "--fp16", "--optimization-level", "5"))
    assert any("--optimization-level has no effect" in note for note in said["notes"])


def test_the_log_has_what_tensorrt_said(graph, tmp_path) -> None:
    told(build(graph, tmp_path / "m.engine", "--fp16", "--log", str(tmp_path / "build.log")))
    assert "_gemm_mha" in (tmp_path / "build.log").read_text()


def test_the_log_replaces_nothing_that_is_read_or_written(graph, tmp_path) -> None:
    model, output, log = tmp_path / "m.onnx", tmp_path / "m.engine", tmp_path / "build.log"
    model.write_bytes(graph.read_bytes())
    log.write_text("mine")
    for path, options, message in (
        (model, ("--force",), f"output {model} is what is read; choose another with -o"),
        (output, (), f"output {output} would be written twice; name two files"),
        (log, (), f"output {log} exists; --force replaces it, -o writes elsewhere"),
    ):
        result = build(model, output, "--fp16", "--log", str(path), *options)
        assert (result.exit_code, result.stderr) == (1, f"error: {message}\n")
    assert model.read_bytes() == graph.read_bytes()
    assert log.read_text() == "mine"
    assert not output.exists()


def test_eight_bits_are_had_of_a_graph_that_has_them(graph, tmp_path) -> None:
    job = TrtJob(graph, tmp_path / "m.engine", Dtype.INT8, "tensorrt-rtx")
    with pytest.raises(GraphError) as raised:
        run_trt(job)
    assert str(raised.value) == f"{graph} is typed fp32; msn-export calibrate --int8 quantises it"


def test_the_graph_is_no_timing_cache(graph, tmp_path) -> None:
    result = build(graph, tmp_path / "m.engine", "--fp16", "--timing-cache", str(graph))
    assert result.stderr == f"error: --timing-cache {graph} is the graph; name another file\n"


def test_a_graph_of_another_tool_is_understood(graph, tmp_path) -> None:
    foreign = tmp_path / "theirs.onnx"
    io.save(io.load(graph), foreign)
    said = told(build(foreign, tmp_path / "m.engine", "--fp16"))
    assert said["attention"]["expected"] == 2
    assert any("theirs.onnx has no manifest" in note for note in said["notes"])


def test_an_overflowing_activation_is_kept_in_fp32_at_no_cost(graph, tmp_path) -> None:
    import torch

    model = hugging_face(tmp_path / "hf")
    with torch.no_grad():  # one channel of one token near 1e5, as trained ViTs have near 1e3
        model.embeddings.position_embeddings[0, 3, 5] += 1e5
    model.save_pretrained(tmp_path / "hf")
    source = tmp_path / "m.onnx"
    arguments = ["onnx", str(tmp_path / "hf"), "-o", str(source), "--head", "tokens"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    refused = build(source, tmp_path / "none.engine", "--fp16", "--islands", "none")
    assert refused.exit_code == 1
    assert "NaN" in refused.stderr or "infinite" in refused.stderr
    assert not (tmp_path / "none.engine").exists()
    said = told(build(source, tmp_path / "m.engine", "--fp16"))
    assert said["check"]["cosine_min"] >= 0.999
    assert said["islands"]["blocks.0.Add"] == pytest.approx(1e5, rel=0.01)
    assert said["engine"]["gemm_dtypes"] == {"Half": 8}
    # the casts around the islands are fused: as many kernels as without any
    plain = told(build(graph, tmp_path / "plain.engine", "--fp16"))
    assert plain["islands"] == {}
    assert said["engine"]["kernels"] == plain["engine"]["kernels"]


def save(text: str, path: Path) -> Path:
    model = parse(text)
    model.ir_version = 10
    io.save(model, path)
    return path


def microsoft(tmp: Path) -> Path:
    model = parse("g (float[b,3,8,8] x) => (float[b,3,8,8] y) { y = Relu (x) }")
    next(iter(model.graph)).domain = "com.microsoft"
    next(iter(model.graph)).op_type = "BiasGelu"
    model.graph.opset_imports["com.microsoft"] = 1
    (tmp / "x.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    return tmp / "x.onnx"


BAD_GRAPHS = {
    "optimised by onnxruntime": (microsoft, "is com.microsoft.BiasGelu: it was optimised by"),
    "no attention": (
        lambda tmp: save("g (float[b,3,8,8] x) => (float[b,3,8,8] y) { y = Relu (x) }", tmp / "x"),
        "the graph has no Softmax and no Attention; expected a vision transformer",
    ),
    "two inputs": (
        lambda tmp: save(
            "g (float[b,3,8,8] x, float[b,3,8,8] z) => (float[b,3,8,8] y) { y = Add (x, z) }",
            tmp / "x",
        ),
        "takes 'x', 'z'; expected one image input",
    ),
    "dynamic height": (
        lambda tmp: save("g (float[b,3,h,8] x) => (float[b,3,h,8] y) { y = Relu (x) }", tmp / "x"),
        "height, width and channels must be fixed",
    ),
    "no image": (
        lambda tmp: save("g (int64[b,3] x) => (int64[b,3] y) { y = Neg (x) }", tmp / "x"),
        "expected float32 or float16 [b, c, h, w] or uint8 [b, h, w, c] images",
    ),
}


@pytest.mark.parametrize(("prepare", "message"), BAD_GRAPHS.values(), ids=BAD_GRAPHS.keys())
def test_a_graph_we_do_not_understand_is_refused(prepare, message, tmp_path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    result = build(prepare(tmp_path), outputs / "m.engine", "--fp16")
    assert result.exit_code == 1
    assert message in result.stderr.strip().splitlines()[-1]
    assert list(outputs.iterdir()) == []


def test_a_graph_that_is_not_its_manifests_is_refused(graph, tmp_path) -> None:
    changed = tmp_path / "m.onnx"
    changed.write_bytes(graph.read_bytes())
    beside = manifest.manifest_path(changed)
    beside.write_bytes(manifest.manifest_path(graph).read_bytes())
    model = io.load(changed)
    weight = model.graph.initializers["norm.bias"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(np.zeros(64, np.float32), name="norm.bias")
    io.save(model, changed)
    result = build(changed, tmp_path / "m.engine", "--fp16")
    assert result.exit_code == 1
    assert "is not the file its manifest describes" in result.stderr


def test_a_typed_graph_cannot_be_widened(graph, tmp_path) -> None:
    half = tmp_path / "half.onnx"
    arguments = ["onnx", str(graph.parent / "hf"), "-o", str(half), "--dtype", "fp16"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    result = build(half, tmp_path / "m.engine", "--fp32")
    assert result.exit_code == 1
    assert "is typed fp16; --fp32 needs the fp32 graph" in result.stderr
    assert told(build(half, tmp_path / "m.engine", "--batch", "2"))["engine"]["precision"] == "fp16"


def test_fp32_products_of_a_typed_graph_are_declared_or_accepted(tmp_path) -> None:
    import torch

    model = hugging_face(tmp_path / "hf", labels=3)
    with torch.no_grad():  # one weight above fp16's range
        model.classifier.weight[1, 5] = 119111.0
    model.save_pretrained(tmp_path / "hf")
    half = tmp_path / "half.onnx"
    arguments = ["onnx", str(tmp_path / "hf"), "-o", str(half), "--dtype", "fp16"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    declared = told(build(half, tmp_path / "declared.engine"))
    assert declared["islands"]["classifier.weight"] == 119111.0
    assert declared["engine"]["gemm_dtypes"] == {"Half": 8, "Float": 1}

    foreign = tmp_path / "foreign.onnx"  # the same graph, and nothing says what stays fp32
    foreign.write_bytes(half.read_bytes())
    refused = build(foreign, tmp_path / "m.engine")
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[-1] == (
        f"error: {foreign} is typed fp16, and 1 of its products compute in fp32 though no island "
        "in its manifest says so: classifier.Gemm; export the fp32 graph and let --fp16 type it, "
        "or accept them with --allow-fp32"
    )
    assert not (tmp_path / "m.engine").exists()
    said = told(build(foreign, tmp_path / "m.engine", "--allow-fp32"))
    assert said["engine"]["options"]["allow_fp32"] is True
    assert "in fp32 though no island says so, accepted: classifier.Gemm" in said["notes"]


def test_a_fixed_batch_cannot_be_widened(graph, tmp_path) -> None:
    static = tmp_path / "static.onnx"
    arguments = ["onnx", str(graph.parent / "hf"), "-o", str(static), "--batch", "4"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    result = build(static, tmp_path / "m.engine", "--fp16", "--batch", "1:2:8")
    assert result.exit_code == 1
    assert "the graph has a fixed batch of 4; export it again with --batch 1:2:8" in result.stderr


def test_an_existing_engine_is_kept_unless_forced(graph, tmp_path) -> None:
    output = tmp_path / "m.engine"
    output.write_bytes(b"mine")
    assert "--force replaces it" in build(graph, output, "--fp16").stderr
    assert output.read_bytes() == b"mine"
    told(build(graph, output, "--fp16", "--force"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_ending_the_command_ends_the_compiler_and_leaves_no_engine(graph, tmp_path, number) -> None:
    command = [sys.executable, "-m", "msn_export", "trt", str(graph), "--fp16", *RTX]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=tmp_path, text=True)
    compiler = None
    deadline = time.monotonic() + 60
    while compiler is None and time.monotonic() < deadline:
        compiler = child_of(run.pid)
    assert compiler is not None
    run.send_signal(number)
    run.communicate(timeout=60)
    while time.monotonic() < deadline and alive(compiler):
        time.sleep(0.05)
    assert not alive(compiler)
    assert not list(tmp_path.glob("*.engine"))
    if number is signal.SIGINT:
        assert run.returncode == 130
        assert list(tmp_path.iterdir()) == []


def child_of(parent: int) -> int | None:
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            arguments = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and b"msn_export.engine.worker" in arguments:
            return int(entry.name)
    return None


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
