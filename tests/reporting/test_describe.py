"""The words of a report: a headline that no engine that did not run can improve."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from msn_export.compare.sides import Side, Validation
from msn_export.manifest import CheckRecord, ImageRecord
from msn_export.metrics.evaluate import Evaluation, Reference, Sample
from msn_export.metrics.tolerances import GATES, Gate
from msn_export.preprocessing import preset
from msn_export.reporting import gather
from msn_export.reporting.describe import accuracy_rows, artifact_rows, check_rows, origin_of
from msn_export.spec import Dtype, ImageSize
from tests.builders.manifests import check, counted, example
from tests.reporting.test_plots import agreement, artifact, drift, stage

PREPROCESSING = preset("hf", ImageSize(32, 32))
AGREES = agreement(0.9999)
FAILED = replace(AGREES, check=replace(AGREES.check, passed=False))
IDLE = artifact(name="m.engine", verdict="compiled, not run")


@pytest.mark.parametrize(
    ("artifacts", "agreements", "expected"),
    [
        ([artifact()], [AGREES], ("passed", "Every artifact agrees with its reference")),
        ([artifact()], [], ("partial", "Nothing was compared")),
        ([artifact(), IDLE], [AGREES],
         ("partial", "Everything that ran agrees; m.engine did not run")),
        ([artifact(name="a.onnx", verdict="not checked"), IDLE], [AGREES],
         ("partial", "Everything that ran agrees; m.engine did not run; a.onnx was not checked")),
        ([artifact(), IDLE], [AGREES, replace(FAILED, candidate="c.onnx")],
         ("failed", "c.onnx: not what the reference is")),
        ([artifact(), artifact(name="b.onnx", verdict="not believed")], [AGREES],
         ("failed", "b.onnx: the manifest is not believed")),
        ([artifact(name="b.onnx", verdict="stale"), IDLE], [],
         ("failed", "b.onnx: made from another graph or checkpoint than the one here")),
        ([artifact(name="d.onnx", verdict="not believed")], [FAILED],
         ("failed", "b.onnx: not what the reference is; d.onnx: the manifest is not believed")),
    ],
)  # fmt: skip
def test_the_headline_is_the_worst_that_is_known(artifacts, agreements, expected) -> None:
    assert gather.verdict(artifacts, agreements) == expected


def failed(check: CheckRecord, reasons: tuple[str, ...], cause: str) -> Validation:
    sides = [Side(name, "onnx", Dtype.FP32, PREPROCESSING) for name in ("a.onnx", "b.onnx")]
    gate = GATES[Dtype.FP32]
    return Validation(*sides, False, check, None, gate, Dtype.FP32, reasons, cause, ())


def test_each_comparison_is_a_sentence_with_its_reasons_and_cause() -> None:
    wrong = replace(AGREES, validation=failed(AGREES.check, ("cosine_p1 0.5",), "BGR"))
    (said,) = gather.sentences([artifact()], [wrong], [])
    assert said.startswith("b.onnx does not agree with a.onnx on 16 images: least cosine 0.99991")
    assert said.endswith(". cosine_p1 0.5. BGR")
    spoiled = replace(AGREES, check=replace(AGREES.check, cosine_min=None))
    assert gather.sentences([], [spoiled], [])[0].endswith("least cosine none")


def test_of_a_large_set_the_worst_images_are_those_of_its_first_part() -> None:
    sample = Sample(np.zeros((4, 8, 8, 3), np.uint8), tuple("abcd"), "here", PREPROCESSING)
    rows = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    per_image = tuple(ImageRecord(name, 1 - at / 10, 0.0) for at, name in enumerate("abcdef"))
    ran = Evaluation(
        {}, (1,), "here", Reference({"embedding": rows[:4]}, sample, "a.onnx"), Gate(), per_image,
        {"embedding": rows},
    )  # fmt: skip
    worst = gather._worst(ran)
    assert [one.record.name for one in worst] == ["d", "c", "b"]
    assert all(one.same for one in worst)


def test_where_they_part_is_said() -> None:
    assert gather.sentences([], [], [drift(stage("block 0"), parted="block 0")]) == [
        "b.onnx parts from a.onnx at block 0"
    ]
    assert gather.sentences([], [], [drift(stage("block 0"))]) == []


def test_a_report_is_named_after_the_checkpoint_else_the_first_artifact() -> None:
    assert gather.title_of(example(), [artifact()]) == "facebook/tiny@0123"
    assert gather.title_of(None, [artifact()]) == "m & <n>.onnx"
    assert gather.subtitle_of(None) == "ViT-MSN"
    assert origin_of(None) == []


def test_the_origin_is_the_manifests() -> None:
    known: dict[str, Any] = dict(origin_of(example()))
    assert known["checkpoint"] == "facebook/tiny@0123"
    assert known["preprocessing"].startswith("msn-eval: ")


def test_the_date_can_be_fixed_for_builds_that_are_to_be_the_same(monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert gather.now() == "01 January 1970, 00:00 UTC"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    assert gather.now().endswith(f"{datetime.now(UTC):%Y, %H}:{gather.now()[-6:-4]} UTC")


def test_accuracy_is_both_sides_the_images_and_the_test() -> None:
    assert list(accuracy_rows(None)) == []
    rows = list(accuracy_rows(counted()))
    assert rows == [
        (
            "accuracy",
            "96.3% (94.5% to 97.6%) in the candidate, 96.8% (95.1% to 98.0%) in the reference",
        ),
        ("", "by logits on 599 of 1,797 images of digits"),
        (
            "",
            "no significant loss: 4 lost, 1 gained, McNemar's exact test p = 0.19; with 95 % "
            "confidence the loss is below 1.2 points",
        ),
    ]
    assert list(check_rows(check(accuracy=counted())))[-3:] == rows


def test_a_loss_that_is_allowed_is_named_with_what_is() -> None:
    *_, (_, last) = accuracy_rows(counted(conclusion="allowed loss", allowed=0.01))
    assert last.startswith("allowed loss, 1 points are allowed: 4 lost, 1 gained, ")


@pytest.mark.parametrize(
    ("images", "given", "source", "words"),
    [
        (1, 1, "one", "1 image"), (1, 9, "many", "1 of 9 images"), (4, 4, "four", "4 images"),
        (1, 1, "seeded noise", "1 input"), (0, 0, "none", "0 images"),
    ],
)  # fmt: skip
def test_one_image_is_not_called_images(images, given, source, words) -> None:
    rows = dict(artifact_rows(example(check=check(images=images, given=given, source=source))))
    assert rows["verdict"] == f"passed on {words}"
