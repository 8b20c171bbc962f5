"""Drills against a real tritonserver (nvidia-pytriton's), its onnxruntime backend a stand-in.

The server, its batcher, ensembles, labels, versions, cache and metrics are NVIDIA's. The backends
``onnxruntime`` and ``tensorrt`` are Python code of tests/data/triton_backends: the first runs the
graph in onnxruntime, the second runs no engine. Nothing here uses a GPU.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import triton_server
from click.testing import CliRunner

from msn_export import image_folder, images, manifest
from msn_export.cli import main
from msn_export.commands.triton import run_lint
from msn_export.preprocessing import preset
from msn_export.spec import BatchRange, ImageSize
from tests.builders.checkpoints import hugging_face
from tests.builders.triton_artifacts import graph, plan
from tests.contracts.triton_faults import FAULTS, write_base

triton = pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(triton_server.PYTHON).exists(), reason=f"{triton_server.PYTHON} does not exist"
    ),
]

CLASSES = 5


def invoke(*arguments: object) -> None:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def export(folder: Path, seed: int) -> Path:
    """Export a tiny ViT-MSN classifier; two seeds are two versions of one model."""
    hugging_face(folder / f"hf{seed}", labels=CLASSES, seed=seed)
    path = folder / f"vit{seed}.onnx"
    invoke("onnx", folder / f"hf{seed}", "-o", path, "--head", "logits", "--head", "cls",
           "--batch", "1:4:16")  # fmt: skip
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("triton")


@pytest.fixture(scope="module")
def vit(folder) -> Path:
    return export(folder, 0)


@pytest.fixture(scope="module")
def pixels(photographs) -> np.ndarray:
    """Forty crops of photographs, uint8 [40, 32, 32, 3]."""
    wide = image_folder.load(photographs, preset("hf", ImageSize(64, 160)), 16).pixels
    crops = [wide[:, y : y + 32, x : x + 32] for y in (0, 32) for x in range(0, 160, 32)]
    return np.concatenate(crops)[:40]


@pytest.fixture(scope="module")
def server(folder, vit):
    """One server with a ViT and its ensemble, a fixed batch, and a plan that nobody runs."""
    repository = folder / "repository"
    invoke("triton", vit, "-o", repository, "--name", "vit", "--ensemble", "--warmup",
           "--queue-delay", 5000)  # fmt: skip
    invoke("triton", graph(folder / "fixed.onnx", batch=2), "-o", repository)
    invoke("triton", graph(folder / "bytes.onnx", input_format="uint8"), "-o", repository)
    engines = [plan(folder / f"e{sm}.engine", capability=sm) for sm in ("8.6", "8.9")]
    invoke("triton", *engines, "-o", repository, "--name", "gpus")
    profiles = (BatchRange(1, 2, 4), BatchRange(5, 8, 16))
    invoke("triton", plan(folder / "two.engine", profiles=profiles), "-o", repository, "--name",
           "profiles")  # fmt: skip
    with triton_server.serve(repository, folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with triton.InferenceServerClient(f"127.0.0.1:{server.grpc}") as connected:
        yield connected


def ask(client, model: str, batch: np.ndarray, output: str, *, tensor: str = "", classes: int = 0):
    source = triton.InferInput(
        tensor or ("images" if batch.dtype == np.uint8 else "pixel_values"),
        list(batch.shape),
        "UINT8" if batch.dtype == np.uint8 else "FP32",
    )
    source.set_data_from_numpy(np.ascontiguousarray(batch))
    wanted = triton.InferRequestedOutput(output, class_count=classes)
    return client.infer(model, [source], outputs=[wanted], client_timeout=60).as_numpy(output)


def expect(path: Path, batch: np.ndarray, output: str) -> np.ndarray:
    """Run the artifact itself in onnxruntime, here."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run([output], {session.get_inputs()[0].name: batch})[0]


def floats(path: Path, pixels: np.ndarray) -> np.ndarray:
    known = manifest.read(path)
    assert known is not None
    assert known.preprocessing is not None
    return images.normalize(pixels, known.preprocessing)


def statistics(client, model: str):
    (found,) = client.get_inference_statistics(model).model_stats
    return found


# a request's rows ride in batches of other sizes: onnxruntime sums in another order (measured 3e-6)
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


def test_400_requests_of_8_threads_are_answered_right_and_joined(
    client, server, vit, pixels
) -> None:
    batch = floats(vit, pixels)
    wanted = expect(vit, batch, "embedding")
    sizes = np.random.default_rng(0).integers(1, 4, 400)
    starts = np.random.default_rng(1).integers(0, len(batch) - 3, 400)
    before = statistics(client, "vit")

    def one(index: int) -> None:
        rows = slice(starts[index], starts[index] + sizes[index])
        got = ask(client, "vit", batch[rows], "embedding")
        np.testing.assert_allclose(got, wanted[rows], **CLOSE)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(400)))
    after = statistics(client, "vit")
    requests = after.inference_stats.success.count - before.inference_stats.success.count
    executions = after.execution_count - before.execution_count
    assert requests == 400
    assert after.inference_count - before.inference_count == sizes.sum()
    assert after.inference_stats.fail.count == 0
    assert executions < requests / 2, f"{executions} runs for {requests} requests"
    assert max(found.batch_size for found in after.batch_stats) > 3


