"""``msn-export validate``: the exit code is the verdict, and what is no agreement never passes."""

import json
import re
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from msn_export import manifest
from msn_export.cli import main
from msn_export.graph import io
from msn_export.metrics import evaluate
from msn_export.metrics.evaluate import draw
from msn_export.onnx_header import UNSEALED
from msn_export.preprocessing import assumed
from msn_export.runtime import open_runner
from msn_export.spec import Dtype, ImageSize, InputFormat
from tests.builders.artifacts import alone as without_manifest
from tests.builders.artifacts import classifier, copy_of, engine, no_driver, pretend, rewrite
from tests.builders.calibrated_graphs import drop_activation_pairs, scale_weights
from tests.builders.checkpoints import hugging_face
from tests.builders.foreign import (
    Reader,
    Reading,
    encoder,
    exported,
    fused_by_onnxruntime,
    halved,
    quantised,
    rewritten,
    scripted,
    without_last_skip,
)
from tests.builders.networks import Network
from tests.builders.tiny_artifacts import foreign, pictures
from tests.contracts import faults


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"), 5)


def checkpoint() -> str:
    return str(classifier().parent / "hf")


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["validate", *map(str, arguments)])


def told(*arguments: object) -> dict[str, Any]:
    """Validate as a script does: one JSON object, and the exit code that goes with its verdict."""
    result = validate(*arguments, "--json")
    assert result.exit_code in {0, 1}, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert found["passed"] is (result.exit_code == 0)
    assert found["passed"] is (found["reasons"] == [])
    return found


