"""Attention is judged as the engine computes it, and is bf16 where fp16 does not hold it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from msn_export import manifest
from msn_export.artifact import GraphFile
from msn_export.cli import main
from msn_export.commands.jobs import TrtJob
from msn_export.commands.trt_graph import (
    AttentionGate,
    AttentionVerdict,
    Compilable,
    check_sums,
    first_bf16,
    in_bf16,
    more_bf16,
    prepare,
    sums_in_fp16,
)
from msn_export.engine.census import Census
from msn_export.errors import GraphError, ToleranceError
from msn_export.graph import io
from msn_export.graph.precision import attention_in_bf16
from msn_export.manifest import SumsRecord
from msn_export.metrics.evaluate import draw, run_reference
from msn_export.metrics.tolerances import GATES, Gate
from msn_export.progress import SILENT
from msn_export.spec import ComputeCapability, Dtype
from tests.builders.checkpoints import hugging_face
from tests.builders.engine_builds import NEEDS_RTX

pytestmark = NEEDS_RTX
RTX = ("--backend", "tensorrt-rtx", "--compute-capability")
CORES = ("blocks.0.attn.Attention", "blocks.1.attn.Attention")
SM_75, SM_89 = ComputeCapability(7, 5), ComputeCapability(8, 9)


def exported(folder: Path, *, value_bias: float = 0.0, query_bias: float = 0.0) -> Path:
    """Export a tiny checkpoint (17 tokens, 2 blocks) with a bias of block 0's attention changed."""
    model = hugging_face(folder / "hf")
    with torch.no_grad():
        model.layers[0].attention.v_proj.bias[3] += value_bias
        model.layers[0].attention.q_proj.bias[3] += query_bias
    model.save_pretrained(folder / "hf")
    output = folder / "m.onnx"
    arguments = ["onnx", str(folder / "hf"), "-o", str(output), "--head", "tokens"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def summed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make values of 5000, which fp16 holds; 17 tokens of them, summed, are 85000."""
    return exported(tmp_path_factory.mktemp("summed"), value_bias=5000.0)


def build(model: Path, capability: str, *options: str):
    output = model.parent / f"{capability}.engine"
    arguments = ["trt", str(model), "--fp16", "-o", str(output), "--json", "--force"]
    return CliRunner().invoke(main, [*arguments, *RTX, capability, *options])


def told(result) -> dict:
    assert result.exit_code == 0, result.output
    parsed: dict = json.loads(result.stdout)
    return parsed


def test_fp16_sums_are_emulated_and_judged(plain) -> None:
    said = told(build(plain, "8.9"))
    attention = said["engine"]["attention"]
    assert attention["fp16"] == list(CORES)
    assert attention["bf16"] == []
    assert attention["check"]["passed"] is True
    assert attention["check"]["images"] == 4
    assert "2 of attention with scores and sums in fp16" in attention["check"]["executed_on"]
    assert attention["check"]["max_abs"] != said["check"]["max_abs"]
    assert set(attention["scores"]) == set(attention["sums"]) == set(CORES)
    assert all(0 < peak < 1000 for peak in attention["sums"].values())
    assert not any("attention" in note for note in said["notes"])


def test_sums_beyond_fp16_are_typed_bf16_in_the_engine_alone(summed) -> None:
    said = told(build(summed, "8.9"))
    engine = said["engine"]
    assert engine["accumulators"] == {"fp32": 1, "fp16": 1}
    assert engine["fused_attention"] == 2
    assert engine["gemm_dtypes"] == {"Half": 8}
    assert engine["attention"]["bf16"] == [CORES[0]]
    assert engine["attention"]["fp16"] == [CORES[1]]
    assert engine["attention"]["check"]["passed"] is True
    assert "1 of attention in bf16 with sums in fp32" in engine["attention"]["check"]["executed_on"]
    assert (
        f"attention is bf16 in the engine alone, where fp16 does not hold it: {CORES[0]}; it was "
        "checked in an emulation"
    ) in said["notes"]
    assert said["check"]["cosine_min"] > 0.999  # of the fp16 graph, which onnxruntime runs


def test_below_sm_8_0_the_sum_is_named_instead(summed) -> None:
    result = build(summed, "7.5")
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith(
        "error: the engine's attention keeps scores and sums in fp16: a sum of values of "
        f"{CORES[0]} reaches "
    )
    assert line.endswith("bf16 would hold them, and needs SM 8.0 or later, not 7.5")
    assert not (summed.parent / "7.5.engine").exists()


def test_what_was_not_checked_is_said(plain) -> None:
    said = told(build(plain, "8.6", "--no-check"))
    assert said["engine"]["attention"]["check"] is None
    assert any("sums in fp16 in 2 blocks, which was not emulated" in n for n in said["notes"])


def test_queries_that_fp16_does_not_hold_are_bf16_from_the_start(tmp_path) -> None:
    model = exported(tmp_path, query_bias=119111.0)
    said = told(build(model, "8.9"))
    assert said["engine"]["attention"]["bf16"] == [CORES[0]]
    assert said["islands"]["blocks.0.attn.Split.0"] > 65504
    result = build(model, "7.5")
    assert result.stderr.splitlines()[-1] == (
        f"error: attention {CORES[0]} reads or writes values that fp16 does not hold; bf16 would "
        "hold them, and needs SM 8.0 or later, not 7.5"
    )


def test_the_table_says_what_was_emulated(summed) -> None:
    output = summed.parent / "table.engine"
    arguments = ["trt", str(summed), "--fp16", "-o", str(output), "--force", *RTX, "8.9"]
    result = CliRunner().invoke(main, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert f"1, which fp16 does not hold: {CORES[0]}" in result.stdout
    assert "4 images, scores up to " in result.stdout


def test_a_fixed_batch_is_emulated_at_it(plain, tmp_path) -> None:
    static = tmp_path / "static.onnx"
    arguments = ["onnx", str(plain.parent / "hf"), "-o", str(static), "--batch", "3"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert told(build(static, "8.9"))["engine"]["attention"]["check"]["batches"] == [3]


# --- the parts ----------------------------------------------------------------------------------


@pytest.fixture
def typed(plain, tmp_path) -> Compilable:
    from msn_export.engine.options import find_backend

    source = GraphFile.read(plain)
    sample = draw(None, source.preprocessing)
    job = TrtJob(plain, precision=Dtype.FP16)
    return prepare(job, source, find_backend("tensorrt-rtx"), sample, tmp_path, SILENT)


def against(plain: Path, gate: Gate) -> AttentionGate:
    from msn_export.runtime.onnxruntime import OrtRunner

    source = GraphFile.read(plain)
    reference = run_reference(
        OrtRunner(plain), draw(None, source.preprocessing), source.input_format
    )
    return AttentionGate(reference, gate, source.input_format, None)


def test_what_costs_more_than_the_gate_allows_is_tried_in_bf16(plain, typed) -> None:
    strict = against(plain, Gate(max_abs=1e-9))
    judged = check_sums(typed, CORES, (), strict)
    assert judged.over == ()
    assert judged.failures[0].startswith("output 'last_hidden_state': max_abs ")
    assert more_bf16(judged, [SM_89]) == CORES
    with pytest.raises(
        ToleranceError, match=r"in fp16: output 'last_hidden_state': max_abs .*7\.5"
    ):
        more_bf16(judged, [SM_89, SM_75])
    last = check_sums(typed, (), CORES, strict)
    with pytest.raises(ToleranceError, match="emulated in bf16: output 'last_hidden_state': max_a"):
        more_bf16(last, [SM_89])
    judged = check_sums(typed, CORES, (), against(plain, GATES[Dtype.FP16]))
    assert more_bf16(judged, [SM_75]) == ()


@pytest.mark.parametrize(
    ("pair", "over"),
    [((16376.0, 16376.0), False), ((16377.0, 1.0), True), ((1.0, 16377.0), True),
     ((float("nan"), 1.0), True), ((1.0, float("nan")), True), ((float("inf"), 1.0), True)],
)  # fmt: skip
def test_scores_and_sums_have_the_headroom_of_any_tensor(
    plain, typed, monkeypatch, pair, over
) -> None:
    """A quarter of 65504 is 16376."""
    monkeypatch.setattr(
        "msn_export.commands.trt_graph.peaks_of",
        lambda *_: np.array([(1.0, 1.0), pair], np.float32),
    )
    judged = check_sums(typed, CORES, (), against(plain, GATES[Dtype.FP16]))
    assert judged.over == ((CORES[1],) if over else ())


def test_the_number_of_images_follows_their_cost(plain, typed, monkeypatch) -> None:
    reference = against(plain, GATES[Dtype.FP16])
    monkeypatch.setattr(
        "msn_export.commands.trt_graph._WORK", 2 * 2 * 2 * 17 * 17
    )  # two images of it
    judged = check_sums(typed, CORES, (), reference)
    assert judged.record.check is not None
    assert judged.record.check.images == 2
    monkeypatch.setattr("msn_export.commands.trt_graph._WORK", 1)
    judged = check_sums(typed, CORES, (), reference)
    assert judged.record.check is not None
    assert judged.record.check.images == 1


def test_a_graph_is_written_in_bf16_for_the_compiler_beside_the_checked_one(typed) -> None:
    before = typed.path.read_bytes()
    written = in_bf16(typed, [CORES[1]])
    assert typed.path.read_bytes() == before
    assert in_bf16(typed, []) is typed
    model = io.load(written.path)
    io.infer_shapes(model)
    types = {
        node.name: node.inputs[0].dtype.name for node in model.graph if node.op_type == "Attention"
    }
    assert types == {CORES[0]: "FLOAT16", CORES[1]: "BFLOAT16"}
    assert written.asked[CORES[1]].bf16
    assert not written.asked[CORES[0]].bf16
    with pytest.raises(GraphError, match="the graph has no Attention node 'a'"):
        attention_in_bf16(model, ["a"])


def test_the_nodes_that_sum_in_fp16_are_those_of_any_profile(typed) -> None:
    from msn_export.engine.kernels import Kernel

    def profile(number: int, *sums: str) -> Census:
        return Census(
            tuple(
                Kernel("_gemm_mha_v2_myl0_6", "kgen", ("Half",), ("Half",), layers=(core,),
                       profile=number, accumulator=one)
                for core, one in zip(CORES, sums, strict=True)
            ),
            number,
        )  # fmt: skip

    assert sums_in_fp16([profile(0, "fp32", "unknown"), profile(1, "fp16", "fp32")], typed) == (
        CORES[0],
    )


def test_what_is_asked_for_is_bf16_from_the_start(typed) -> None:
    assert first_bf16(typed, [SM_89], [CORES[1], "elsewhere"]) == (CORES[1],)
    assert first_bf16(replace(typed, dtype=Dtype.FP32), [SM_75], [CORES[1]]) == ()


def test_an_engine_that_does_needs_no_more() -> None:
    assert more_bf16(AttentionVerdict(SumsRecord()), [SM_75]) == ()


def test_drift_builds_the_engine_with_the_same_attention(summed, tmp_path) -> None:
    from msn_export.commands.drift import build_marked

    told(build(summed, "8.9"))
    engine = summed.parent / "8.9.engine"
    written = manifest.read(engine)
    assert written is not None
    marked = manifest.read(build_marked(engine, written, tmp_path, SILENT))
    assert marked is not None
    assert marked.engine is not None
    assert marked.engine.attention is not None
    assert marked.engine.attention.bf16 == (CORES[0],)
