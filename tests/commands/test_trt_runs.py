"""``msn-export trt`` runs a fresh engine where a GPU is found: over a stand-in for that GPU.

The engine is real, compiled by TensorRT-RTX; what stands in runs the graph it was compiled from.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from click.testing import CliRunner

from msn_export import manifest
from msn_export.cli import main
from msn_export.commands import trt
from msn_export.errors import MissingPackageError
from msn_export.host import Device, NoDriver
from msn_export.runtime import open_runner, opening
from msn_export.spec import ComputeCapability
from tests.builders.artifacts import TARGET, classifier, pretend, rewrite, run
from tests.builders.engine_builds import NEEDS_RTX
from tests.builders.networks import Network
from tests.builders.tiny_artifacts import pictures
from tests.builders.trt_bench import one_device
from tests.contracts import faults

pytestmark = NEEDS_RTX
PROFILES = ((1, 1, 1), (2, 4, 6))
NETWORK = Network(profiles=PROFILES, outputs=(("logits", "float", 3),), sizes=(3, 32, 32))
BATCHES = ("--batch", "1", "--batch", "2:4:6")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), 8)


class Graph:
    """Computes what the exported graph computes; ``spoil`` changes it."""

    def __init__(self, spoil=lambda logits: logits) -> None:
        self.session = onnxruntime.InferenceSession(
            classifier(), providers=["CPUExecutionProvider"]
        )
        self.spoil = spoil
        self.batches: list[int] = []

    def __call__(self, _network: Network, images: np.ndarray) -> dict[str, np.ndarray]:
        self.batches.append(len(images))
        (logits,) = self.session.run(None, {"pixel_values": images})
        return {"logits": self.spoil(logits)}


def build(output: Path, *options: str):
    arguments = ["trt", str(classifier()), "-o", str(output), "--fp16", "--json", *TARGET]
    return CliRunner().invoke(main, [*arguments, *BATCHES, *options])


def test_it_runs_at_every_batch_of_every_profile_and_says_so(tmp_path, monkeypatch) -> None:
    graph = Graph()
    recorder = pretend(monkeypatch, "config", NETWORK, graph)
    use_installed_version(monkeypatch)
    output = tmp_path / "m.engine"
    result = build(output)
    assert result.exit_code == 0, result.output
    engine = json.loads(result.stdout)["engine"]
    assert engine["executed"] is True
    assert engine["reason"].startswith("executed on tensorrt-rtx ")
    assert "Stand-in GPU, batches 1, 2, 4, 6: max_abs " in engine["reason"]
    assert {1, 2, 4, 6} == set(graph.batches)
    assert engine["check"]["passed"] is True
    assert engine["check"]["batches"] == [1, 2, 4, 6]
    assert engine["check"]["reference"].startswith("m.onnx in onnxruntime")
    written = manifest.read(output)
    assert written is not None
    assert written.engine is not None
    assert written.engine.executed
    assert recorder.live() == {}


def use_installed_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the stand-in be of the version that compiles."""
    from dataclasses import replace
    from importlib.metadata import version

    loaded = opening.load("tensorrt-rtx", compatible=False)
    same = replace(loaded, version=version("tensorrt-rtx"))
    monkeypatch.setattr(opening, "load", lambda _backend, compatible: same)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda logits: logits[:, ::-1], "does not agree with its reference: relative error"),
        (lambda logits: logits * np.nan, "NaN and 0 infinite values"),
    ],
)
def test_an_engine_that_computes_something_else_is_not_published(
    tmp_path, monkeypatch, spoil, message
) -> None:
    recorder = pretend(monkeypatch, "config", NETWORK, Graph(spoil))
    use_installed_version(monkeypatch)
    result = build(tmp_path / "m.engine")
    assert result.exit_code == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "error: the engine, run in profile 1:1:1, output 'logits'," in last
    assert message in last
    assert list(tmp_path.iterdir()) == []
    assert recorder.live() == {}


def reason(tmp_path: Path, *options: str) -> str:
    result = build(tmp_path / "m.engine", *options)
    assert result.exit_code == 0, result.output
    engine = json.loads(result.stdout)["engine"]
    assert engine["executed"] is False
    assert engine["check"] is None
    text: str = engine["reason"]
    return text


def test_why_it_was_not_run_is_told(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trt, "find_driver", lambda: NoDriver("no NVIDIA driver (…)"))
    assert reason(tmp_path) == "compiled, not executed: no NVIDIA driver (…)"
    hopper = Device(0, "NVIDIA H200", ComputeCapability(9, 0), 140 << 30)
    monkeypatch.setattr(trt, "find_driver", lambda: one_device(hopper))
    assert reason(tmp_path, "--force").startswith(
        "compiled, not executed: it is for another GPU (tensorrt-rtx "
    )
    monkeypatch.setattr(trt, "find_driver", one_device)
    assert reason(tmp_path, "--force", "--no-check") == (
        "compiled, not executed: no check was asked for (--no-check)"
    )

    def missing(_backend: str) -> None:
        raise MissingPackageError("cuda-bindings is not installed; pip install …")

    monkeypatch.setattr(opening, "find_driver", one_device)
    monkeypatch.setattr(opening, "load_cuda", missing)
    assert reason(tmp_path, "--force") == (
        "compiled, not executed: cuda-bindings is not installed; pip install …"
    )


def test_the_engine_passes_its_selftest_with_the_checkpoints_golden_values(
    tmp_path, monkeypatch
) -> None:
    pretend(monkeypatch, "config", NETWORK, Graph())
    use_installed_version(monkeypatch)
    output = tmp_path / "m.engine"
    run("trt", str(classifier()), "-o", str(output), "--fp16", *TARGET, *BATCHES)
    written, source = manifest.read(output), manifest.read(classifier())
    assert written is not None
    assert source is not None
    assert source.golden is not None
    # the same values, held to what fp16 costs
    assert written.golden == replace(source.golden, limit=written.golden.limit)
    assert written.golden.limit > 100 * source.golden.limit
    assert written.golden.reference.startswith("torch")
    with open_runner(output) as runner:
        told = runner.selftest()
        assert told.passed, str(told)
    pretend(monkeypatch, "config", NETWORK, Graph(lambda logits: logits[:, ::-1]))
    use_installed_version(monkeypatch)
    with open_runner(output) as runner:
        told = runner.selftest()
        assert not told.passed
        assert "selftest failed (relative error" in str(told)


# --- images that change each other's results ------------------------------------------------------


@pytest.mark.parametrize(("dtype", "size"), [("--fp32", 0.5), ("--bf16", 0.5), ("--fp16", 2e-3)])
def test_a_graph_that_joins_images_is_refused_where_one_batch_is_compared(
    dtype, size, images, tmp_path
) -> None:
    """The given graph and the typed one join the same images in the same way."""
    graph = tmp_path / "m.onnx"
    faults.plant(classifier(), graph, partial(faults.mixed_batch, block=1, size=size))
    rewrite(graph, golden=None)  # which shows that the graph is wrong too
    output = tmp_path / "m.engine"
    arguments = [str(graph), "-o", str(output), dtype, "--batch", "8", *TARGET]
    result = CliRunner().invoke(main, ["trt", *arguments, "--images", str(images)])
    assert result.exit_code == 1, result.output
    assert f"error: {graph}: output 'logits': an image's result depends on the batch it is in" in (
        result.stderr
    )
    assert "; ReduceMean 'blocks.1" in result.stderr
    assert not output.exists()