def refused(*arguments: object) -> str:
    result = validate(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    return result.stderr.strip().splitlines()[-1]


def with_fault(folder: Path, fault: Any) -> Path:
    return faults.plant(classifier(), folder / "m.onnx", fault)


# --- what agrees ----------------------------------------------------------------------------------


def test_a_checkpoint_and_its_graph_agree_at_every_size_and_a_ragged_one(images) -> None:
    found = told(checkpoint(), classifier(), "--images", images)
    assert found["passed"]
    # 5 pictures: the last batch of a folder; two sizes are drawn
    assert found["check"]["batches"] == [1, 5, 8, 15, 30, 32]
    assert "batch 15 and 30 drawn by seed 0" in found["notes"]
    assert (found["check"]["images"], found["check"]["given"]) == (5, 5)
    assert found["check"]["executed_on"].startswith("onnxruntime")
    assert found["gate_name"] == "fp32"
    figures = found["check"]["outputs"]["logits"]
    assert (figures["nan"], figures["inf"], figures["classes"]) == (0, 0, 1.0)
    assert figures["rounding"] < 3  # of the reference's own, which fp64 tells
    limits = found["check"]["limits"]["logits"]
    assert figures["relative"] <= limits["relative"] < 1e-5
    assert figures["image"] <= limits["image"]
    assert "the reference as a graph in fp32" in found["check"]["limits_from"]
    assert [image["name"] for image in found["check"]["per_image"]] == [
        "a/000.png", "a/002.png", "a/004.png", "b/001.png", "b/003.png"
    ]  # fmt: skip


def test_the_table_has_the_verdict_first_then_reasons_and_worst_images(images) -> None:
    result = validate(checkpoint(), classifier(), "--images", images)
    assert result.exit_code == 0
    text = " ".join(result.stdout.replace("│", " ").split())
    assert "verdict passed on 5 images limits fp32 1.5 times the errors of the reference as" in text
    assert "allowed" in text
    assert "classes agree 100.0%" in text
    assert "worst " in text
    assert ".png: cosine 1.0" in text


def test_two_graphs_are_judged_by_the_coarser_of_their_dtypes(images, tmp_path) -> None:
    half = tmp_path / "half.onnx"
    exported = CliRunner().invoke(main, ["onnx", checkpoint(), "-o", str(half), "--dtype", "fp16"])
    assert exported.exit_code == 0, exported.output
    found = told(classifier(), half, "--images", images)
    assert found["passed"]
    assert found["gate_name"] == "fp16"
    assert "the reference as a graph in fp16" in found["check"]["limits_from"]
    assert found["check"]["twin_error"] == pytest.approx(found["check"]["relative"], rel=0.2)
    strict = told(classifier(), half, "--images", images, "--gate", "fp32")
    assert not strict["passed"]
    assert strict["reasons"][0].startswith("output 'logits': relative error ")


def test_numbers_asked_for_replace_the_gates_and_are_printed_as_such(images) -> None:
    found = told(checkpoint(), classifier(), "--images", images, "--max-abs", 1e-12)
    assert not found["passed"]
    assert re.search(r"max_abs .*, 1\.\de-12 allowed", found["reasons"][0])
    assert found["gate"]["reason"] == "max_abs as asked for, not this gate's own"
    result = validate(checkpoint(), classifier(), "--images", images, "--cosine", 0.5)
    assert "because cosine_min as asked for, not this gate's own" in result.stdout


def test_without_pictures_the_noise_is_called_noise() -> None:
    assert told(checkpoint(), classifier())["check"]["source"].startswith("seeded noise")


# --- what never passes ----------------------------------------------------------------------------


def test_a_manifest_does_not_choose_a_coarser_limit_than_its_graph_has(images, tmp_path) -> None:
    path = with_fault(tmp_path, faults.scaled("logits", 1.0005))
    assert not told(checkpoint(), path, "--images", images)["passed"]
    rewrite(path, dtype=Dtype.FP16)
    assert refused(checkpoint(), path, "--images", images) == (
        f"error: {path}.json says fp16, and {path} computes in fp32; export it again"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_output_that_is_not_finite_never_passes(value, images, tmp_path) -> None:
    def spoil(model: ir.Model) -> None:
        faults.edit(model, "classifier.bias", lambda bias: np.r_[bias[:-1], np.float32(value)])

    found = told(checkpoint(), with_fault(tmp_path, spoil), "--images", images)
    assert not found["passed"]
    assert not found["check"]["passed"]
    figures = found["check"]["outputs"]["logits"]
    assert figures["nan"] + figures["inf"] > 0
    # nor where everything else is allowed
    generous = ("--max-abs", 1e30, "--cosine", 0, "--relative", 1e30)
    assert not told(checkpoint(), tmp_path / "m.onnx", "--images", images, *generous)["passed"]
    table = validate(checkpoint(), tmp_path / "m.onnx", "--images", images)
    assert "FAILED" in table.stdout
    assert "not a number" in table.stdout


def test_a_reference_that_is_not_finite_never_passes_either(images, tmp_path) -> None:
    def spoil(model: ir.Model) -> None:
        faults.edit(model, "classifier.bias", lambda bias: bias * np.float32(np.nan))

    spoiled = with_fault(tmp_path, spoil)
    assert "the reference itself is not finite: output 'logits' of " in refused(
        spoiled, spoiled, "--images", images
    )


def test_no_picture_is_no_pass(tmp_path) -> None:
    assert "holds no picture" in refused(checkpoint(), classifier(), "--images", tmp_path)
    broken = pictures(tmp_path / "broken", 2, (0, 1))
    message = refused(checkpoint(), classifier(), "--images", broken)
    assert "all 2 pictures of " in message


def test_a_broken_picture_is_left_out_and_named(tmp_path) -> None:
    found = told(checkpoint(), classifier(), "--images", pictures(tmp_path, 4, (2,)))
    assert found["passed"]
    assert found["check"]["images"] == 3
    assert any("002.png is not a readable picture" in note for note in found["notes"])


def test_another_shape_is_an_error_and_never_broadcast(images, tmp_path) -> None:
    hugging_face(tmp_path / "hf", labels=4)
    other = tmp_path / "four.onnx"
    exported = CliRunner().invoke(main, ["onnx", str(tmp_path / "hf"), "-o", str(other)])
    assert exported.exit_code == 0, exported.output
    assert refused(classifier(), other, "--images", images) == (
        "error: output has shape [1, 4] and its reference [1, 3]; they must be the same"
    )


def test_outputs_of_fewer_images_than_were_given_are_refused(images, tmp_path) -> None:
    """A graph that forgot its batch agrees at batch 1 alone."""

    def first_only(model: ir.Model) -> None:
        (output,) = model.graph.outputs
        start, end = (ir.tensor(np.array([i], np.int64)) for i in (0, 1))
        values = [
            ir.Value(name=name, const_value=tensor, shape=ir.Shape([1]))
            for name, tensor in (("start", start), ("end", end))
        ]
        for value, tensor in zip(values, (start, end), strict=True):
            value.type, value.dtype = ir.TensorType(tensor.dtype), tensor.dtype
            model.graph.register_initializer(value)
        cut = ir.node("Slice", [output, *values])
        output.name, cut.outputs[0].name = "every", output.name
        cut.outputs[0].dtype = ir.DataType.FLOAT
        cut.outputs[0].shape = ir.Shape([1, 3])
        model.graph.append(cut)
        model.graph.outputs[0] = cut.outputs[0]

    planted = with_fault(tmp_path, first_only)
    message = refused(classifier(), planted, "--images", images)
    assert "output has shape [1, 3] and its reference [5, 3]" in message


# --- preprocessing, both ways ---------------------------------------------------------------------


@pytest.mark.parametrize("turned", [False, True])
def test_a_picture_that_one_preprocessing_alone_reads_is_left_out(tmp_path, turned) -> None:
    folder = pictures(tmp_path / "images", 5)
    Image.fromarray(np.zeros((1, 70_000, 3), np.uint8)).save(folder / "a" / "000-long.png")
    reference, candidate = checkpoint(), str(classifier())
    if turned:
        evaluated = tmp_path / "eval.onnx"
        made = CliRunner().invoke(
            main, ["onnx", reference, "-o", str(evaluated), "--preprocess", "msn-eval"]
        )
        assert made.exit_code == 0, made.output
        reference = str(evaluated)
    options = () if turned else ("--preprocess", "msn-eval")
    found = told(reference, candidate, "--images", folder, *options)
    assert ("5 pictures can be read with both preprocessings" in found["notes"]) is not turned
    assert found["own"]["images"] == 5
    assert [one["name"] for one in found["own"]["per_image"]] == sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*.png") if "long" not in path.name
    )


def test_pictures_that_no_two_preprocessings_read_are_told(tmp_path) -> None:
    (tmp_path / "images").mkdir()
    for shade, name in enumerate(("long", "longer")):
        strip = np.full((1, 70_000, 3), 90 * shade, np.uint8)
        Image.fromarray(strip).save(tmp_path / "images" / f"{name}.png")
    message = refused(
        checkpoint(), classifier(), "--images", tmp_path / "images", "--preprocess", "msn-eval"
    )
    assert "long.png" in message


def test_another_preprocessing_of_the_candidate_is_a_mismatch_and_no_model_error(images) -> None:
    found = told(checkpoint(), classifier(), "--images", images, "--preprocess", "hf")
    assert not found["passed"]
    assert found["check"]["passed"]  # given the same pixels
    assert not found["own"]["passed"]
    (reason,) = found["reasons"]
    assert reason.startswith("a preprocessing mismatch, the model itself agrees: with the same")
    assert found["candidate"]["preprocessing"]["name"] == "hf"


def test_a_file_says_how_the_candidate_is_fed(images, tmp_path) -> None:
    same = Path(checkpoint()) / "preprocessor_config.json"
    found = told(checkpoint(), classifier(), "--images", images, "--preprocess", same)
    assert found["passed"]
    assert found["own"] is None
    missing = validate(checkpoint(), classifier(), "--preprocess", tmp_path / "none.json")
    assert missing.exit_code == 2
    assert f"preprocessing {tmp_path / 'none.json'} does not exist; expected a" in missing.output
    (tmp_path / "p.json").write_text("[]")
    message = refused(checkpoint(), classifier(), "--preprocess", tmp_path / "p.json")
    assert "p.json is not a JSON object" in message


def test_both_faults_at_once_are_both_told(images, tmp_path) -> None:
    def swap(model: ir.Model) -> None:
        faults.edit(model, "classifier.weight", lambda w: w[:, ::-1])

    planted = with_fault(tmp_path, swap)
    found = told(checkpoint(), planted, "--images", images, "--preprocess", "msn-eval")
    assert not found["check"]["passed"]
    assert found["reasons"][-1].startswith("the preprocessing differs too: ")


# --- what cannot be compared ----------------------------------------------------------------------


def test_what_does_not_exist_is_named(tmp_path) -> None:
    for name, sides in (
        ("a.onnx", (tmp_path / "a.onnx", classifier())),
        ("a.engine", (classifier(), tmp_path / "a.engine")),
    ):
        result = validate(*sides)
        assert result.exit_code == 2
        assert f"'{tmp_path / name}' does not exist" in result.stderr
    result = validate(checkpoint(), classifier(), "--images", tmp_path / "none")
    assert result.exit_code == 2
    assert "--images" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--preprocess", "squash", "'squash' is unknown; expected hf, msn-eval, "),
        ("--gate", "fp64", "'fp64' is not one of"),
        ("--cosine", "-1", "x>=0"),
        ("--limit", "0", "'0' is no number of pictures; expected 1 or more, or all"),
        ("--limit", "some", "'some' is no number of pictures"),
        ("--batch", "8:1:2", "expected 1 <= MIN <= OPT <= MAX"),
    ],
)
def test_a_bad_option_is_named(option, value, message) -> None:
    result = validate(checkpoint(), classifier(), option, value)
    assert result.exit_code == 2
    assert option in result.stderr
    assert message in " ".join(result.stderr.split())


