"""``msn-export drift``: where two artifacts part, whatever form and precision each has."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result

from msn_export import manifest
from msn_export.cli import main
from msn_export.commands.drift import DriftJob, build_marked, run_drift
from msn_export.compare import sides, streams
from msn_export.errors import ManifestError
from msn_export.graph.cls_only import narrow_to_first_token
from msn_export.graph.precision import type_graph
from msn_export.metrics.tolerances import DRIFT, HEADROOM
from msn_export.progress import Silent
from msn_export.spec import Dtype
from tests.builders.artifacts import classifier, copy_of, engine, no_driver
from tests.builders.calibrated_graphs import drop_activation_pairs, scale_weights
from tests.builders.checkpoints import hugging_face
from tests.builders.tiny_artifacts import foreign, pictures
from tests.contracts import faults


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
    # twice what fp32 rounds away, measured in fp64 for each stage
    assert all(0 < stage["own"]["relative"] < stage["own"]["allowed"] < 1e-5 for stage in stages)
    assert all(s["own"]["allowed"] == DRIFT * s["own"]["cost"] for s in stages)
    assert found["how"] == (
        "each block of the candidate was given the reference's own stream; the limit is 2 times "
        "what fp32 rounds away there, measured on the reference as a graph and against fp64"
    )
    assert found["check"]["passed"]
    assert found["check"]["images"] == 5
    names = [tensor["name"] for tensor in found["inside"]]
    assert {name.split(".")[2] for name in names if "." in name} == {
        "norm1", "attn", "norm2", "mlp"
    }  # fmt: skip


def test_the_table_has_a_line_a_stage_and_the_block_that_errs_most(images, half) -> None:
    result = drift(classifier(), half, "--images", images)
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert any(line.endswith("5 images") for line in lines[:3])
    assert "stage 1 - cos error own allowed max_abs peak headroom peak in" in lines
    for stage in STAGES:
        assert any(line.startswith(f"{stage} ") for line in lines)
    assert re.search(
        r"No stage parts; block \d errs the most: its own error is \S+( in attention| in MLP)?, "
        r"\S+ times its cost of \S+, \S+ allowed\. Each block of the candidate was given the "
        r"reference's own stream; the limit is 2 times what fp16 costs there, measured on the "
        r"reference put into fp16\.",
        " ".join(lines),
    )
    assert any(line.startswith("inside block ") for line in lines)


@pytest.mark.parametrize(
    ("dtype", "target"),
    [("fp16", "tensorrt"), ("fp16", "portable"), ("fp16", "onnxruntime"), ("bf16", "tensorrt")],
)
def test_a_typed_graph_errs_as_the_reference_does_in_its_precision(
    dtype, target, images, tmp_path
) -> None:
    typed = exported(tmp_path, "--dtype", dtype, "--target", target, "--input", "uint8")
    for reference in (classifier(), checkpoint()):
        found = told(reference, typed, "--images", images)
        assert found["passed"]
        assert found["dtype"] == dtype
        times = [s["own"]["relative"] / s["own"]["cost"] for s in found["stages"]]
        assert all(0.8 < ratio < 1.2 for ratio in times), times
    # the finer graph's rounding is past what is allowed of fp32
    strict = told(classifier(), typed, "--images", images, "--tolerance", 4e-6)
    assert strict["parted"] == "patch embedding"
    assert strict["how"].endswith("the limit is 4e-06 as asked for")


def quantised(dtype: str, images: Path, output: Path, *options: str) -> Path:
    options = ("-o", str(output), f"--{dtype}", "--images", str(images), *options)
    made = CliRunner().invoke(main, ["calibrate", str(classifier()), *options])
    assert made.exit_code == 0, made.output
    return output


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_8_bits_err_as_the_reference_does_with_the_same_scales(
    dtype, images, half, tmp_path
) -> None:
    candidate = quantised(dtype, images, tmp_path / "q.onnx", "--smooth", "0.5")
    found = told(checkpoint(), candidate, "--images", images)
    assert found["passed"]
    times = [s["own"]["relative"] / s["own"]["cost"] for s in found["stages"]]
    # bias correction leaves the candidate a little less
    assert all(0.7 < ratio < 1.2 for ratio in times), times
    # the reference may be a typed one: its fp32 function is quantised
    typed = told(half, candidate, "--images", images)
    assert typed["passed"]
    assert typed["dtype"] == dtype
    # eight bits are not sixteen: by fp16's own number they part
    assert told(half, candidate, "--images", images, "--tolerance", 5e-3)["parted"]
    assert any("q.onnx was smoothed: some channels inside" in note for note in typed["notes"])


def test_weights_alone_in_8_bits_err_as_the_references_do(images, tmp_path) -> None:
    whole = quantised("int8", images, tmp_path / "q.onnx", "--smooth", "off", "--no-compile")
    sound = faults.plant(whole, tmp_path / "weights.onnx", drop_activation_pairs)
    found = told(checkpoint(), sound, "--images", images)
    assert found["passed"]
    times = [s["own"]["relative"] / s["own"]["cost"] for s in found["stages"]]
    assert all(0.7 < ratio < 1.2 for ratio in times), times
    wrong = faults.plant(sound, tmp_path / "wrong.onnx", partial(scale_weights, factor=1.3))
    assert told(checkpoint(), wrong, "--images", images)["parted"] == "block 1"


def test_8_bits_with_other_scales_are_judged_by_the_other_blocks(images, tmp_path) -> None:
    """One scale for a whole weight is no quantisation that is repeated here."""

    def one_scale(model: ir.Model) -> None:
        for node in model.graph:
            scale = node.inputs[1].const_value if node.op_type == "DequantizeLinear" else None
            if scale is not None and scale.size > 1:
                largest = np.full_like(scale.numpy(), scale.numpy().max())
                node.inputs[1].const_value = ir.tensor(largest.max(), name=node.inputs[1].name)
                node.inputs[1].shape = ir.Shape([])

    found = quantised("int8", images, tmp_path / "q.onnx", "--smooth", "off", "--no-compile")
    other = faults.plant(found, tmp_path / "other.onnx", one_scale)
    judged = told(checkpoint(), other, "--images", images)
    assert (
        "the limit is 2 times the median of the other blocks, for what int8 costs"
        in (judged["how"])
    )
    assert [stage["own"]["cost"] for stage in judged["stages"]] == [None] * 4  # of two blocks


def test_every_target_is_matched_with_every_other(images, tmp_path) -> None:
    found = told(classifier(), exported(tmp_path, "--target", "portable"), "--images", images)
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
    usual = found["stages"][1]["own"]["allowed"]
    wrong = next(t for t in found["inside"] if not t["relative"] <= 10 * usual)
    assert wrong["name"] in {"blocks.1.mlp.fc2", "block 1 MLP"}
    result = drift(checkpoint(), planted, "--images", images)
    assert re.search(
        r"They part at block 1: its own error is \S+ in MLP, \S+ times its cost of",
        " ".join(result.stdout.split()),
    )


def test_what_is_behind_a_fault_is_not_blamed_for_it(images, tmp_path) -> None:
    """The second block is given the reference's stream: it errs no more than without a fault."""

    def wrong(model: ir.Model) -> None:
        faults.edit(model, "blocks.0.mlp.fc2.weight", lambda w: w * 2)

    planted = faults.plant(classifier(), tmp_path / "m.onnx", wrong)
    found = told(checkpoint(), planted, "--images", images)
    assert found["parted"] == "block 0"
    first, second, logits = found["stages"][1:]
    assert first["own"]["relative"] > 0.1
    for behind in (second, logits):
        assert behind["tensor"]["relative"] > 0.01  # running by itself it has the fault in it
        assert behind["own"]["relative"] <= behind["own"]["allowed"]


