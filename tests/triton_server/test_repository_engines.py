"""Engines in a repository: for several GPUs, of several profiles, of a release's TensorRT."""

import json

import pytest

from msn_export.spec import BatchRange
from tests.builders.engine_builds import built
from tests.builders.engine_graphs import Vit
from tests.builders.triton_artifacts import graph, plan
from tests.builders.triton_runs import config_of, invoke, refused

pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")


def test_engines_for_several_gpus_are_one_model(tmp_path) -> None:
    for sm in ("8.6", "8.9"):
        plan(tmp_path / f"m{sm}.engine", capability=sm)
    result = invoke(
        *(tmp_path / f"m{sm}.engine" for sm in ("8.6", "8.9")),
        *("-o", tmp_path / "repo", "--name", "vit"),
    )
    assert result.exit_code == 0, result.output
    config = config_of(tmp_path / "repo", "vit/config.pbtxt")
    assert dict(config.cc_model_filenames) == {
        "8.6": "model.sm86.plan",
        "8.9": "model.sm89.plan",
    }
    assert sorted(path.name for path in (tmp_path / "repo/vit/1").iterdir()) == [
        "model.sm86.plan", "model.sm86.plan.json", "model.sm89.plan", "model.sm89.plan.json",
    ]  # fmt: skip


def test_several_profiles_are_one_groups_and_their_optima_preferred(tmp_path) -> None:
    profiles = (BatchRange(1, 2, 4), BatchRange(5, 8, 16))
    plan(tmp_path / "m.engine", profiles=profiles)
    arguments = (tmp_path / "m.engine", "-o", tmp_path / "repo", "--cuda-graphs")
    assert invoke(*arguments).exit_code == 0
    config = config_of(tmp_path / "repo", "m/config.pbtxt")
    (group,) = config.instance_group
    assert list(group.profile) == ["0", "1"]
    assert list(config.dynamic_batching.preferred_batch_size) == [2, 8]
    assert not config.HasField("optimization")
    gpu = config_of(tmp_path / "repo", "m/configs/gpu.pbtxt").optimization.cuda
    assert gpu.graphs
    assert [spec.batch_size for spec in gpu.graph_spec] == [1, 2, 8, 16]


def test_profiles_with_a_gap_are_refused_with_the_batch_nobody_takes(tmp_path) -> None:
    plan(tmp_path / "m.engine", profiles=(BatchRange(1, 1, 1), BatchRange(8, 16, 32)))
    line = refused(tmp_path / "m.engine", "-o", tmp_path / "repo")
    assert "m.engine takes no batch of 2 (its profiles: 1:1:1, 8:16:32)" in line
    assert "or give --max-batch 1" in line
    plan(tmp_path / "n.engine", profiles=(BatchRange(4, 8, 16),))
    assert "n.engine takes no batch of 1" in refused(tmp_path / "n.engine", "-o", tmp_path / "repo")
    line = refused(tmp_path / "m.engine", "-o", tmp_path / "repo", "--max-batch", 64)
    assert not (tmp_path / "repo").exists()


def test_an_engine_of_one_batch_is_served_at_that_batch(tmp_path) -> None:
    plan(tmp_path / "m.engine", profiles=(BatchRange(8, 8, 8),))
    assert invoke(tmp_path / "m.engine", "-o", tmp_path / "repo").exit_code == 0
    config = config_of(tmp_path / "repo", "m/config.pbtxt")
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [8, 3, 8, 8]


def test_engines_that_are_not_one_model_are_refused(tmp_path) -> None:
    a = plan(tmp_path / "a.engine")
    same = plan(tmp_path / "b.engine")
    other = plan(tmp_path / "c.engine", capability="8.6", version="10.14.1.48")
    out = ("-o", tmp_path / "repo")
    assert "are both for SM 8.9; give one" in refused(a, same, *out)
    assert "differ in their built with" in refused(a, other, *out)
    onnx_file = graph(tmp_path / "m.onnx")
    assert "an .onnx runs on all; give it alone" in refused(a, onnx_file, *out)
    manifestless = plan(tmp_path / "d.engine")
    (tmp_path / "d.engine.json").unlink()
    assert "has no manifest, and an engine does not tell its tensors" in refused(manifestless, *out)


def test_an_engine_for_any_gpu_serves_those_without_one_of_their_own(tmp_path) -> None:
    hopper = plan(tmp_path / "hopper.engine", capability="9.0")
    any_gpu = plan(tmp_path / "any.engine", capability="8.0", later=True)
    assert invoke(hopper, any_gpu, "-o", tmp_path / "repo", "--name", "m").exit_code == 0
    config = config_of(tmp_path / "repo", "m/config.pbtxt")
    assert dict(config.cc_model_filenames) == {"9.0": "model.sm90.plan"}
    files = {file.name for file in (tmp_path / "repo/m/1").iterdir()}
    assert files >= {"model.plan", "model.sm90.plan"}
    assert invoke("--lint", tmp_path / "repo").exit_code == 0


def test_an_engine_of_tensorrt_rtx_is_refused_with_what_to_do(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    line = refused(built(Vit()).output, "-o", tmp_path / "repo", "--name", "m")
    assert "a TensorRT-RTX 1." in line
    assert "serve the .onnx, or compile with --backend tensorrt on the machine with the GPU" in line


def test_an_engine_whose_tensorrt_no_release_has_can_be_served_by_a_release_of_ones_own(
    tmp_path,
) -> None:
    plan(tmp_path / "m.engine", version="11.2.0.5")
    line = refused(tmp_path / "m.engine", "-o", tmp_path / "repo")
    assert "no Triton release is known to ship TensorRT 11.2.0.5" in line
    result = invoke(tmp_path / "m.engine", "-o", tmp_path / "repo", "--release", "26.09", "--json")
    *_, note = json.loads(result.stdout)["notes"]
    assert "which TensorRT is in Triton 26.09 is not known; it needs 11.2.0.5" in note
    wrong = refused(tmp_path / "m.engine", "-o", tmp_path / "two", "--release", "25.10")
    assert "built by TensorRT 11.2.0.5, and Triton 25.10 has 10.13.3.9" in wrong
    assert not (tmp_path / "two").exists()


def test_a_version_compatible_engine_is_served_by_the_newest_release(tmp_path) -> None:
    plan(tmp_path / "m.engine", version="10.12.0.36", options={"version_compatible": True})
    assert invoke(tmp_path / "m.engine", "-o", tmp_path / "repo").exit_code == 0
    readme = (tmp_path / "repo/m/README.md").read_text()
    assert "--backend-config=tensorrt,version-compatible=true" in readme