def test_images_of_another_size_or_kind_are_refused(tmp_path) -> None:
    larger = tmp_path / "larger.onnx"
    options = ["onnx", checkpoint(), "-o", str(larger), "--image-size", "48"]
    assert CliRunner().invoke(main, options).exit_code == 0
    assert refused(classifier(), larger) == (
        f"error: {classifier()} takes images of 32x32 and {larger} of 48x48; export one of them "
        "again with the other's --image-size"
    )
    grey = foreign(tmp_path / "grey.onnx", ["b", 1, 32, 32], {"logits": 3})
    assert "takes 3 channels and" in refused(classifier(), grey)


def test_outputs_without_a_counterpart_are_refused_and_others_noted(images, tmp_path) -> None:
    odd = foreign(tmp_path / "odd.onnx", ["b", 3, 32, 32], {"something": 6})
    assert refused(classifier(), odd) == (
        f"error: nothing to compare: {classifier()} has logits, {odd} has something; export one "
        "of them again with the other's --head"
    )
    both = foreign(tmp_path / "both.onnx", ["b", 3, 32, 32], {"logits": 3, "more": 6})
    notes = told(both, both, "--images", images)["notes"]
    assert set(assumed(ImageSize(32, 32)).notes) <= set(notes)
    alone = f"not compared, only {both} has it: more"
    found = told(classifier(), both)
    assert not found["passed"]
    assert alone in found["reasons"]
    assert alone in told(classifier(), both, "--numbers-only")["notes"]