def test_a_block_that_is_no_number_parts(images, tmp_path) -> None:
    def spoil(model: ir.Model) -> None:
        faults.edit(model, "blocks.0.mlp.fc2.bias", lambda b: np.r_[b[:-1], np.float32(np.nan)])

    planted = faults.plant(classifier(), tmp_path / "m.onnx", spoil)
    for reference in (classifier(), planted):  # in both, nothing agrees either
        found = told(reference, planted, "--images", images, "--tolerance", 1e9)
        assert found["parted"] == "block 0"
        assert found["stages"][1]["tensor"]["nan"] > 0
        assert not found["check"]["passed"]


IRREGULAR = {
    "attention not added": (
        faults.no_residual, "block 1",
        "addition of attention to the stream is missing, the reference's present",
    ),
    "MLP not added": (
        partial(faults.no_residual, mlp=True), "block 1",
        "addition of the MLP to the stream is missing, the reference's present",
    ),
    "norms behind the additions": (
        faults.post_norm, "block 1",
        "order is attention, norm, MLP, norm, the reference's norm, attention, norm, MLP",
    ),
    "QuickGELU": (
        faults.quick_gelu, "block 1", "activation is gelu, sigmoid form, the reference's gelu",
    ),
    "a residual tail": (
        lambda model, _block: faults.tail(model), "logits",
        "number of residual additions is 1, the reference's 0 in the tail",
    ),
}  # fmt: skip


