"""``msn-export drift``: where two artifacts part, whatever form and precision each has."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import faults
import numpy as np
import onnx_ir as ir
import pytest
from artifacts import classifier, copy_of, engine, no_driver
from checkpoints import hugging_face
from click.testing import CliRunner, Result
from tiny_artifacts import foreign, pictures

from msn_export import manifest
from msn_export.check.gate import DRIFT, HEADROOM
from msn_export.cli import main
from msn_export.errors import GraphError, ManifestError
from msn_export.graph.narrow import narrow_to_first_token
from msn_export.progress import Silent
from msn_export.proof import artifact, streams
from msn_export.proof.marked import build_marked
from msn_export.spec import Dtype


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"), 5)


def checkpoint() -> str:
    return str(classifier().parent / "hf")


def drift(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["drift", *map(str, arguments)])


def told(*arguments: object) -> dict[str, Any]:
    """Ask as a script does: one JSON object, and the exit code that goes with its verdict."""
    result = drift(*arguments, "--json")
    assert result.exit_code in {0, 1}, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["passed"] is (result.exit_code == 0) is (found["parted"] is None)
    return found


def refused(*arguments: object) -> str:
    result = drift(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    return result.stderr.strip().splitlines()[-1]


def exported(folder: Path, *options: str) -> Path:
    output = folder / "other.onnx"
    result = CliRunner().invoke(main, ["onnx", checkpoint(), "-o", str(output), *options])
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("half"), "--dtype", "fp16")


STAGES = ["patch embedding", "block 0", "block 1", "logits"]


# --- pairs that agree -----------------------------------------------------------------------------


def test_a_checkpoint_and_its_graph_part_nowhere(images) -> None:
    found = told(checkpoint(), classifier(), "--images", images)
    assert found["passed"]
    stages = found["stages"]
    assert [stage["tensor"]["name"] for stage in stages] == STAGES
    # a few times what fp32 rounds away, measured in fp64 for each stage
    assert all(0 < stage["tensor"]["relative"] < stage["allowed"] < 1e-5 for stage in stages)
    assert found["check"]["passed"]
    assert found["check"]["images"] == 5
    names = [tensor["name"] for tensor in found["inside"]]
    assert {name.split(".")[2] for name in names if "." in name} == {
        "norm1", "attn", "norm2", "mlp"
    }  # fmt: skip


def test_the_table_has_a_line_a_stage_and_the_block_that_adds_most(images, half) -> None:
    result = drift(classifier(), half, "--images", images)
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(line.endswith("5 images") for line in lines[:3])
    assert "stage 1 - cos error allowed added max_abs peak headroom peak in" in lines
    for stage in STAGES:
        assert any(line.startswith(f"{stage} ") for line in lines)
    assert any(
        line.startswith("No stage is past what is allowed; block ")
        and "adds the most error, " in line
        and line.endswith(" times the median block.")
        for line in lines
    )
    assert any(line.startswith("inside block ") for line in lines)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_typed_graph_is_held_to_its_own_rounding(dtype, images, tmp_path) -> None:
    typed = exported(tmp_path, "--dtype", dtype)
    found = told(classifier(), typed, "--images", images)
    assert found["passed"]
    assert found["dtype"] == dtype
    assert {stage["allowed"] for stage in found["stages"]} == {DRIFT[Dtype(dtype)]}
    # the finer graph's rounding is past what is allowed of fp32
    strict = told(classifier(), typed, "--images", images, "--tolerance", 4e-6)
    assert strict["parted"] == "patch embedding"


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_half_precision_and_8_bits_are_compared_block_by_block(
    dtype, images, half, tmp_path
) -> None:
    quantised = tmp_path / "q.onnx"
    options = ["-o", str(quantised), f"--{dtype}", "--images", str(images), "--smooth", "0.5"]
    made = CliRunner().invoke(main, ["calibrate", str(classifier()), *options])
    assert made.exit_code == 0, made.output
    found = told(half, quantised, "--images", images)
    assert found["passed"]
    assert found["dtype"] == dtype
    assert {stage["allowed"] for stage in found["stages"]} == {DRIFT[Dtype(dtype)]}
    # eight bits are not sixteen: by fp16's own number they part
    assert told(half, quantised, "--images", images, "--tolerance", 5e-3)["parted"]
    assert any("q.onnx was smoothed: some channels inside" in note for note in found["notes"])


def test_every_target_is_matched_with_every_other(images, tmp_path) -> None:
    found = told(classifier(), exported(tmp_path, "--target", "tensorrt-8"), "--images", images)
    assert found["passed"]
    assert [stage["tensor"]["name"] for stage in found["stages"]] == STAGES


def test_a_last_block_of_one_token_is_compared_at_that_token(images, tmp_path) -> None:
    narrow = faults.plant(classifier(), tmp_path / "m.onnx", narrow_to_first_token)
    found = told(checkpoint(), narrow, "--images", images)
    assert found["passed"]
    assert [s["tensor"]["first_token"] for s in found["stages"]] == [False, False, True, False]
    assert "block 1 ([CLS])" in drift(checkpoint(), narrow, "--images", images).stdout


# --- pairs that part ------------------------------------------------------------------------------


def test_the_block_that_parts_is_named_and_looked_into(images, tmp_path) -> None:
    def half_the_output(model: ir.Model) -> None:
        faults.edit(model, "blocks.1.mlp.fc2.weight", lambda w: w / 2)

    planted = faults.plant(classifier(), tmp_path / "m.onnx", half_the_output)
    found = told(checkpoint(), planted, "--images", images)
    assert found["parted"] == found["suspect"] == "block 1"
    usual = found["stages"][1]["allowed"]
    wrong = next(t for t in found["inside"] if not t["relative"] <= 10 * usual)
    assert wrong["name"] in {"blocks.1.mlp.fc2", "block 1 MLP"}
    result = drift(checkpoint(), planted, "--images", images)
    assert "They part at block 1, the first stage whose error is not allowed." in result.stdout


def test_a_block_that_is_no_number_parts(images, tmp_path) -> None:
    def spoil(model: ir.Model) -> None:
        faults.edit(model, "blocks.0.mlp.fc2.bias", lambda b: np.r_[b[:-1], np.float32(np.nan)])

    planted = faults.plant(classifier(), tmp_path / "m.onnx", spoil)
    found = told(classifier(), planted, "--images", images, "--tolerance", 1e9)
    assert found["parted"] == "block 0"
    assert found["stages"][1]["tensor"]["nan"] > 0
    assert not found["check"]["passed"]


# --- headroom -------------------------------------------------------------------------------------


def test_headroom_is_65504_over_the_largest_value_of_any_tensor_in_the_block(
    images, tmp_path
) -> None:
    def enlarge(model: ir.Model) -> None:
        """A hidden value near 30000, scaled back by the matrix that reads it."""
        faults.edit(model, "blocks.1.mlp.fc1.bias", lambda b: np.r_[np.float32(3e4), b[1:]])
        faults.edit(model, "blocks.1.mlp.fc2.weight", lambda w: np.r_[w[:1] * 1e-4, w[1:]])

    large = faults.plant(classifier(), tmp_path / "m.onnx", enlarge)
    first, second = told(large, large, "--images", images)["stages"][1:3]
    assert first["peak"] < 1000
    assert second["peak"] == pytest.approx(3e4, rel=0.01)
    assert second["peak_tensor"].startswith("blocks.1.mlp.")
    shown = drift(large, large, "--images", images).stdout
    (line,) = (line for line in shown.splitlines() if line.startswith(" block 1"))
    assert float(line.split()[8]) == pytest.approx(65504 / 3e4, rel=0.05)
    assert float(line.split()[8]) < HEADROOM


# --- what cannot be compared ----------------------------------------------------------------------


def test_graphs_of_other_depths_are_refused(tmp_path) -> None:
    hugging_face(tmp_path / "three", labels=3, num_hidden_layers=3)
    assert refused(classifier(), tmp_path / "three") == (
        f"error: {classifier()} has 2 blocks (block 0 to block 1) and {tmp_path / 'three'} 3 "
        "blocks (block 0 to block 2); they cannot be matched"
    )


def test_what_has_no_residual_stream_is_refused(tmp_path) -> None:
    graph = foreign(tmp_path / "m.onnx", ["b", 3, 32, 32], {"logits": 3})
    assert "no residual stream" in refused(classifier(), graph)


def test_an_engine_is_refused_before_anything_is_compiled(tmp_path) -> None:
    assert refused(classifier(), engine()) == (
        f"error: {engine()} cannot run here: {no_driver()}; run this command on the machine that "
        "has its GPU, or compare the graph it was built from"
    )


def test_an_engine_without_its_graph_cannot_be_looked_into(tmp_path) -> None:
    alone = copy_of(engine(), tmp_path)
    described = manifest.read(alone)
    with pytest.raises(ManifestError) as raised:
        build_marked(alone, described, tmp_path, Silent())
    assert str(raised.value) == (
        f"{alone} was built from m.onnx (sha256 {described.source.sha256[:12]}…), which is not "
        f"beside it; put it at {tmp_path / 'm.onnx'}, for drift builds it once more with its "
        "blocks shown"
    )


def test_an_engine_that_came_from_nowhere_cannot_be_looked_into(tmp_path) -> None:
    lost = replace(manifest.read(engine()), source=None)
    with pytest.raises(ManifestError) as raised:
        build_marked(engine(), lost, tmp_path, Silent())
    assert str(raised.value) == f"the manifest of {engine()} does not say which graph it came from"


def test_an_engine_as_it_is_shows_nothing(tmp_path) -> None:
    with pytest.raises(GraphError) as raised:
        streams.what_is_shown(artifact.open_artifact(str(engine())), ("logits",))
    assert str(raised.value) == (
        f"{engine()}: an engine shows no tensors on its way; compare the graph it was built from"
    )


def test_an_engine_is_built_once_more_with_its_blocks_shown(tmp_path) -> None:
    marked = build_marked(engine(), manifest.read(engine()), tmp_path, Silent())
    outputs = [spec.name for spec in manifest.read(marked).outputs]
    assert outputs == ["logits", "seen:patch embedding", "seen:block 0", "seen:block 1"]
    assert {spec.dtype for spec in manifest.read(marked).outputs} == {"float"}
    assert manifest.read(marked).engine.fused_attention == 2


def test_an_engine_is_compared_with_its_graph_block_by_block(images, monkeypatch) -> None:
    graph = artifact.open_artifact(str(classifier()))

    class Marked:
        """What the engine with its blocks shown gives, computed by its graph."""

        name = "TensorRT on a stand-in GPU"

        def __init__(self) -> None:
            self.stream = streams.open_stream(graph, ("logits",), tuple(STAGES))

        def __call__(self, batch: np.ndarray) -> dict[str, np.ndarray]:
            found = self.stream(batch)
            return {n if n == "logits" else f"seen:{n}": value for n, value in found.items()}

        def close(self) -> None:
            self.stream.close()

    for module in (artifact, streams):
        monkeypatch.setattr(module, "open_engine", lambda _path: Marked())
    found = told(checkpoint(), engine(), "--images", images)
    assert found["passed"]
    assert found["dtype"] == "fp16"
    assert [stage["tensor"]["name"] for stage in found["stages"]] == STAGES
    assert found["suspect"] is not None
    assert found["inside"] == []  # an engine shows no more
    assert (
        "TensorRT on a stand-in GPU, built once more with its blocks shown"
        in (found["check"]["executed_on"])
    )
    assert "inside block" not in drift(checkpoint(), engine(), "--images", images).stdout


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--preprocess", "squash", "'squash' is unknown; expected hf, msn-eval, "),
        ("--tolerance", "-1", "x>=0"),
        ("--limit", "0", "x>=1"),
        ("--batch", "0", "x>=1"),
    ],
)
def test_a_bad_option_is_named(option, value, message) -> None:
    result = drift(checkpoint(), classifier(), option, value)
    assert result.exit_code == 2
    assert option in result.stderr
    assert message in result.stderr