def test_a_graph_that_is_not_the_one_its_manifest_describes_is_refused(tmp_path) -> None:
    copy = copy_of(classifier(), tmp_path)
    model = io.load(copy)
    faults.edit(model, "classifier.bias", lambda bias: bias + 1)
    io.save(model, copy)
    assert "is not the file" in refused(checkpoint(), copy)


def test_a_graph_without_its_manifest_is_fed_as_its_own_file_says(tmp_path) -> None:
    lone = without_manifest(classifier(), tmp_path / "lone.onnx")
    found = told(lone, classifier())
    assert found["passed"]
    assert f"{lone.name}: {UNSEALED}" in found["notes"]
    assert not any("assumed" in note for note in found["notes"])


def test_a_batch_that_memory_does_not_afford_is_refused(monkeypatch) -> None:
    from msn_export.metrics import evaluate

    monkeypatch.setattr(evaluate, "available_memory", lambda: 1 << 20)
    message = refused(checkpoint(), classifier(), "--batch", "4096")
    assert message.startswith("error: batch 4096:4096:4096: memory affords a check of about ")
    assert message.endswith("choose a smaller batch, or a machine with more memory")


# --- engines --------------------------------------------------------------------------------------


def test_an_engine_without_a_gpu_or_a_manifest_is_refused(tmp_path) -> None:
    assert refused(classifier(), engine()) == (
        f"error: {engine()} cannot run here: {no_driver()}; run this command on the machine that "
        "has its GPU, or compare the graph it was built from"
    )
    shutil.copy(engine(), tmp_path / "m.engine")
    assert refused(classifier(), tmp_path / "m.engine") == (
        f"error: {tmp_path / 'm.engine'} has no manifest beside it that says what it takes; "
        "compare the graph it was built from, or build it with msn-export trt"
    )
    copy = copy_of(engine(), tmp_path)
    copy.write_bytes(engine().read_bytes()[:-1] + b"?")
    assert "is not the file" in refused(classifier(), copy)


