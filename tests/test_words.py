"""The words of a report: a headline that no engine that did not run can improve."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from manifests import example
from test_plots import agreement, artifact, drift, stage

from msn_export.report import describe

AGREES = replace(agreement(0.9999), candidate="b.onnx", reference="a.onnx")
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
        ([artifact(), IDLE], [AGREES, replace(AGREES, passed=False, candidate="c.onnx")],
         ("failed", "c.onnx: not what the reference is")),
        ([artifact(), artifact(name="b.onnx", verdict="not believed")], [AGREES],
         ("failed", "b.onnx: the manifest is not believed")),
        ([artifact(name="b.onnx", verdict="stale"), IDLE], [],
         ("failed", "b.onnx: made from another graph or checkpoint than the one here")),
        ([artifact(name="d.onnx", verdict="not believed")], [replace(AGREES, passed=False)],
         ("failed", "b.onnx: not what the reference is; d.onnx: the manifest is not believed")),
    ],
)  # fmt: skip
def test_the_headline_is_the_worst_that_is_known(artifacts, agreements, expected) -> None:
    assert describe.verdict(artifacts, agreements) == expected


def test_each_comparison_is_a_sentence_with_its_reasons_and_cause() -> None:
    wrong = replace(AGREES, passed=False, reasons=("cosine_p1 0.5",), cause="BGR")
    (said,) = describe.sentences([artifact()], [wrong], [])
    assert said.startswith("b.onnx does not agree with a.onnx on 16 images: least cosine 0.99991")
    assert said.endswith(". cosine_p1 0.5. BGR")
    spoiled = replace(AGREES, check=replace(AGREES.check, cosine_min=None))
    assert describe.sentences([], [spoiled], [])[0].endswith("least cosine none")


def test_where_they_part_is_said() -> None:
    assert describe.sentences([], [], [drift(stage("block 0"), parted="block 0")]) == [
        "b.onnx parts from a.onnx at block 0"
    ]
    assert describe.sentences([], [], [drift(stage("block 0"))]) == []


def test_a_report_is_named_after_the_checkpoint_else_the_first_artifact() -> None:
    assert describe.title_of(example(), [artifact()]) == "facebook/tiny@0123"
    assert describe.title_of(None, [artifact()]) == "m & <n>.onnx"
    assert describe.subtitle_of(None) == "ViT-MSN"
    assert describe.origin_of(None) == []


def test_the_origin_is_the_manifests() -> None:
    known: dict[str, Any] = dict(describe.origin_of(example()))
    assert known["checkpoint"] == "facebook/tiny@0123"
    assert known["preprocessing"].startswith("msn-eval: ")


def test_the_date_can_be_fixed_for_builds_that_are_to_be_the_same(monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert describe.now() == "01 January 1970, 00:00 UTC"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    assert describe.now().endswith(f"{datetime.now(UTC):%Y, %H}:{describe.now()[-6:-4]} UTC")
