"""A trained classifier keeps its accuracy in fp16, int8 and fp8: top-1 on real images it never saw.

Random weights cannot tell: their classes hang on nothing. The model is trained once and kept in
pytest's cache.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from msn_export.cli import main
from msn_export.runtime import open_runner
from tests.builders import digits

TRAIN, TEST = digits.load()


def run(*arguments: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred images of the training set, to calibrate on; the rest of it is not needed."""
    made = tmp_path_factory.mktemp("digits")
    TRAIN.write(made / "images", 200)
    return made


def exported(checkpoint: Path, output: Path, *options: str) -> Path:
    heads = ("--head", "logits", "--head", "cls")
    run("onnx", checkpoint, "-o", output, *heads, "--images", output.parent / "images", *options)
    return output


def calibrated(graph: Path, name: str, *options: str) -> tuple[Path, dict[str, Any]]:
    output = graph.with_name(f"{name}.onnx")
    images = ("--images", graph.parent / "images")
    return output, run("calibrate", graph, "-o", output, *images, "--no-compile", *options)


@pytest.fixture(scope="module")
def fp32(trained, folder) -> Path:
    return exported(trained, folder / "fp32.onnx")


@pytest.fixture(scope="module")
def planted(trained, folder) -> Path:
    return exported(digits.plant(folder / "planted", trained), folder / "planted.onnx")


def accuracy(graph: Path) -> float:
    """Give top-1 on the 599 test images, in percent."""
    planes = TEST.planes()
    with open_runner(graph) as runner:
        logits = [runner(planes[at : at + 32])["logits"] for at in range(0, len(planes), 32)]
    return float((np.concatenate(logits).argmax(axis=1) == TEST.labels).mean() * 100)


def test_it_was_trained_to_over_95_percent(fp32) -> None:
    assert accuracy(fp32) > 95


def test_fp16_is_within_a_fifth_of_a_point(fp32, trained, folder) -> None:
    graph = exported(trained, folder / "fp16.onnx", "--dtype", "fp16")
    assert abs(accuracy(graph) - accuracy(fp32)) <= 0.2


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_8_bits_are_within_a_point(fp32, dtype) -> None:
    graph, told = calibrated(fp32, dtype, f"--{dtype}")
    assert abs(accuracy(graph) - accuracy(fp32)) <= 1.0
    assert told["quantization"]["products"] == 12
    assert told["quantization"]["kept"] == {}
    assert told["check"]["cosine_p1"] >= 0.99


def test_so_is_int8_for_a_cpu_whose_weights_have_one_bit_less(fp32) -> None:
    graph, told = calibrated(fp32, "cpu", "--int8", "--base", "fp32")
    assert abs(accuracy(graph) - accuracy(fp32)) <= 1.0
    assert told["quantization"]["kept"] == {}
    assert told["check"]["cosine_p1"] >= 0.99


def test_planted_outliers_change_nothing_in_fp32(fp32, planted) -> None:
    assert accuracy(planted) == accuracy(fp32)


def test_plain_max_calibration_shows_what_outliers_do(planted) -> None:
    options = ("--int8", "--observer", "max", "--smooth", "off")
    graph, told = calibrated(planted, "max", *options, "--gate-cosine", "0")
    assert told["check"]["cosine_p1"] < 0.8
    assert accuracy(planted) - accuracy(graph) > 1.0


@pytest.mark.parametrize("observer", ["max", "mse"])
def test_smoothing_recovers_it_to_within_a_point(planted, observer) -> None:
    options = ("--int8", "--observer", observer, "--smooth", "auto")
    graph, told = calibrated(planted, f"smooth-{observer}", *options)
    errors = told["quantization"]["smoothing_errors"]
    assert errors["off"] > 10 * min(errors.values())
    assert told["quantization"]["kept"] == {}
    assert accuracy(planted) - accuracy(graph) <= 1.0


# --- the accuracy in a verdict --------------------------------------------------------------------