@pytest.mark.parametrize("spoiled", [False, True])
def test_an_engine_is_run_where_its_gpu_is_and_its_outputs_judged(
    spoiled, images, monkeypatch
) -> None:
    graph = open_runner(classifier())

    def compute(_network: Network, batch: np.ndarray) -> dict[str, np.ndarray]:
        logits = graph(np.array(batch))["logits"]
        return {"logits": logits[:, ::-1] if spoiled else logits}

    profiles = tuple((p.min, p.opt, p.max) for p in manifest.read(engine()).profiles)
    network = Network(profiles=profiles, outputs=(("logits", "float", 3),), sizes=(3, 32, 32))
    recorder = pretend(monkeypatch, "config", network, compute)
    found = told(checkpoint(), engine(), "--images", images)
    assert found["passed"] is not spoiled
    assert found["candidate"]["kind"] == "engine"
    assert "Stand-in GPU" in found["check"]["executed_on"]
    assert found["check"]["batches"] == [1, 5, 8, 15, 30, 32]
    assert recorder.live() == {}  # nothing of the GPU is kept


# --- 8 bits ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantise the classifier to int8 on the eight pictures beside it."""
    folder = tmp_path_factory.mktemp("eight")
    options = ("--int8", "--images", str(pictures(folder / "images", 8)), "--no-compile")
    made = CliRunner().invoke(
        main, ["calibrate", str(classifier()), "-o", str(folder / "int8.onnx"), *options]
    )
    assert made.exit_code == 0, made.output
    return folder / "int8.onnx"


@pytest.mark.parametrize("limit", ["8", "4"])
def test_weights_alone_in_8_bits_are_held_to_what_they_cost(eight, limit, tmp_path) -> None:
    options = ("--images", eight.parent / "images", "--limit", limit)
    sound = faults.plant(eight, tmp_path / "weights.onnx", drop_activation_pairs)
    found = told(checkpoint(), sound, *options)
    assert found["passed"]
    assert found["check"]["limits_from"].startswith(
        "1.5 times the errors of the reference in int8 with quantised weights alone, in onnxruntime"
    )
    assert not any("ranges of activations" in note for note in found["notes"])
    wrong = faults.plant(sound, tmp_path / "wrong.onnx", partial(scale_weights, factor=1.3))
    assert "relative error" in told(checkpoint(), wrong, *options)["reasons"][0]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Give an encoder of torch's exporter, as it is or in int8 as onnxruntime quantises it."""
    folder = tmp_path_factory.mktemp("theirs")
    pictures(folder / "images", 8)
    path = scripted(folder / "tokens.onnx", Reading(encoder("eager"), lambda m, x: m(x)[0]))

    @cache
    def made(*, attention: bool) -> Path:
        sample = draw(folder / "images", assumed(ImageSize(32, 32), 3))
        batches = [sample.preprocess(range(at, at + 4), InputFormat.FLOAT) for at in (0, 4)]
        return quantised(path, attention=attention, reader=Reader(batches)).rename(
            folder / f"int8-{attention}.onnx"
        )

    return made


