"""What is checked before an artifact is loaded, and what is said where it does not belong."""

import importlib
import importlib.util
import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from msn_export import manifest as manifests
from msn_export.errors import (
    GraphError,
    ManifestError,
    MissingPackageError,
    RunnerError,
)
from msn_export.host import Device
from msn_export.manifest import manifest_path, sha256_of
from msn_export.runtime import onnxruntime, open_runner, opening
from msn_export.spec import BatchRange, ComputeCapability
from tests.builders.artifacts import classifier, copy_of, engine, foreign, pretend
from tests.builders.networks import Network, compute

ADA = Device(0, "NVIDIA L4", ComputeCapability(8, 9), 24 << 30)
HOPPER = Device(0, "NVIDIA H200", ComputeCapability(9, 0), 140 << 30)


def test_what_does_not_exist_is_told(tmp_path) -> None:
    with pytest.raises(RunnerError, match=r"none\.engine does not exist; give an \.onnx file or"):
        open_runner(tmp_path / "none.engine")


def test_an_engine_takes_no_providers() -> None:
    with pytest.raises(RunnerError, match="takes no providers; it runs in the TensorRT it is for"):
        open_runner(engine(), providers=["cuda"])


def test_a_described_engine_opens_and_runs(tmp_path, monkeypatch) -> None:
    """A whole artifact of full TensorRT: file, manifest, hash, and the stand-in to run it."""
    network = Network(profiles=((1, 2, 4),))
    path = foreign(tmp_path, network)
    known = manifests.read(engine())
    assert known is not None
    assert known.engine is not None
    record = replace(known.engine, backend="tensorrt", version="11.4.0.106")
    described = replace(
        known,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        engine=record,
        profiles=(BatchRange(1, 2, 4),),
    )
    manifest_path(path).write_text(manifests.seal(described))
    recorder = pretend(monkeypatch, "strategy")
    with open_runner(path, contexts=1, cuda_graphs=False) as runner:
        images = network.images(6)
        np.testing.assert_array_equal(runner(images).odd, compute(network, images)["odd"])
        assert runner.labels == ("class 0", "class 1", "class 2")
    assert recorder.live() == {}


def test_every_option_arrives_where_an_engine_is_opened(monkeypatch) -> None:
    given: list[object] = []

    def require_device(_engine, _driver, device):
        given.append(("device", device))
        return ADA

    monkeypatch.setattr(opening, "require_device", require_device)
    monkeypatch.setattr(opening, "load_cuda", given.append)
    monkeypatch.setattr(opening, "load", lambda backend, **told: given.append(told))
    monkeypatch.setattr(opening, "require_version", lambda *_: None)
    monkeypatch.setattr(
        opening, "TrtRunner", lambda verified, host, **options: (verified, host, options)
    )
    known = manifests.read(engine())
    verified, host, options = open_runner(
        engine(), device=3, contexts=5, cuda_graphs=False, eager_kernels=True
    )
    assert given == [("device", 3), "tensorrt-rtx", {"compatible": False}]
    assert (verified.content, verified.manifest) == (engine().read_bytes(), known)
    assert not verified.compatible
    assert host.device is ADA
    assert options == {"contexts": 5, "cuda_graphs": False, "eager_kernels": True}
    _, _, options = open_runner(engine())
    assert options == {"contexts": 2, "cuda_graphs": True, "eager_kernels": False}


def test_every_option_arrives_where_a_graph_is_opened(monkeypatch) -> None:
    monkeypatch.setattr(onnxruntime, "OrtRunner", lambda *given, **told: (given, told))
    known = manifests.read(classifier())
    opened = open_runner(str(classifier()), providers=["cuda"], device=3, threads=7)
    assert opened == (
        (classifier(), ["cuda"]),
        {"device": 3, "threads": 7, "manifest": known},
    )


def test_a_graph_that_is_not_the_one_described_is_refused(tmp_path) -> None:
    path = copy_of(classifier(), tmp_path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ManifestError, match="is not the file its manifest describes"):
        open_runner(path)


def test_a_graph_that_onnxruntime_refuses_is_told(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no graph")
    with pytest.raises(GraphError, match=r"onnxruntime refuses m\.onnx: "):
        open_runner(path)


def test_missing_packages_are_told_with_the_line_that_installs_them(monkeypatch) -> None:
    real = importlib.import_module

    def without(name: str) -> object:
        if name == "cuda.bindings.driver":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(opening.importlib, "import_module", without)
    with pytest.raises(
        MissingPackageError, match=r"^cuda-bindings is not installed; pip install 'msn-export\[rtx"
    ):
        opening.load_cuda("tensorrt-rtx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for name in ("onnxruntime",):
        monkeypatch.delitem(sys.modules, f"msn_export.runtime.{name}", raising=False)
    with pytest.raises(MissingPackageError, match=r"onnxruntime cannot be imported .*\[ort\]'"):
        open_runner(classifier())


def test_the_manifest_is_json_that_says_what_would_rebuild_it() -> None:
    told = json.loads(manifest_path(engine()).read_text())
    assert told["source"]["file"] == "m.onnx"
    assert told["golden"]["output"] == "logits"
