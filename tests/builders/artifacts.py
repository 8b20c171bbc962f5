"""A tiny classifier, exported and compiled once a test run, and a machine to pretend it runs on."""

import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from msn_export import manifest
from msn_export.cli import main
from msn_export.commands import trt
from msn_export.compare import sides
from msn_export.host import Driver, NoDriver, find_driver
from msn_export.manifest import Manifest
from msn_export.runtime import opening
from msn_export.runtime.versions import LoadedTensorRT
from tests.builders.checkpoints import hugging_face, processor
from tests.builders.networks import Network
from tests.builders.trt_bench import DEVICE, ROWS, one_device
from tests.fakes.cuda_stand_in import CudaStandIn
from tests.fakes.recorder import Recorder
from tests.fakes.tensorrt_stand_in import plan_of, tensorrt_stand_in

_FOLDER = tempfile.TemporaryDirectory(prefix="msn-export-artifacts-")
TARGET = ("--backend", "tensorrt-rtx", "--compute-capability", "8.9")


@cache
def classifier(*options: str) -> Path:
    """Export a classifier of three labels, 32x32, two blocks."""
    folder = Path(tempfile.mkdtemp(dir=_FOLDER.name))
    hugging_face(folder / "hf", labels=3)
    processor(
        folder / "hf", size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    run("onnx", str(folder / "hf"), "-o", str(folder / "m.onnx"), *options)
    return folder / "m.onnx"


@cache
def engine(*options: str) -> Path:
    """Compile it with TensorRT-RTX for SM 8.9."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    output = classifier().with_name("m.engine")
    run("trt", str(classifier()), "-o", str(output), "--fp16", *TARGET, *options)
    return output


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return result


def copy_of(artifact: Path, folder: Path) -> Path:
    """Copy an artifact with its manifest."""
    for path in (artifact, manifest.manifest_path(artifact)):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / artifact.name


def alone(artifact: Path, path: Path, **props: str) -> Path:
    """Copy a graph without its manifest; ``props`` are the only metadata in it, if there are any.

    ``product=""`` is a graph that does not say that it is ours.
    """
    model = onnx.load(artifact)
    if props:
        onnx.helper.set_model_props(model, props)
    path.write_bytes(model.SerializeToString())
    return path


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    contexts: str,
    network: Network | None = None,
    compute: Any = None,
    version: str | None = None,
) -> Recorder:
    """Have a stand-in GPU and TensorRT found on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", tempfile.mkdtemp(dir=_FOLDER.name))
    cuda, recorder = CudaStandIn(), Recorder()
    module = tensorrt_stand_in(cuda, contexts, network, compute)
    loaded = LoadedTensorRT(
        recorder.tensorrt(module), ROWS[contexts], version or module.__version__
    )
    wrapped = recorder.cuda(cuda)
    monkeypatch.setattr(opening, "find_driver", lambda: one_device(DEVICE))
    for module in (trt, sides):
        monkeypatch.setattr(module, "find_driver", lambda: one_device(DEVICE))
    monkeypatch.setattr(opening, "load", lambda _backend, compatible: loaded)
    monkeypatch.setattr(opening, "load_cuda", lambda _backend: wrapped)
    return recorder


def no_driver() -> str:
    """Say why no GPU is found here; a test of that is skipped where there is one."""
    driver = find_driver()
    if not isinstance(driver, NoDriver):
        pytest.skip("there is a GPU here")
    return driver.reason


def found(monkeypatch: pytest.MonkeyPatch, driver: Driver | NoDriver) -> None:
    """Have these GPUs found, or none."""
    monkeypatch.setattr(opening, "find_driver", lambda: driver)


def rewrite(artifact: Path, **changes: object) -> None:
    """Change a manifest, and in a graph's file what that says too."""
    known = manifest.read(artifact)
    assert known is not None
    seal_over(artifact, replace(known, **changes))


def seal_over(artifact: Path, known: Manifest) -> None:
    """Describe a file by a manifest whose size and hash are made the file's; a graph's says so."""
    if artifact.suffix == ".onnx":
        model = onnx.load(artifact)
        if any(prop.key == "product" for prop in model.metadata_props):
            props = {prop.key: prop.value for prop in model.metadata_props}
            onnx.helper.set_model_props(model, {**props, **known.metadata.props()})
            artifact.write_bytes(model.SerializeToString(deterministic=True))
    size, digest = artifact.stat().st_size, manifest.sha256_of(artifact)
    sealed = manifest.seal(replace(known, output=artifact.name, sha256=digest, bytes=size))
    manifest.manifest_path(artifact).write_text(sealed)


def foreign(folder: Path, network: Network, version: str = "11.4.0.106") -> Path:
    """Write an engine of full TensorRT, as the stand-in reads it, without a manifest."""
    path = folder / "theirs.engine"
    path.write_bytes(plan_of(network, version))
    return path
