"""``msn-export calibrate``: what is wrong with its input is one line, and nothing is left."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image

from msn_export.cli import main
from tests.builders.artifacts import classifier as exported
from tests.builders.calibrations import PRODUCTS, QUICK, calibrate, done, ranges_of, refused
from tests.builders.checkpoints import hugging_face
from tests.builders.tiny_artifacts import classifier, foreign, pictures
from tests.contracts import faults


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a tiny classifier of two blocks, 17 tokens, random weights."""
    return classifier(tmp_path_factory.mktemp("calibrate"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), 44)


@pytest.fixture(scope="module")
def int8(graph, images) -> tuple[Path, dict[str, Any]]:
    output = graph.with_name("int8.onnx")
    return output, done(graph, images, output, "--int8", "--no-compile")


def test_a_folder_without_images_is_refused(graph, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused(graph, tmp_path / "empty", tmp_path / "m.onnx", "--int8")
    assert message.startswith(
        f"error: image folder {tmp_path / 'empty'} holds no picture that can be read"
    )


@pytest.mark.parametrize("batch", [(), ("--batch", "4")])
def test_a_graph_in_which_images_change_each_other_is_refused(batch, images, tmp_path) -> None:
    joining = partial(faults.mixed_batch, block=1)
    graph = faults.plant(exported(*batch), tmp_path / "m.onnx", joining)
    message = refused(graph, images, tmp_path / "q.onnx", "--int8")
    assert message.startswith(
        f"error: {graph}: output 'logits': an image's result depends on the batch it is in: max_abs"
    )
    assert "; ReduceMean 'blocks.1." in message
    assert message.endswith(" is not shown to keep images apart")


def test_fewer_than_32_images_are_a_warning(graph, images, tmp_path) -> None:
    told = done(graph, images, tmp_path / "m.onnx", "--int8", *QUICK, "--limit", "12")
    assert told["notes"][0] == (
        "only 12 images were calibrated on: ranges of fewer than 32 say little about others; give "
        "more with --images"
    )


def test_32_images_are_none(graph, images, tmp_path) -> None:
    told = done(graph, images, tmp_path / "m.onnx", "--int8", *QUICK, "--limit", "32")
    assert told["quantization"]["calibration_images"] == 32
    assert not any("were calibrated on" in note for note in told["notes"])


def test_broken_images_are_named_and_counted(graph, tmp_path) -> None:
    folder = pictures(tmp_path / "pictures", 12, broken=(3, 8))
    told = done(graph, folder, tmp_path / "m.onnx", "--int8", *QUICK)
    assert "2 broken images skipped" in told["notes"]
    assert sum(note.startswith("skipped: ") for note in told["notes"]) == 2


def test_pictures_that_exif_turned_are_counted_held_out_or_not(graph, tmp_path) -> None:
    folder = pictures(tmp_path / "pictures", 12)
    exif = Image.Exif()
    exif[0x0112] = 6
    for path in folder.rglob("*.png"):
        with Image.open(path) as plain:
            plain.save(path, exif=exif)
    told = done(graph, folder, tmp_path / "m.onnx", "--int8", *QUICK)
    assert "pictures turned by their EXIF orientation: 12" in told["notes"]


def test_a_graph_that_is_quantised_already_is_refused(int8, images, tmp_path) -> None:
    output, _ = int8
    message = refused(output, images, tmp_path / "twice.onnx", "--int8")
    assert message == (
        f"error: {output} is quantised to int8 already; give the fp32 graph it was made from"
    )


def test_ranges_of_another_graph_are_refused(int8, images, tmp_path) -> None:
    other = classifier(tmp_path / "other", heads=("cls",))
    ranges = ranges_of(int8[0])
    options = ("--int8", "--ranges", str(ranges))
    message = refused(other, images, tmp_path / "m.onnx", *options)
    assert message.startswith(f"error: --ranges {ranges} were taken of another graph (sha256 ")
    assert message.endswith("leave --ranges out to take them anew")


def test_ranges_taken_after_another_smoothing_are_refused(int8, graph, images, tmp_path) -> None:
    ranges = ranges_of(int8[0])
    options = ("--int8", "--ranges", str(ranges), "--smooth", "0.9")
    message = refused(graph, images, tmp_path / "m.onnx", *options)
    assert f"--smooth 0.9: --ranges {ranges} were taken after --smooth " in message
    assert message.endswith("; leave one of the two out")


def test_ranges_without_attention_are_refused_for_it(int8, graph, images, tmp_path) -> None:
    options = ("--int8", "--ranges", str(ranges_of(int8[0])), "--quantize-attention")
    message = refused(graph, images, tmp_path / "m.onnx", *options)
    assert "which --quantize-attention needs; leave --ranges out to take them anew" in message


def test_a_typed_graph_is_refused(graph, images, tmp_path) -> None:
    typed = tmp_path / "typed" / "fp16.onnx"
    typed.parent.mkdir()
    checkpoint = str(graph.parent / "checkpoint")
    options = ["-o", str(typed), "--dtype", "fp16", "--islands", "none", "--no-check"]
    assert CliRunner().invoke(main, ["onnx", checkpoint, *options]).exit_code == 0
    message = refused(typed, images, tmp_path / "m.onnx", "--int8")
    assert message == f"error: {typed} is typed fp16; calibrate takes the fp32 graph"


def test_a_graph_that_does_not_give_its_own_golden_result_is_refused(
    graph, images, tmp_path
) -> None:
    wrong = faults.plant(graph, tmp_path / "wrong.onnx", faults.scaled("embedding", 1.5))
    message = refused(wrong, images, tmp_path / "m.onnx", "--int8")
    assert message.startswith(
        f"error: {wrong} does not give the golden result in its manifest: selftest failed "
        "(relative error 5.00e-01, "
    )
    assert message.endswith("; export it again")


def changed(graph: Path, output: Path, **scale: Any) -> Path:
    """Copy a graph, without its manifest, with constants multiplied whose names end so."""
    model = onnx.load(graph)
    found = 0
    for tensor in model.graph.initializer:
        for ending, factor in scale.items():
            if tensor.name.endswith(ending.replace("_", ".")):
                array = numpy_helper.to_array(tensor) * np.float32(factor)
                tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
                found += 1
    assert found == len(scale)
    onnx.save(model, output)
    return output


def test_nan_names_the_first_tensor_that_has_it_and_an_image(graph, images, tmp_path) -> None:
    sick = changed(graph, tmp_path / "sick.onnx", blocks_1_norm1_weight=np.nan)
    message = refused(sick, images, tmp_path / "m.onnx", "--int8")
    assert message.startswith("error: tensor 'blocks.1.norm1.LayerNormalization' is NaN on image ")
    assert message.endswith(
        ".png; nothing can be calibrated on that: check the weights and the preprocessing"
    )


def test_what_fp16_cannot_hold_stays_fp32_and_is_listed(graph, images, tmp_path) -> None:
    large = changed(
        graph, tmp_path / "large.onnx", blocks_0_mlp_fc1_weight=3e4, blocks_0_mlp_fc2_weight=1 / 3e4
    )
    output = tmp_path / "m.onnx"
    told = done(large, images, output, "--int8", *QUICK)
    assert told["quantization"]["kept"] == {
        "blocks.0.mlp.fc1.MatMul": "fp32: its result passes what fp16 can hold"
    }
    assert told["quantization"]["products"] == PRODUCTS - 1
    assert max(told["islands"].values()) > 65504 / 4
    assert told["check"]["cosine_p1"] >= 0.99


def test_a_channel_that_is_always_zero_does_no_harm(graph, images, tmp_path) -> None:
    dead = changed(graph, tmp_path / "dead.onnx", blocks_0_norm1_weight=0, blocks_0_norm1_bias=0)
    told = done(dead, images, tmp_path / "m.onnx", "--int8", *QUICK)
    assert told["check"]["cosine_p1"] >= 0.99


def test_a_graph_of_another_tool_is_calibrated_and_what_was_assumed_is_told(
    graph, images, tmp_path
) -> None:
    foreign = changed(graph, tmp_path / "foreign.onnx")
    told = done(foreign, images, tmp_path / "m.onnx", "--int8", *QUICK)
    assert told["quantization"]["products"] == PRODUCTS
    assert "preprocessing hf was assumed" in told["notes"][-1]


def test_a_graph_that_is_no_vit_is_refused(images, tmp_path) -> None:
    path = tmp_path / "cnn.onnx"
    foreign(path, ["b", 3, 32, 32], {"embedding": 3})
    message = refused(path, images, tmp_path / "m.onnx", "--int8")
    assert message == (
        "error: the graph has no Softmax and no Attention; expected a vision transformer"
    )


def test_more_than_512_tokens_of_int8_attention_are_refused(images, tmp_path) -> None:
    output = tmp_path / "wide" / "m.onnx"
    hugging_face(output.parent / "checkpoint", image_size=96, patch_size=4, num_hidden_layers=1)
    arguments = ["onnx", str(output.parent / "checkpoint"), "-o", str(output), "--no-check"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    options = ("--int8", "--quantize-attention")
    assert refused(output, images, tmp_path / "q.onnx", *options) == (
        "error: --quantize-attention: TensorRT has fused int8 attention up to 512 tokens and this "
        "graph has 577; leave attention in fp16, or use --fp8"
    )


def test_an_existing_file_is_not_replaced(graph, images, tmp_path) -> None:
    for name in ("m.onnx", "m.ranges.json"):
        (tmp_path / name).write_text("mine")
        result = calibrate(graph, images, tmp_path / "m.onnx", "--int8")
        assert result.exit_code == 1
        assert str(tmp_path / name) in result.stderr
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --int8 or --fp8"),
        (("--int8", "--fp8"), "--int8 and --fp8 contradict each other; give one"),
        (("--fp8", "--observer", "entropy"), "--observer: fp8 has no even steps to compare with"),
        (("--fp8", "--base", "fp32"), "--base: fp32 is for onnxruntime, which multiplies no fp8"),
        (("--int8", "--compute-capability", "8", "--no-compile"), "'--compute-capability'"),
        (
            ("--int8", "--compute-capability", "8.6", "--no-compile"),
            "--no-compile leaves nothing to compile for --compute-capability",
        ),
        (("--int8", "--smooth", "1.5"), "'--smooth'"),
        (("--int8", "--limit", "0"), "'--limit'"),
        (("--int8", "--gate-cosine", "1.5"), "'--gate-cosine'"),
    ],
)
def test_usage_names_the_option(graph, images, tmp_path, options, message) -> None:
    result = calibrate(graph, images, tmp_path / "m.onnx", *options)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fp8", "--compute-capability", "8.6"), "the graph computes in fp8, which "
         "--compute-capability 8.6 cannot; it takes 8.9 or later"),
        (("--int8", "--base", "bf16", "--compute-capability", "7.5"), "the graph computes in bf16, "
         "which --compute-capability 7.5 cannot; it takes 8.0 or later"),
        (("--int8", "--compute-capability", "9.0"), "TensorRT-RTX cannot compile for compute "
         "capability 9.0; it can for 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"),
        (("--int8", "--base", "fp32", "--compute-capability", "8.6"), "--compute-capability 8.6: "
         "int8 beside fp32 is for onnxruntime and is not compiled; --base fp16 is"),
    ],
)  # fmt: skip
def test_a_target_that_nothing_compiles_for_is_refused_before_the_work(
    images, tmp_path, options, message
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    (tmp_path / "none").touch()  # the graph is not even read
    assert refused(tmp_path / "none", images, tmp_path / "m.onnx", *options) == f"error: {message}"