@pytest.mark.parametrize("typed", [False, True])
@pytest.mark.parametrize(("fault", "parted", "why"), IRREGULAR.values(), ids=IRREGULAR.keys())
def test_the_first_stage_of_another_structure_is_named(
    fault, parted, why, typed, images, tmp_path
) -> None:
    def planted(model: ir.Model) -> None:
        fault(model, 1)
        if typed:
            type_graph(model, Dtype.FP16)

    graph = faults.plant(classifier(), tmp_path / "m.onnx", planted)
    faults.describe(classifier(), graph, dtype=Dtype.FP16 if typed else Dtype.FP32)
    for reference in (checkpoint(), classifier()):
        found = told(reference, graph, "--images", images)
        assert found["parted"] == parted
        (stage,) = (s for s in found["stages"] if s["reasons"])
        assert stage["tensor"]["name"] == parted
        assert stage["reasons"] == [why]
        # and its numbers say so too; no other stage errs
        past = [s for s in found["stages"] if not s["own"]["relative"] <= s["own"]["allowed"]]
        assert [s["tensor"]["name"] for s in past] == [parted]


def test_a_block_without_attention_ends_the_comparison_with_its_name(images, tmp_path) -> None:
    lost = faults.plant(classifier(), tmp_path / "m.onnx", partial(faults.no_branch, block=1))
    found = told(checkpoint(), lost, "--images", images)
    assert found["parted"] == found["suspect"] == "block 1"
    assert found["inside"] == []
    assert [s["tensor"]["name"] for s in found["stages"]] == [
        "patch embedding", "block 0", "block 1", "logits"
    ]  # fmt: skip
    assert found["stages"][2]["reasons"] == [
        f"{lost} has 1 blocks and no block 1, {checkpoint()} has 2 blocks"
    ]
    assert found["stages"][2]["own"] is found["stages"][3]["own"] is None
    assert "blocks behind the first that does not match were not compared" in found["notes"]


def test_a_structure_that_the_numbers_do_not_show_parts_all_the_same(images, tmp_path) -> None:
    planted = faults.plant(classifier(), tmp_path / "m.onnx", partial(faults.tanh_gelu, block=1))
    found = told(classifier(), planted, "--images", images, "--tolerance", 1)
    assert found["parted"] == "block 1"
    assert found["stages"][2]["own"]["relative"] <= found["stages"][2]["own"]["allowed"]


# --- images that change each other's results ------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 4])
def test_a_block_that_mixes_the_images_of_a_batch_is_named(batch, images, tmp_path) -> None:
    mixing = faults.plant(classifier(), tmp_path / "m.onnx", partial(faults.mixed_batch, block=1))
    found = told(checkpoint(), mixing, "--images", images, "--batch", batch)
    assert found["parted"] == "block 1"
    first, second = found["check"]["batches"]
    assert first == batch != second
    (why,) = found["stages"][2]["reasons"]
    assert re.fullmatch(
        rf"an image's result depends on the batch it is in: {mixing} gives others by \S+ at batch "
        rf"{second} than at {batch}",
        why,
    )
    # one image alone is right: without the second size nothing would be seen
    own = found["stages"][2]["own"]
    assert (own["relative"] <= own["allowed"]) is (batch == 1)


def test_a_reference_that_mixes_them_is_named_as_the_reference(images, tmp_path) -> None:
    mixing = faults.plant(classifier(), tmp_path / "m.onnx", partial(faults.mixed_batch, block=0))
    found = told(mixing, classifier(), "--images", images, "--batch", 1)
    assert found["parted"] == "block 0"
    assert f"{mixing} gives others by" in found["stages"][1]["reasons"][0]


def test_the_second_batch_size_is_drawn_by_seed_and_said(images) -> None:
    job = DriftJob(str(checkpoint()), str(classifier()), images=images)
    sizes = {run_drift(replace(job, seed=seed)).check.batches for seed in (0, 0, 1, 2)}
    assert len(sizes) > 1
    assert all(first == 4 != second for first, second in sizes)
    again = run_drift(job)
    assert f"and one of {again.check.batches[1]} (drawn by seed 0)" in " ".join(again.notes)