def test_an_answer_names_its_classes(client, vit, pixels) -> None:
    batch = floats(vit, pixels[:3])
    logits = expect(vit, batch, "logits")
    answer = ask(client, "vit", batch, "logits", classes=2)
    assert answer.shape == (3, 2)
    for row, told in zip(logits, answer, strict=True):
        for place, text in enumerate(told):
            value, index, label = text.decode().split(":")
            assert int(index) == np.argsort(row)[::-1][place]
            assert label == f"class {index}"
            np.testing.assert_allclose(float(value), row[int(index)], rtol=1e-3)


def test_the_ensemble_takes_bytes_and_answers_the_same(client, vit, pixels) -> None:
    wanted = expect(vit, floats(vit, pixels[:9]), "embedding")
    got = ask(client, "vit-images", pixels[:9], "embedding")
    np.testing.assert_allclose(got, wanted, **CLOSE)
    planes = ask(client, "vit-preprocess", pixels[:4], "pixel_values")
    np.testing.assert_array_equal(planes, floats(vit, pixels[:4]))
    labelled = ask(client, "vit-images", pixels[:1], "logits", classes=1)
    assert labelled[0][0].decode().split(":")[2].startswith("class ")


def test_a_graph_of_bytes_needs_no_ensemble(client, folder) -> None:
    batch = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    np.testing.assert_allclose(
        ask(client, "bytes", batch, "logits"), expect(folder / "bytes.onnx", batch, "logits"),
        rtol=1e-5,
    )  # fmt: skip


def test_a_fixed_batch_is_served_as_it_is_and_no_other(client, folder) -> None:
    batch = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(
        ask(client, "fixed", batch, "logits"), expect(folder / "fixed.onnx", batch, "logits"),
        rtol=1e-5,
    )  # fmt: skip
    with pytest.raises(triton.InferenceServerException, match="unexpected shape for input"):
        ask(client, "fixed", batch[:1], "logits")


def test_what_a_model_does_not_take_is_refused_by_the_server(client, vit, pixels) -> None:
    batch = floats(vit, pixels)
    with pytest.raises(triton.InferenceServerException, match="batch-size must be <= 16"):
        ask(client, "vit", batch[:17], "embedding")
    with pytest.raises(triton.InferenceServerException, match="unexpected shape"):
        ask(client, "vit", batch[:1, :, :16], "embedding")


@pytest.mark.parametrize("model", ["gpus", "profiles"])
def test_a_plans_configuration_is_accepted_and_served_though_no_engine_runs(client, model) -> None:
    batch = np.ones((7, 3, 8, 8), np.float32)
    assert ask(client, model, batch, "logits").shape == (7, 3)
    labelled = ask(client, model, batch, "logits", classes=1)
    assert labelled[0][0].decode().endswith((":cat", ":dog", ":a bird"))


def test_the_metrics_count_what_was_asked(client, server, vit, pixels) -> None:
    def count() -> float:
        status, text = server.get("metrics", port=server.metrics)
        assert status == 200
        name = 'nv_inference_request_success{model="vit",version="1"} '
        return float(text.split(name)[1].split()[0])

    before = count()
    for _ in range(5):
        ask(client, "vit", floats(vit, pixels[:1]), "embedding")
    deadline = time.monotonic() + 10
    while count() < before + 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert count() == before + 5


