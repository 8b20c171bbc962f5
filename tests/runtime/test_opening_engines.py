"""What must hold before an engine is loaded: it is what its manifest says, and belongs here."""

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from msn_export import manifest as manifests
from msn_export.engine_header import EngineHeader
from msn_export.errors import EngineFileError, ManifestError, RunnerError
from msn_export.host import Device, Driver
from msn_export.manifest import EngineRecord, SourceRecord, manifest_path, sha256_of
from msn_export.runtime import open_runner, opening
from msn_export.runtime.engine import VerifiedEngine, rebuild, verify_engine_file
from msn_export.runtime.versions import LoadedTensorRT
from msn_export.schema import from_plain, to_plain
from msn_export.spec import ComputeCapability, Dtype, Targets
from tests.builders.artifacts import classifier, copy_of, engine, foreign, found, pretend, rewrite
from tests.builders.manifests import example
from tests.builders.networks import Network, compute
from tests.builders.trt_bench import one_device

ADA = Device(0, "NVIDIA L4", ComputeCapability(8, 9), 24 << 30)
HOPPER = Device(0, "NVIDIA H200", ComputeCapability(9, 0), 140 << 30)


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
        with pytest.raises(ManifestError, match=r"is not the file its manifest describes \(sha256"):
            open_runner(path, trust=trust)
    assert recorder.calls == []


def test_a_manifest_of_a_later_version_is_refused(tmp_path) -> None:
    path = copy_of(engine(), tmp_path)
    rewrite(path, schema=manifests.SCHEMA + 1)
    with pytest.raises(ManifestError, match="has schema 2, this version reads up to 1; upgrade"):
        open_runner(path)


def test_a_manifest_of_another_kind_is_refused(tmp_path) -> None:
    path = copy_of(engine(), tmp_path)
    known = manifests.read(path)
    for changes in ({"kind": "onnx"}, {"kind": "engine", "engine": None}):
        manifest_path(path).write_text(manifests.seal(replace(known, **changes)))
        with pytest.raises(ManifestError, match=r"m\.engine\.json describes no engine; export"):
            open_runner(path)
    other = copy_of(classifier(), tmp_path)
    rewrite(other, kind="engine")
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
        "from msn_export.runtime import RunnerError, opening, open_runner\n"
        "from msn_export.host import NoDriver\n"
        "opening.find_driver = lambda: NoDriver('no NVIDIA driver')\n"
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
    header = EngineHeader("tensorrt-rtx", "1.6.1.120", 1, Targets(claimed, later))
    engine = VerifiedEngine(Path("m.engine"), b"", header, None)
    assert engine.is_for(HOPPER) == (later and asked == "1")
    assert engine.is_for(ADA)
    assert engine.is_for(replace(ADA, capability=ComputeCapability(13, 0))) == later
    assert not engine.is_for(replace(ADA, capability=ComputeCapability(7, 5)))


def test_the_first_gpu_that_fits_is_taken(monkeypatch) -> None:
    engine()  # compiled before a GPU is found
    pretend(monkeypatch, "config", Network())
    second = replace(ADA, index=1)
    found(monkeypatch, Driver("13.0", (HOPPER, second)))
    version = importlib.import_module("tensorrt_rtx").__version__
    monkeypatch.setattr(
        opening,
        "load",
        _with_version(opening.load("tensorrt-rtx", compatible=False), version),
    )
    with open_runner(engine()) as runner:
        assert runner.name.endswith("NVIDIA L4")
    with pytest.raises(RunnerError, match=r"here is NVIDIA H200 \(SM 9\.0\)"):
        open_runner(engine(), device=0)
    with pytest.raises(RunnerError, match="device 2 does not exist; here are 0: NVIDIA H200, 1: "):
        open_runner(engine(), device=2)


def _with_version(loaded: LoadedTensorRT, version: str):
    return lambda _backend, compatible: replace(loaded, version=version)


def test_another_version_of_tensorrt_is_told(monkeypatch) -> None:
    engine()  # compiled before a GPU is found
    recorder = pretend(monkeypatch, "config", version="1.6.1.120")
    with pytest.raises(
        RunnerError,
        match=r"here is tensorrt-rtx 1\.6\.1\.120, which does not load it; rebuild it with: msn-ex",
    ):
        open_runner(engine())
    assert recorder.calls == []


def test_an_engine_of_full_tensorrt_is_for_the_gpus_its_manifest_names(
    tmp_path, monkeypatch
) -> None:
    path = foreign(tmp_path, Network())
    known = manifests.read(engine())
    assert known is not None
    assert known.engine is not None
    ampere = replace(
        known.engine,
        backend="tensorrt",
        version="11.4.0.106",
        compute_capabilities=("8.0",),
        options={"version_compatible": True, "hardware_compatible": True},
    )
    described = replace(
        known, sha256=sha256_of(path), bytes=path.stat().st_size, engine=replace(ampere, later=True)
    )
    manifest_path(path).write_text(manifests.seal(described))
    assert verify_engine_file(path, trust=False).is_for(HOPPER)
    rewrite(path, engine=ampere)
    found(monkeypatch, one_device(HOPPER))
    with pytest.raises(
        RunnerError,
        match=r"built with tensorrt 11\.4\.0\.106 for SM 8\.0; here is NVIDIA H200 \(SM 9\.0\); "
        r"rebuild it with: msn-export trt m\.onnx --fp16 --backend tensorrt --batch 1:8:32 "
        r"--version-compatible --hardware-compatible --force",
    ):
        open_runner(path)


def test_a_manifest_that_names_no_gpu_generation_is_refused() -> None:
    known = manifests.read(engine())
    assert known is not None
    plain = to_plain(known.engine) | {"compute_capabilities": ["ada"]}
    with pytest.raises(ManifestError, match="m: compute capability 'ada' is not a version; expe"):
        from_plain(EngineRecord, plain, "m")


def test_a_quantised_graph_says_its_own_precision() -> None:
    known = example()
    assert known.engine is not None
    unfused = replace(known.engine, options={"allow_unfused": True})
    told = rebuild(replace(known, dtype=Dtype.INT8, engine=unfused))
    assert told.startswith("rebuild it with: msn-export trt m.onnx --backend ")
    assert told.endswith(" --allow-unfused --force")


def test_the_command_that_rebuilds_has_the_numbers_that_were_chosen() -> None:
    engine = example().engine
    assert engine is not None
    options = {"workspace": 1 << 30, "optimization_level": 0, "tf32": True, "lean": "; rm"}
    again = rebuild(replace(example(), engine=replace(engine, options=options)))
    assert again.endswith(" --workspace 1073741824 --optimization-level 0 --tf32 --force")


def test_the_command_that_rebuilds_does_nothing_else() -> None:
    engine = example().engine
    assert engine is not None
    hostile = replace(
        example(),
        source=SourceRecord("m; rm -rf ~ #.onnx", "ef" * 32),
        engine=replace(engine, options={"tf32": True, "x; rm -rf ~ #": True, "force\n": True}),
    )
    assert rebuild(hostile).startswith(
        "rebuild it with: msn-export trt 'm; rm -rf ~ #.onnx' --fp16 --backend "
    )
    assert rebuild(hostile).endswith(" --tf32 --force")