def test_a_fixed_batch_is_all_there_is_and_it_is_said(images, tmp_path) -> None:
    fixed = exported(tmp_path, "--batch", "3")
    found = told(checkpoint(), fixed, "--images", images)
    assert found["passed"]
    assert found["check"]["batches"] == [3]
    assert any(
        note.startswith("batches of 3 alone, which is all that one side takes")
        for note in found["notes"]
    )


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


def test_graphs_of_other_depths_are_compared_as_far_as_they_go(images, tmp_path) -> None:
    other = tmp_path / "three"
    hugging_face(other, labels=3, num_hidden_layers=3)
    found = told(classifier(), other, "--images", images)
    stages = {stage["tensor"]["name"]: stage for stage in found["stages"]}
    assert list(stages) == ["patch embedding", "block 0", "block 1", "block 2", "logits"]
    assert found["parted"] == "block 2"  # the first two are the same
    assert stages["block 2"]["reasons"] == [
        f"{classifier()} has 2 blocks and no block 2, {other} has 3 blocks"
    ]


def test_streams_of_other_sizes_part_where_they_begin(images, tmp_path) -> None:
    other = tmp_path / "wide"
    hugging_face(other, labels=3, hidden_size=96, num_attention_heads=3)
    result = drift(classifier(), other, "--images", images)
    assert result.exit_code == 1
    assert "They part at patch embedding: the stream is 17x96, the reference's 17x64." in (
        " ".join(result.stdout.split())
    )


def test_what_has_no_blocks_is_compared_by_its_outputs(images, tmp_path) -> None:
    graph = foreign(tmp_path / "m.onnx", ["b", 3, 32, 32], {"logits": 3})
    result = drift(classifier(), graph, "--images", images)
    assert result.exit_code == 1
    shown = " ".join(result.stdout.split())
    assert f"They part at patch embedding: {graph} has no blocks that can be found: the" in shown
    assert "The outputs alone were compared." in shown
    found = told(classifier(), graph, "--images", images)
    assert [s["tensor"]["name"] for s in found["stages"]] == ["patch embedding", "logits"]


def test_outputs_of_another_count_are_refused_in_one_line(images, tmp_path) -> None:
    hugging_face(tmp_path / "five", labels=5)
    assert refused(tmp_path / "five", classifier(), "--images", images) == (
        f"error: output 'logits' of {classifier()} is 4x3 and the reference's 4x5; they must be "
        "the same"
    )


def test_pictures_that_cannot_show_a_fault_are_refused_in_one_line(images, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    assert f"image folder {tmp_path / 'empty'} holds no picture" in (
        refused(checkpoint(), classifier(), "--images", tmp_path / "empty")
    )
    one = pictures(tmp_path / "one", 1)
    assert refused(checkpoint(), classifier(), "--images", one) == (
        f"error: {one} holds one readable picture; drift needs two different ones, for it also "
        "looks for images that change each other's results"
    )
    (first,) = one.rglob("*.png")
    (one / "again.png").write_bytes(first.read_bytes())
    assert f"{one} holds 2 pictures all alike; drift needs" in (
        refused(checkpoint(), classifier(), "--images", one)
    )


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


def test_an_engine_is_built_once_more_with_its_blocks_shown(tmp_path) -> None:
    marked = build_marked(engine(), manifest.read(engine()), tmp_path, Silent())
    outputs = [spec.name for spec in manifest.read(marked).outputs]
    assert outputs == ["logits", "seen:patch embedding", "seen:block 0", "seen:block 1"]
    assert {spec.dtype for spec in manifest.read(marked).outputs} == {"float"}
    assert manifest.read(marked).engine.fused_attention == 2


def test_an_engine_is_compared_with_its_graph_block_by_block(images, monkeypatch) -> None:
    graph = sides.open_artifact(str(classifier()))

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

    for module in (sides, streams):
        monkeypatch.setattr(module, "open_engine", lambda _path: Marked())
    found = told(checkpoint(), engine(), "--images", images)
    assert found["passed"]
    assert found["dtype"] == "fp16"
    assert [stage["tensor"]["name"] for stage in found["stages"]] == STAGES
    assert found["suspect"] is not None
    assert found["inside"] == []  # an engine shows no more
    assert found["how"] == (
        "an engine's blocks read its own stream, so what each adds to it was compared; the limit "
        "is 6 times what fp16 costs there, measured on the reference put into fp16"
    )
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
