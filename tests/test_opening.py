"""What is checked before an artifact is loaded, and what is said where it does not belong."""

import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from artifacts import classifier, copy_of, engine, pretend
from manifests import example
from networks import Network, compute
from tensorrt_stand_in import plan_of
from trt_bench import one_device

from msn_export import manifest as manifests
from msn_export.driver import Device, Driver, NoDriver
from msn_export.engine_header import EngineHeader
from msn_export.errors import (
    EngineFileError,
    GraphError,
    ManifestError,
    MissingPackageError,
    RunnerError,
)
from msn_export.manifest_records import SourceRecord
from msn_export.runtime import engine_opening, open_runner
from msn_export.runtime.admission import Admitted, rebuild
from msn_export.runtime.loaders import Loaded
from msn_export.sidecar import manifest_path, sha256_of
from msn_export.spec import BatchRange, ComputeCapability

ADA = Device(0, "NVIDIA L4", ComputeCapability(8, 9), 24 << 30)
HOPPER = Device(0, "NVIDIA H200", ComputeCapability(9, 0), 140 << 30)


def found(monkeypatch: pytest.MonkeyPatch, driver: Driver | NoDriver) -> None:
    monkeypatch.setattr(engine_opening, "find_driver", lambda: driver)


def rewrite(artifact: Path, **changes: object) -> None:
    """Change a manifest and seal it again."""
    known = manifests.read(artifact)
    assert known is not None
    manifest_path(artifact).write_text(manifests.seal(replace(known, **changes)))


def foreign(folder: Path, network: Network, version: str = "11.4.0.106") -> Path:
    """Write an engine of full TensorRT, as the stand-in reads it, without a manifest."""
    path = folder / "theirs.engine"
    path.write_bytes(plan_of(network, version))
    return path


def test_what_does_not_exist_is_told(tmp_path) -> None:
    with pytest.raises(RunnerError, match=r"none\.engine does not exist; give an \.onnx file or"):
        open_runner(tmp_path / "none.engine")


def test_an_engine_without_a_manifest_must_be_trusted(tmp_path, monkeypatch) -> None:
    network = Network()
    path = foreign(tmp_path, network)
    with pytest.raises(
        ManifestError, match=r"theirs\.engine has no manifest .* or pass trust=True"
    ):
        open_runner(path)
    pretend(monkeypatch, "strategy")
    with open_runner(path, trust=True) as runner:
        images = network.images(3)
        np.testing.assert_array_equal(
            runner(images).embedding, compute(network, images)["embedding"]
        )
        assert runner.manifest is None


