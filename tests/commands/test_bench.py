"""``msn-export bench``: contenders apart and compared; whoever cannot run is named with why."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from msn_export import manifest
from msn_export.cli import main
from msn_export.manifest import CheckpointRecord
from tests.builders.artifacts import engine
from tests.builders.tiny_artifacts import classifier, foreign


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("bench"), "--batch", "1:4:8")


QUICK = ("--rounds", "3", "--seconds", "0.06")


def bench(*arguments: object):
    return CliRunner().invoke(main, ["bench", *map(str, arguments), *QUICK])


@pytest.fixture(scope="module")
def measured(model, photographs, tmp_path_factory):
    report = tmp_path_factory.mktemp("report") / "bench.html"
    result = bench(
        model, "--preset", "paper", "--against", "eager,sdpa,onnxruntime", "--images", photographs,
        "--report", report, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), report


def test_every_contender_is_timed_at_every_batch(measured) -> None:
    told, _ = measured
    assert told["schema"] == 1
    assert told["batches"] == [1, 2, 4, 8]
    found = {(timing["contender"], timing["batch"]) for timing in told["timings"]}
    assert found == {(n, b) for n in ("eager", "sdpa", "tiny.onnx") for b in (1, 2, 4, 8)}
    for timing in told["timings"]:
        assert timing["min_ms"] <= timing["median_ms"] <= timing["p90_ms"] <= timing["p99_ms"]
        assert len(timing["rounds_ms"]) == 3
        assert timing["calls"] >= 3
        wanted = 1000 * timing["batch"] / timing["median_ms"]
        assert timing["images_per_second"] == pytest.approx(wanted)


def test_ratios_are_to_the_first_that_was_named(measured) -> None:
    told, _ = measured
    assert told["baseline"] == "eager"
    for timing in told["timings"]:
        ratio = timing["ratio"]
        assert ratio["q1"] <= ratio["median"] <= ratio["q3"]
        if timing["contender"] == "eager":
            assert (ratio["q1"], ratio["median"], ratio["q3"]) == (1, 1, 1)


def test_outputs_are_compared_beside_each_time(measured) -> None:
    told, _ = measured
    assert "torch" in told["reference"]
    assert told["pictures"] == 16
    for timing in told["timings"]:
        assert timing["agreement"]["images"] == 16
        assert timing["agreement"]["cosine_min"] > 0.999999  # the gate of an fp32 graph
        assert timing["agreement"]["max_abs"] < 1e-4


def test_memory_is_each_contenders_own(measured) -> None:
    told, _ = measured
    peaks = {one["contender"]: one["peak_rss_bytes"] for one in told["timings"]}
    assert 20e6 < peaks["tiny.onnx"] < 0.6 * peaks["sdpa"]  # no torch in its process


def test_what_was_left_out_says_why(measured) -> None:
    told, _ = measured
    (absent,) = [one for one in told["contenders"] if one["skipped"]]
    assert absent["name"] == "onnxruntime"
    assert absent["skipped"] == "every artifact here is an .onnx file and runs in it already"


def test_the_report_is_written_with_the_same_data(measured) -> None:
    told, report = measured
    (data,) = re.findall(r'id="bench">(.*?)</script>', report.read_text(), re.S)
    assert json.loads(data) == told
    assert [path.name for path in report.parent.iterdir()] == ["bench.html"]


def test_the_table_for_people_has_the_paper_layout(model) -> None:
    result = bench(model, "--preset", "paper", "--batch", "2")
    assert result.exit_code == 0, result.output
    assert "time / eager" in result.stdout
    assert "eager / tiny.onnx, x" in result.stdout
    assert "noise" in result.stdout
    assert "CUDA graphs" in result.stdout


def test_a_model_that_computes_something_else_is_shown_to(model, tmp_path) -> None:
    graph = onnx.load(model)
    for tensor in graph.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.size > 10_000:
            changed = numpy_helper.from_array(values[::-1].copy(), tensor.name)
            tensor.CopyFrom(changed)
            break
    onnx.save(graph, tmp_path / "wrong.onnx")
    checkpoint = model.parent / "checkpoint"
    result = bench(
        tmp_path / "wrong.onnx", model, "--checkpoint", checkpoint, "--batch", "2", "--json"
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    cosines = {one["contender"]: one["agreement"]["cosine_min"] for one in told["timings"]}
    assert cosines["wrong.onnx"] < 0.99
    assert cosines["tiny.onnx"] > 0.999999
    assert cosines["sdpa"] > 0.999999


def test_without_its_checkpoint_an_artifact_is_still_timed(model, tmp_path) -> None:
    moved = tmp_path / "tiny.onnx"
    moved.write_bytes(model.read_bytes())
    known = manifest.read(model)
    assert known is not None
    gone = CheckpointRecord(str(tmp_path / "gone"), known.checkpoint.sha256)
    text = manifest.seal(replace(known, checkpoint=gone))
    (tmp_path / "tiny.onnx.json").write_text(text)
    result = bench(moved, "--batch", "2", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["baseline"] == "tiny.onnx"
    assert "gone' does not exist" in told["contenders"][-1]["skipped"]
    assert told["reference"].startswith("tiny.onnx (no PyTorch reference: checkpoint")


def test_another_checkpoint_is_refused_by_its_hash(model, tmp_path) -> None:
    from tests.builders.checkpoints import hugging_face

    hugging_face(tmp_path / "other", labels=3, seed=1)
    result = bench(model, "--checkpoint", tmp_path / "other", "--batch", "2", "--json")
    told = json.loads(result.stdout)
    assert "has other weights" in told["contenders"][-1]["skipped"]


def test_pytorch_computes_the_patches_and_blocks_that_the_graph_does(tmp_path) -> None:
    options = ("--keep-patches", "0.5", "--blocks", "2", "--normalize")
    kept = classifier(tmp_path, *options, heads=("cls", "features"))
    result = bench(kept, "--batch", "2", "--json")
    assert result.exit_code == 0, result.output
    measured = json.loads(result.stdout)
    (timing,) = [one for one in measured["timings"] if one["contender"] == kept.name]
    assert "torch" in measured["reference"]
    assert timing["not_compared"] is None
    assert timing["agreement"]["cosine_min"] > 0.9999


def test_a_graph_of_another_tool_that_leaves_its_size_open_takes_that_of_the_others(
    model, tmp_path
) -> None:
    other = foreign(tmp_path / "other.onnx", ["b", "c", "h", "w"], {"vectors": 6})
    result = bench(other, model, "--against", "none", "--batch", "2", "--json")
    assert result.exit_code == 0, result.output
    timing = json.loads(result.stdout)["timings"][0]
    assert timing["contender"] == "other.onnx"
    assert timing["agreement"] is None
    assert timing["not_compared"].startswith("it has no output in common with the reference")
    result = bench(other, model, "--against", "none", "--batch", "2")
    assert "other.onnx not compared: it has no output in common" in result.stdout
    result = bench(other, "--against", "none")
    assert "leaves height and width open, --image-size says them" in result.stderr


def test_where_there_is_no_reference_it_is_said_once(tmp_path) -> None:
    other = foreign(tmp_path / "other.onnx", ["b", "c", "h", "w"], {"vectors": 6})
    options = ("--against", "none", "--batch", "1", "--image-size", "48")
    result = bench(other, *options)
    assert result.exit_code == 0, result.output
    told = " ".join(result.stdout.split())
    assert "Outputs compared with nothing (no manifest names a checkpoint; name it with " in told
    assert told.count("--checkpoint") == 1
    assert "not compared" not in told


def test_artifacts_of_other_image_sizes_are_refused(model, tmp_path) -> None:
    other = classifier(tmp_path, "--image-size", "48", "--no-check")
    result = bench(model, other, "--against", "none")
    assert result.exit_code == 1
    assert "artifacts take images of 32x32 and 48x48; bench those of one size" in result.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--against", "jax"], 2, "'--against': 'jax' is none of eager, sdpa, compile"),
        (["--against", "ort"], 2, "compile, onnxruntime, none; did you mean onnxruntime?"),
        (["--against", "egaer"], 2, "compile, onnxruntime, none; did you mean eager?"),
        (["--batch", "0"], 2, "Invalid value for '--batch'"),
        (["--rounds", "0"], 2, "Invalid value for '--rounds'"),
        (["--preset", "big"], 2, "Invalid value for '--preset'"),
        (["--resident"], 1, "--resident leaves data on a GPU, and this run is on the CPU"),
        (["--report", "/nowhere/b.html"], 1, "output folder /nowhere does not exist"),
    ],
)
def test_usage_and_settings_are_checked_first(model, options, code, message) -> None:
    result = CliRunner().invoke(main, ["bench", str(model), *options])
    assert result.exit_code == code, result.output
    assert message in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--precision", "bf16"],
            "precision is for OpenVINO: add the provider openvino, or leave precision out",
        ),
        (
            ["--providers", "openvno"],
            "this onnxruntime has no provider 'openvno'; it has cpu, and openvino is a runtime of "
            "its own; did you mean openvino?",
        ),
        (
            ["--batch", "1", "--batch", "100000000"],
            "--batch 100000000: the inputs alone take 9155.3 GiB (4 batches for each of 2 "
            "contenders), and ",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_option_that_helps(
    model, monkeypatch, options, message
) -> None:
    def no_reference(*_: object) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr("msn_export.commands.bench.find_reference", no_reference)
    result = CliRunner().invoke(main, ["bench", str(model), *options])
    assert result.exit_code == 1, result.output
    told = " ".join(result.stderr.split())
    assert message in told.replace("tensorrt, cuda, cpu", "cpu")
    assert "providers=[" not in told


def test_an_engine_without_a_gpu_names_the_option_that_runs_its_graph() -> None:
    result = CliRunner().invoke(main, ["bench", str(engine())])
    assert result.exit_code == 1
    told = " ".join(result.stderr.split())
    assert "run its .onnx with the provider cpu, or this where the GPU is" in told


def test_a_report_replaces_no_artifact(model, tmp_path) -> None:
    own = tmp_path / "own.onnx"
    own.write_bytes(model.read_bytes())
    result = bench(own, "--report", own, "--force")
    assert result.exit_code == 2
    assert f"{own} does not end in .html or .htm" in result.stderr
    assert own.read_bytes() == model.read_bytes()


def test_an_artifact_that_is_none_is_an_error(tmp_path, model) -> None:
    assert "none.onnx' does not exist" in bench(tmp_path / "none.onnx").stderr
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    result = bench(tmp_path / "bad.onnx")
    assert result.exit_code == 1
    assert "bad.onnx is not an ONNX file" in result.stderr
    assert "tiny.onnx is given twice" in bench(model, model).stderr


def test_a_load_at_the_start_marks_every_figure(model, monkeypatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (999.0, 1.0, 1.0))
    result = bench(model, "--against", "none", "--batch", "2", "--batch", "16", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["load"] == 999.0
    for timing in told["timings"]:
        assert "load average 999.0 on " in timing["noisy"] or "quartiles" in timing["noisy"]
    assert [one["split"] for one in told["timings"]] == [None, "in pieces of 8"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_run(model, tmp_path, number) -> None:
    command = [sys.executable, "-m", "msn_export", "bench", str(model), "--against", "none"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [*command, "--seconds", "60"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as run:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        until = time.monotonic() + 60
        while not children.read_text().split():
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.5)
        found = children.read_text().split()
        run.send_signal(number)
        _, stderr = run.communicate(timeout=60)
    assert found
    until = time.monotonic() + 10
    while any(Path(f"/proc/{child}").exists() for child in found):
        assert time.monotonic() < until, "a contender was left behind"
        time.sleep(0.02)
    if number == signal.SIGINT:
        assert run.returncode == 130
        assert b"Traceback" not in stderr
        assert not list(tmp_path.glob("msn-export-*"))


@pytest.mark.slow
def test_compile_runs_or_says_what_it_lacks(model, monkeypatch) -> None:
    result = bench(model, "--against", "sdpa,compile", "--batch", "2", "--json")
    told = json.loads(result.stdout)
    assert [one["name"] for one in told["contenders"]] == ["sdpa", "compile", "tiny.onnx"]
    compiled = next(one for one in told["timings"] if one["contender"] == "compile")
    assert compiled["agreement"]["cosine_min"] > 0.999999
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    result = bench(model, "--against", "sdpa,compile", "--batch", "2", "--json")
    told = json.loads(result.stdout)
    (absent,) = [one for one in told["contenders"] if one["skipped"]]
    assert absent["name"] == "compile"
    assert "/nowhere/c++" in absent["skipped"]


def test_a_graph_in_openvino_is_timed_beside_itself_in_onnxruntime(
    model, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    against = ["--against", "onnxruntime,sdpa", "--batch", "2", "--threads", "1"]
    result = bench(model, "--providers", "openvino", *against, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    by_name = {one["name"]: one for one in told["contenders"]}
    assert list(by_name) == ["tiny.onnx (ort)", "sdpa", "tiny.onnx (ov)"]
    assert by_name["tiny.onnx (ov)"]["runs"].startswith("OpenVINO ")
    assert by_name["tiny.onnx (ort)"]["runs"].startswith("onnxruntime ")
    assert (
        by_name["tiny.onnx (ov)"]["precision"] == "10 of 10 products in fp32, 2 attention in fp32"
    )
    assert by_name["sdpa"]["precision"] is None
    assert all(timing["agreement"]["cosine_min"] > 0.9999 for timing in told["timings"])
    assert {"openvino", "torch"} <= told["versions"].keys()
