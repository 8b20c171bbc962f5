"""An engine is built once more as it was built, with its blocks shown."""

from dataclasses import replace
from pathlib import Path

import pytest

from msn_export import manifest
from msn_export.commands import drift, trt
from msn_export.commands.jobs import TrtJob
from msn_export.engine_header import read_header
from msn_export.errors import ManifestError
from msn_export.manifest import Manifest
from msn_export.progress import Silent
from msn_export.spec import ComputeCapability
from tests.builders.artifacts import copy_of, engine


def described(path: Path) -> Manifest:
    read = manifest.read(path)
    assert read is not None
    return read


def test_it_is_for_the_same_gpus_and_shows_its_blocks(tmp_path) -> None:
    made = drift.build_marked(engine(), described(engine()), tmp_path, Silent())
    assert read_header(made).targets.named == (ComputeCapability(8, 9),)
    again = described(made)
    shown = [spec.name for spec in again.outputs if spec.name.startswith("seen:block ")]
    assert len(shown) == again.config["depth"]
    assert {spec.name for spec in described(engine()).outputs} < {s.name for s in again.outputs}
    assert again.profiles == described(engine()).profiles


def job_for(monkeypatch: pytest.MonkeyPatch, path: Path, folder: Path, **changes) -> TrtJob:
    """See how an engine whose record is changed would be built."""
    jobs: list[TrtJob] = []

    def run_trt(job: TrtJob, _progress: Silent) -> tuple[Path, None]:
        jobs.append(job)
        return folder, None

    monkeypatch.setattr(trt, "run_trt", run_trt)
    read = described(engine())
    assert read.engine is not None
    read = replace(read, engine=replace(read.engine, **changes))
    drift.build_marked(path, read, folder, Silent())
    return jobs[0]


def test_full_tensorrt_is_told_no_target(tmp_path, monkeypatch) -> None:
    """Its record names the GPU it was built on, and its compiler takes no target at all."""
    path = copy_of(engine(), tmp_path)
    path.write_bytes(b"ftrt" + bytes(20) + bytes((10, 16, 1, 11)) + bytes(100))
    graph = engine().with_name("m.onnx")
    (tmp_path / "m.onnx").write_bytes(graph.read_bytes())
    changes = {"backend": "tensorrt", "compute_capabilities": ("8.0",), "later": True}
    changes["options"] = {"tf32": True, "hardware_compatible": True}
    job = job_for(monkeypatch, path, tmp_path, **changes)
    assert (job.backend, job.capabilities) == ("tensorrt", ())
    assert job.tf32
    assert job.hardware_compatible


def test_tensorrt_rtx_is_told_what_it_was_told(tmp_path, monkeypatch) -> None:
    job = job_for(monkeypatch, engine(), tmp_path)
    assert (job.backend, job.capabilities) == ("tensorrt-rtx", (ComputeCapability(8, 9),))
    assert not job.tf32


def test_without_its_graph_it_cannot_be_built_again(tmp_path) -> None:
    path = copy_of(engine(), tmp_path)
    with pytest.raises(
        ManifestError, match=r"was built from m\.onnx .* which is not beside it; put"
    ):
        drift.build_marked(path, described(path), tmp_path, Silent())