def test_pairs_behind_products_are_part_of_what_8_bits_cost(theirs, tmp_path) -> None:
    sound = theirs(attention=False)
    options = ("--images", sound.parent / "images")
    plain = sound.parent / "tokens.onnx"
    found = told(plain, sound, *options)
    assert found["passed"]
    (figures,), (limits,) = (found["check"][key].values() for key in ("outputs", "limits"))
    # the baseline has all of them: it errs as the candidate does
    assert figures["image"] == pytest.approx(limits["image"] / 1.5, rel=0.05)

    def narrow(model: ir.Model) -> None:
        for node in model.graph:
            name = node.inputs[0].name if node.op_type == "QuantizeLinear" else ""
            if "layers.1" in name and "fc1" in name:
                scale = node.inputs[1]
                scale.const_value = ir.tensor(scale.const_value.numpy() / 4, name=scale.name)

    model = io.load(sound)
    narrow(model)
    io.save(model, tmp_path / "narrow.onnx")
    (reason,) = told(plain, tmp_path / "narrow.onnx", *options)["reasons"]
    assert re.fullmatch(r"output 'out': relative error \S+, \S+ allowed", reason)


def test_pairs_that_the_baseline_cannot_have_leave_fixed_numbers(theirs) -> None:
    found = told(
        theirs(attention=False).parent / "tokens.onnx", theirs(attention=True),
        "--images", theirs(attention=False).parent / "images",
    )  # fmt: skip
    assert re.fullmatch(
        "fixed numbers: the candidate also quantises '.*', where the reference cannot be quantised "
        "alike",
        found["check"]["limits_from"],
    )
    assert not found["check"]["limits"]


def test_a_graph_whose_blocks_are_not_found_says_that_its_structure_was_not_compared(
    images, tmp_path
) -> None:
    graph = foreign(tmp_path / "means.onnx", ["b", 3, 32, 32], {"logits": 3})
    assert (
        "means.onnx: its epsilons, activations and additions were not compared: the graph has no "
        "residual stream with attention in its branches: it is no transformer, or was fused into "
        "operators of one runtime; export it again without"
    ) in told(graph, graph, "--images", images)["notes"]


# --- what converters make of a graph --------------------------------------------------------------


def halved_at_opset_14(folder: Path, epsilon: float, reference: float) -> tuple[Path, Path]:
    """Save a checkpoint, and its graph with LayerNorm written out and put into fp16."""
    model = hugging_face(folder / "hf", layer_norm_eps=reference)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = epsilon
    path = scripted(
        folder / "m.onnx", Reading(model, patches_and_cls), opset=14, output="last_hidden_state"
    )
    return folder / "hf", halved(path, keep_io_types=True)