def test_the_readmes_client_runs_as_it_is_printed(server, folder, photographs) -> None:
    readme = (folder / "repository/vit/README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    code = code.replace("localhost:8001", f"127.0.0.1:{server.grpc}")
    pictures = sorted(photographs.iterdir())[:2]
    run = subprocess.run(
        [sys.executable, "-c", code, *pictures], cwd=folder, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("label='class ") == 6  # three classes of each of two pictures


def test_a_new_version_takes_over_without_a_failed_request(folder, vit, pixels) -> None:
    newer = export(folder, 1)
    repository, work = folder / "versions", folder / "versions-server"
    work.mkdir()
    invoke("triton", vit, "-o", repository, "--name", "vit")
    batch = floats(vit, pixels[:1])
    old, new = expect(vit, batch, "embedding"), expect(newer, batch, "embedding")
    assert np.abs(old - new).max() > 0.1
    options = ["--model-control-mode=explicit", "--load-model=vit"]
    with (
        triton_server.serve(repository, work, options) as running,
        triton.InferenceServerClient(f"127.0.0.1:{running.grpc}") as client,
    ):
        answers: list[np.ndarray] = []
        done = threading.Event()

        def keep_asking() -> None:
            while not done.is_set():
                answers.append(ask(client, "vit", batch, "embedding"))

        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(keep_asking)
            try:
                invoke("triton", newer, "-o", repository, "--name", "vit", "--model-version", 2)
                assert client.get_model_metadata("vit").versions == ["1"]
                client.load_model("vit")
                assert client.get_model_metadata("vit").versions == ["2"]
                time.sleep(0.5)
            finally:
                done.set()
            asking.result(60)
        which = ["old" if np.allclose(x, old, **CLOSE) else "new" for x in answers]
        assert all(np.allclose(x, old, **CLOSE) or np.allclose(x, new, **CLOSE) for x in answers)
        assert (which[0], which[-1]) == ("old", "new")
        assert which == sorted(which, reverse=True), "an old answer after a new one"


def test_the_gpu_variant_refuses_a_machine_without_one(folder, vit) -> None:
    repository, work = folder / "gpu", folder / "gpu-server"
    work.mkdir()
    invoke("triton", vit, "-o", repository, "--name", "vit")
    served = triton_server.serve(repository, work, ["--model-config-name=gpu"])
    with pytest.raises(RuntimeError, match="failed to load all models"), served:
        pass
    assert "KIND_GPU but" in (work / "tritonserver.log").read_text()


def test_the_response_cache_answers_a_repeated_request(folder) -> None:
    repository, work = folder / "cache", folder / "cache-server"
    work.mkdir()
    path = graph(folder / "cached.onnx")
    invoke("triton", path, "-o", repository, "--response-cache")
    batch = np.ones((1, 3, 8, 8), np.float32)
    with (
        triton_server.serve(repository, work, ["--cache-config=local,size=1048576"]) as running,
        triton.InferenceServerClient(f"127.0.0.1:{running.grpc}") as client,
    ):
        first = ask(client, "cached", batch, "logits")
        for _ in range(4):
            np.testing.assert_array_equal(ask(client, "cached", batch, "logits"), first)
        found = statistics(client, "cached")
        assert found.execution_count == 1
        assert found.inference_stats.cache_hit.count == 4


def processes_of(session: int) -> list[int]:
    """List the live processes of a session, the stubs of Python backends among them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_it_stops_within_seconds_and_leaves_no_process(folder) -> None:
    repository, work = folder / "stop", folder / "stop-server"
    work.mkdir()
    invoke("triton", graph(folder / "stop.onnx"), "-o", repository)
    with triton_server.serve(repository, work) as running:
        assert os.getsid(running.pid) == running.pid
        assert len(processes_of(running.pid)) >= 2
        started = time.monotonic()
    assert time.monotonic() - started < 20
    assert processes_of(running.pid) == []
    with pytest.raises(OSError, match="refused"):
        running.get("v2/health/live")


@pytest.fixture(scope="module")
def verdicts(folder):
    """What a server made of each faulty model at its start, and what the linter finds.

    At its start, not one load and unload after the other: 2.51 died in one of six runs of such a
    drill (SIGSEGV in a thread of libtritonserver). What it dies of at its start is not given to it.
    """
    repository, work = folder / "faults", folder / "faults-server"
    work.mkdir()
    names = []
    for index, fault in enumerate(FAULTS):
        changed = write_base(fault.base, f"w{index:02}", repository, folder / f"w{index:02}")
        fault.edit(changed)
        names.append(changed.name)
    findings = run_lint(repository, None)
    for name, fault in zip(names, FAULTS, strict=True):
        if fault.by == "dies":
            shutil.rmtree(repository / name)
    options = ["--exit-on-error=false", "--strict-readiness=false"]
    with triton_server.serve(repository, work, options, until_ready=False) as running:
        index = json.loads(running.get("v2/repository/index", method="POST")[1])
        states = {model["name"]: model for model in index}
    return names, states, findings


@pytest.mark.parametrize("index", range(len(FAULTS)), ids=lambda index: FAULTS[index].name)
def test_each_fault_is_refused_by_the_server_or_found_by_the_linter(verdicts, index) -> None:
    names, states, findings = verdicts
    name, fault = names[index], FAULTS[index]
    state = states.get(name, {})  # without a state where it was not even tried
    reason = state.get("reason", "")
    # the traceback of our stand-in
    backend = "\n\nAt:\n" in reason
    by = "nobody" if state.get("state") == "READY" else "backend" if backend else "core"
    assert fault.by in {by, "dies"}, state
    found = [f"{finding.where}: {finding.what}" for finding in findings if finding.model == name]
    assert any(fault.says in line for line in found), found
