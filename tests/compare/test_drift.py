"""Two graphs are matched block by block by what they say, before anything runs."""

import shutil

import onnx_ir as ir

from msn_export.compare.drift import match
from msn_export.compare.sides import open_pair
from tests.builders.artifacts import classifier
from tests.contracts import faults

STAGES = ("patch embedding", "block 0", "block 1")


def test_equal_graphs_match_as_a_whole() -> None:
    matched = match(open_pair(str(classifier()), str(classifier().parent / "hf")))
    assert matched.whole
    assert matched.stages == STAGES
    assert matched.reasons == {}
    assert matched.named(("logits",)) == (*STAGES, "logits")


def test_another_epsilon_is_a_reason_of_its_block(tmp_path) -> None:
    def spoil(model: ir.Model) -> None:
        norms = [node for node in model.graph if node.op_type == "LayerNormalization"]
        norms[2].attributes.add(ir.AttrFloat32("epsilon", 0.5))

    wrong = faults.plant(classifier(), tmp_path / "wrong.onnx", spoil)
    matched = match(open_pair(str(classifier()), str(wrong)))
    assert matched.whole
    assert list(matched.reasons) == ["block 1"]
    assert "epsilon" in " ".join(matched.reasons["block 1"])


def test_a_copy_of_another_name_is_no_other_graph(tmp_path) -> None:
    copy = tmp_path / "copy.onnx"
    shutil.copy(classifier(), copy)
    assert match(open_pair(str(classifier()), str(copy))).reasons == {}