def test_a_changed_engine_is_refused_before_anything_is_loaded(tmp_path, monkeypatch) -> None:
    path = copy_of(engine(), tmp_path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    recorder = pretend(monkeypatch, "config")
    for trust in (False, True):
        with pytest.raises(
            ManifestError, match=r"is not the file its manifest describes .*; rebui"
        ):
            open_runner(path, trust=trust)
    assert recorder.calls == []


def test_a_manifest_of_a_later_version_is_refused(tmp_path) -> None:
    path = copy_of(engine(), tmp_path)
    rewrite(path, schema=manifests.SCHEMA + 1)
    with pytest.raises(ManifestError, match="has schema 2, this version reads up to 1; upgrade"):
        open_runner(path)


def test_a_manifest_of_another_kind_is_refused(tmp_path) -> None:
    path = copy_of(engine(), tmp_path)
    graph = manifest_path(classifier())
    manifest_path(path).write_bytes(graph.read_bytes())
    with pytest.raises(ManifestError, match=r"m\.engine\.json describes no engine; export"):
        open_runner(path)
    other = copy_of(classifier(), tmp_path)
    manifest_path(other).write_bytes(manifest_path(engine()).read_bytes())
    with pytest.raises(ManifestError, match=r"m\.onnx\.json describes no graph; export"):
        open_runner(other)


def test_a_manifest_that_names_another_flavour_is_refused(tmp_path) -> None:
    path = copy_of(engine(), tmp_path)
    known = manifests.read(path)
    assert known is not None
    assert known.engine is not None
    rewrite(path, engine=replace(known.engine, backend="tensorrt"))
    with pytest.raises(
        ManifestError, match="is an engine of tensorrt-rtx, and its manifest says tensorrt"
    ):
        open_runner(path)


def test_a_truncated_engine_is_told_even_if_trusted(tmp_path) -> None:
    path = tmp_path / "m.engine"
    path.write_bytes(engine().read_bytes()[:-9])
    with pytest.raises(EngineFileError, match="is damaged: it is truncated"):
        open_runner(path, trust=True)


def test_without_a_driver_nothing_of_tensorrt_is_touched(tmp_path) -> None:
    code = (
        "import sys\n"
        "from msn_export.runtime import RunnerError, engine_opening, open_runner\n"
        "from msn_export.driver import NoDriver\n"
        "engine_opening.find_driver = lambda: NoDriver('no NVIDIA driver')\n"
        f"try: open_runner({str(engine())!r})\n"
        "except RunnerError as error: print(error)\n"
        "print([name for name in sys.modules if name.startswith(('tensorrt', 'cuda'))])\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told, loaded = run.stdout.splitlines()
    assert "needs an NVIDIA GPU, and here: no NVIDIA driver; run its .onnx with" in told
    assert loaded == "[]"


@pytest.mark.parametrize(
    ("device", "here", "target"),
    [
        # no engine of TensorRT-RTX is for the data centre's 9.0: full TensorRT has to build it
        (HOPPER, "NVIDIA H200 (SM 9.0)", "tensorrt"),
        (
            replace(ADA, name="RTX 5090", capability=ComputeCapability(12, 0)),
            "RTX 5090 (SM 12.0)",
            "tensorrt-rtx --compute-capability 12.0",
        ),
    ],
)
def test_another_gpu_generation_is_told_with_the_command_that_rebuilds(
    monkeypatch, device, here, target
) -> None:
    found(monkeypatch, one_device(device))
    version = importlib.import_module("tensorrt_rtx").__version__
    with pytest.raises(RunnerError) as at:
        open_runner(engine())
    assert str(at.value) == (
        f"engine {engine()} was built with tensorrt-rtx {version} for SM 8.9; here is {here}; "
        f"rebuild it with: msn-export trt m.onnx --fp16 --backend {target} --batch 1:8:32 --force"
    )


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_a_gpu_that_no_engine_claims_is_tried_where_that_is_asked_for(
    monkeypatch, later, asked
) -> None:
    monkeypatch.delenv("MSN_EXPORT_ANY_GPU", raising=False)
    if asked is not None:
        monkeypatch.setenv("MSN_EXPORT_ANY_GPU", asked)
    claimed = tuple(ComputeCapability(*pair) for pair in ((8, 0), (8, 9), (12, 1)))
    header = EngineHeader("tensorrt-rtx", "1.6.1.120", 1, claimed, later)
    engine = Admitted(Path("m.engine"), b"", header, None)
    assert engine.is_for(HOPPER) == (later and asked == "1")
    assert engine.is_for(ADA)
    assert engine.is_for(replace(ADA, capability=ComputeCapability(13, 0))) == later
    assert not engine.is_for(replace(ADA, capability=ComputeCapability(7, 5)))


def test_the_first_gpu_that_fits_is_taken(monkeypatch) -> None:
    pretend(monkeypatch, "config", Network())
    second = replace(ADA, index=1)
    found(monkeypatch, Driver("13.0", (HOPPER, second)))
    version = importlib.import_module("tensorrt_rtx").__version__
    monkeypatch.setattr(
        engine_opening,
        "load",
        _with_version(engine_opening.load("tensorrt-rtx", compatible=False), version),
    )
    with open_runner(engine()) as runner:
        assert runner.name.endswith("NVIDIA L4")
    with pytest.raises(RunnerError, match=r"here is NVIDIA H200 \(SM 9\.0\)"):
        open_runner(engine(), device=0)
    with pytest.raises(RunnerError, match="device 2 does not exist; here are 0: NVIDIA H200, 1: "):
        open_runner(engine(), device=2)


def _with_version(loaded: Loaded, version: str):
    return lambda _backend, compatible: replace(loaded, version=version)


def test_another_version_of_tensorrt_is_told(monkeypatch) -> None:
    recorder = pretend(monkeypatch, "config", version="1.6.1.120")
    with pytest.raises(
        RunnerError,
        match=r"here is tensorrt-rtx 1\.6\.1\.120, which does not load it; rebuild it with: msn-ex",
    ):
        open_runner(engine())
    assert recorder.calls == []


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
        known, sha256=sha256_of(path), engine=record, profiles=(BatchRange(1, 2, 4),)
    )
    manifest_path(path).write_text(manifests.seal(described))
    recorder = pretend(monkeypatch, "strategy")
    with open_runner(path, contexts=1, cuda_graphs=False) as runner:
        images = network.images(6)
        np.testing.assert_array_equal(runner(images).odd, compute(network, images)["odd"])
        assert runner.labels == ("class 0", "class 1", "class 2")
    assert recorder.live() == {}


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

    monkeypatch.setattr(engine_opening.importlib, "import_module", without)
    with pytest.raises(
        MissingPackageError, match=r"^cuda-bindings is not installed; pip install 'msn-export\[rtx"
    ):
        engine_opening.load_cuda("tensorrt-rtx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    for name in ("ort", "ort_session"):
        monkeypatch.delitem(sys.modules, f"msn_export.runtime.{name}", raising=False)
    with pytest.raises(MissingPackageError, match=r"onnxruntime cannot be imported .*\[ort\]'"):
        open_runner(classifier())


def test_the_manifest_is_json_that_says_what_would_rebuild_it() -> None:
    told = json.loads(manifest_path(engine()).read_text())
    assert told["source"]["file"] == "m.onnx"
    assert told["golden"]["output"] == "logits"


def test_the_command_that_rebuilds_does_nothing_else() -> None:
    hostile = replace(example(), source=SourceRecord("m; rm -rf ~ #.onnx", "ef" * 32))
    assert rebuild(hostile).startswith(
        "rebuild it with: msn-export trt 'm; rm -rf ~ #.onnx' --fp16 --backend "
    )