COARSE = ("--int8", "--observer", "max", "--smooth", "off", "--gate-cosine", "0")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 1,797 images, a folder for each class as the model names it."""
    folder = tmp_path_factory.mktemp("labelled")
    for name, part in (("train", TRAIN), ("test", TEST)):
        for index, (picture, label) in enumerate(zip(part.pictures, part.labels, strict=True)):
            path = folder / f"LABEL_{label}" / f"{name}-{index:04}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(path)
    return folder


@pytest.fixture(scope="module")
def weak(trained, folder) -> Path:
    """A graph with outliers in block 1 that 8 bits do not hold."""
    return exported(digits.plant(folder / "outliers", trained, [1], 110.0), folder / "weak.onnx")


def test_a_loss_of_accuracy_keeps_a_block_that_the_cosine_does_not(weak, labelled) -> None:
    _, lossy = calibrated(weak, "lossy", *COARSE)
    assert lossy["quantization"]["kept"] == {}
    graph, told = calibrated(weak, "saved", *COARSE, "--labelled", str(labelled))
    assert list(told["quantization"]["kept"]) == ["block 1"]
    record = told["check"]["accuracy"]
    # three of four of the 200 images, copies aside, were calibrated on
    assert 1797 - 150 <= record["images"] < 1797
    assert record["conclusion"] == "no significant loss"
    assert record["lost"] - record["gained"] <= 5
    assert accuracy(weak) - accuracy(graph) <= 0.5


def test_validate_finds_that_loss_and_none_in_fp16(weak, fp32, trained, folder, labelled) -> None:
    lossy, _ = calibrated(weak, "lost", *COARSE)
    given = ["validate", str(weak), str(lossy), "--labelled", str(labelled), "--relative", "9"]
    result = CliRunner().invoke(main, [*given, "--json"])
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert [reason for reason in told["reasons"] if "it is a significant loss" in reason]
    assert told["check"]["accuracy"]["p_value"] < 1e-4
    half = exported(trained, folder / "half.onnx", "--dtype", "fp16")
    record = run("validate", fp32, half, "--labelled", labelled)["check"]["accuracy"]
    assert record["conclusion"] == "no significant loss"
    assert record["loss_bound"] < 0.01


# --- blocks that are kept -------------------------------------------------------------------------


def test_a_sensitive_block_is_kept_until_the_gate_is_met(trained, folder) -> None:
    sick = exported(digits.plant(folder / "sick", trained, [1]), folder / "sick.onnx")
    options = ("--int8", "--observer", "max", "--smooth", "off", "--gate-cosine", "0.995")
    graph, told = calibrated(sick, "kept", *options)
    quantization = told["quantization"]
    assert list(quantization["kept"]) == ["block 1"]
    drift = {int(block): error for block, error in quantization["drift"].items()}
    assert quantization["kept"]["block 1"] == (
        f"fp16: quantised alone, it moves the embedding by {drift[1]:.2%}"
    )
    assert drift[1] > 5 * max(drift[0], drift[2])
    assert (quantization["products"], quantization["expected"]) == (8, 12)
    assert told["check"]["cosine_p1"] >= 0.995
    assert "1 of 3 blocks kept in fp16" in quantization["verdict"]
    assert accuracy(sick) - accuracy(graph) <= 1.0


def test_a_gate_that_nothing_reaches_leaves_nothing(planted) -> None:
    output = planted.with_name("refused.onnx")
    options = ["--int8", "--observer", "max", "--smooth", "off", "--gate-cosine", "0.9999"]
    images = ["--images", str(planted.parent / "images"), "--no-compile"]
    arguments = ["calibrate", str(planted), "-o", str(output), *images, *options]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "error: no choice of blocks reaches --gate-cosine 0.9999 in int8 on calibration images "
        "(output 'logits': cosine_p1 0."
    )
    assert last.endswith("); keep fp16, or lower the gate")
    assert list(output.parent.glob("refused*")) == []