def patches_and_cls(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = model(pixels).last_hidden_state
    return tokens


def test_an_epsilon_that_a_converter_rounded_to_fp16_is_the_same(images, tmp_path) -> None:
    found = told(*halved_at_opset_14(tmp_path, 1e-6, 1e-6), "--images", images)
    assert found["reasons"] == []
    assert not any(note.startswith("epsilon") for note in found["notes"])


def test_another_epsilon_is_refused_in_fp16_too(images, tmp_path) -> None:
    found = told(*halved_at_opset_14(tmp_path, 1e-5, 1e-6), "--images", images)
    assert any(
        "epsilon is 1.00136e-05, the reference's 1e-06 in" in why for why in found["reasons"]
    )


def test_an_epsilon_that_fp16_cannot_hold_is_told_and_the_numbers_decide(images, tmp_path) -> None:
    found = told(*halved_at_opset_14(tmp_path, 1e-12, 1e-12), "--images", images)
    assert found["reasons"] == []
    (note,) = (note for note in found["notes"] if note.startswith("epsilon"))
    assert note.startswith(
        "epsilon is 5.96046e-08, the reference's 1e-12 (fp16 holds none so small; the numbers "
        "decide) in block 0 norm before MLP, block 0 norm before attention"
    )


def fused(folder: Path) -> tuple[Path, Path, Path]:
    """Save a checkpoint, its graph, and what onnxruntime's optimiser made of that."""
    model = Reading(hugging_face(folder / "hf"), patches_and_cls)
    path = exported(folder / "m.onnx", model, output="last_hidden_state")
    return folder / "hf", path, fused_by_onnxruntime(path)


def test_a_graph_that_onnxruntime_optimised_agrees(images, tmp_path) -> None:
    checkpoint, graph, optimised = fused(tmp_path)
    for reference in (checkpoint, graph):
        found = told(reference, optimised, "--images", images)
        assert found["reasons"] == []
        assert not any("not compared" in note for note in found["notes"])
    assert told(optimised, graph, "--images", images)["reasons"] == []


def test_an_addition_that_an_optimised_graph_lacks_is_named(images, tmp_path) -> None:
    checkpoint, _, optimised = fused(tmp_path)
    found = told(checkpoint, rewritten(optimised, without_last_skip), "--images", images)
    assert (
        "addition of the MLP to the stream is missing, the reference's present in block 1"
        in found["reasons"]
    )


# --- images that change each other's results ------------------------------------------------------


def test_a_graph_that_joins_images_fails_where_its_reference_joins_the_same(
    images, tmp_path
) -> None:
    """All five in one batch, as the reference runs them: no figure of theirs differs."""
    joining = faults.plant(classifier(), tmp_path / "m.onnx", partial(faults.mixed_batch, block=1))
    found = told(joining, joining, "--images", images, "--batch", 5)
    (reason,) = found["reasons"]
    assert re.fullmatch(
        r"output 'logits': an image's result depends on the batch it is in: relative error "
        r"\S+, \S+ allowed",
        reason,
    )
    assert "they were compared because ReduceMean 'blocks.1" in compared_alone(found)


def compared_alone(found: dict[str, Any]) -> str:
    (note,) = (note for note in found["notes"] if "alone" in note)
    return str(note)


def test_a_graph_that_keeps_images_apart_in_an_unknown_way_passes_and_says_they_were_compared(
    images, tmp_path
) -> None:
    in_none = partial(faults.wrong_in_batches_of, 99, block=1)
    graph = faults.plant(classifier(), tmp_path / "m.onnx", in_none)
    found = told(checkpoint(), graph, "--images", images)
    assert found["passed"]
    assert re.fullmatch(
        r"5 images beside others and alone differ by \S+; they were compared because Shape "
        r"'\S*' is not shown to keep them apart",
        compared_alone(found),
    )


def test_of_a_fixed_batch_images_were_compared_with_their_copies(images, tmp_path) -> None:
    in_none = partial(faults.wrong_in_batches_of, 99, block=1)
    graph = faults.plant(classifier("--batch", "4"), tmp_path / "m.onnx", in_none)
    found = told(checkpoint(), graph, "--images", images)
    assert found["passed"]
    assert "because Shape '" in compared_alone(found)
    joining = partial(faults.mixed_batch, block=1)
    graph = faults.plant(classifier("--batch", "4"), tmp_path / "m.onnx", joining)
    found = told(graph, graph, "--images", images)
    assert "an image's result depends on the batch it is in" in found["reasons"][-1]


def test_a_graph_that_keeps_images_apart_has_nothing_to_compare(images) -> None:
    found = told(checkpoint(), classifier(), "--images", images)
    assert not any("alone" in note for note in found["notes"])


def test_a_graph_of_one_image_has_nothing_to_compare(images, tmp_path) -> None:
    graph = foreign(tmp_path / "means.onnx", [1, 3, 32, 32], {"logits": 3})
    assert not any("alone" in note for note in told(graph, graph, "--images", images)["notes"])


def test_where_memory_affords_one_image_two_are_compared(images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "available_memory", lambda: 1)
    joining = faults.plant(classifier(), tmp_path / "m.onnx", partial(faults.mixed_batch, block=1))
    found = told(checkpoint(), joining, "--images", images)
    assert found["check"]["batches"] == [1]
    assert found["check"]["passed"] is False
    (reason,) = found["reasons"]
    assert "an image's result depends on the batch it is in" in reason
