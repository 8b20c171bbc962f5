"""onnxruntime's fused operators compute the same as those they are written as."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from msn_export.graph.blocks import find_stream
from msn_export.graph.fused_operators import write_fused
from msn_export.graph.opset import raised_where_possible, understand
from msn_export.graph.simplify import resolve_shapes
from msn_export.graph.summary import Structure, differences, structure_of, unread
from tests.builders.checkpoints import hugging_face
from tests.builders.foreign import (
    Reading,
    cls,
    exported,
    fused_by_onnxruntime,
    rewritten,
    scripted,
    without_last_skip,
)
from tests.builders.graphs import op_types, random_feeds, run

HEAD = """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
g (float[b,3,8] x, float[b,3,8] s, float[8] gain, float[8] shift, float[8] bias, float[8,24] w,
 float[24] wide, float[b,2,3,3] a, float[2,2,3,4] t) => (float y)
"""
# the operator, what it is written as, and what is beside it
FUSED = {
    "SkipLayerNormalization": (
        "y = com.microsoft.SkipLayerNormalization <epsilon = 0.1> (x, s, gain, shift, bias)",
        ["Add", "Add", "LayerNormalization"],
    ),
    "its sum too": (
        """n, m, d, sum = com.microsoft.SkipLayerNormalization <epsilon = 0.1> (x, s, gain, shift)
        y = Mul (n, sum)""",
        ["Add", "LayerNormalization", "Mul"],
    ),
    "the sum alone": (
        "n, m, d, y = com.microsoft.SkipLayerNormalization (x, s, gain, shift, bias)",
        ["Add", "Add"],
    ),
    "its default epsilon": (
        "z = Mul (x, x) d = Sub (z, z) y = com.microsoft.SkipLayerNormalization (d, d, gain)",
        ["Mul", "Sub", "Add", "LayerNormalization"],
    ),
    "SkipSimplifiedLayerNormalization": (
        "y = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 0.1> (x, s, gain, bias)",
        ["Add", "Add", "RMSNormalization"],
    ),
    "BiasGelu": ("y = com.microsoft.BiasGelu (x, bias)", ["Add", "Gelu"]),
    "Gelu": ("y = com.microsoft.Gelu (x)", ["Gelu"]),
    "FastGelu": ("y = com.microsoft.FastGelu (x)", ["Gelu"]),
    "FastGelu with a bias": ("y = com.microsoft.FastGelu (x, bias)", ["Add", "Gelu"]),
    "QuickGelu": ("y = com.microsoft.QuickGelu (x)", ["Mul", "Sigmoid", "Mul"]),
    "FusedMatMul": (
        "y = com.microsoft.FusedMatMul <alpha = 0.5, transB = 1> (x, s)",
        ["Transpose", "MatMul", "Mul"],
    ),
    "FusedMatMul of the left": (
        "y = com.microsoft.FusedMatMul <transA = 1> (x, s)",
        ["Transpose", "MatMul"],
    ),
    "Attention": (
        "y = com.microsoft.Attention <num_heads = 2> (x, w, wide)",
        ["MatMul", "Add", "Split", "Attention"],
    ),
    "Attention with its own scale, and numbers added to the scores": (
        "y = com.microsoft.Attention <num_heads = 2, scale = 0.3> (x, w, wide, , , a)",
        ["MatMul", "Add", "Split", "Attention"],
    ),
    "MultiHeadAttention": (
        "y = com.microsoft.MultiHeadAttention <num_heads = 2> (x, s, x)",
        ["Attention"],
    ),
    "MultiHeadAttention behind an operator of onnxruntime": (
        """q = com.microsoft.Gelu (x)
        y = com.microsoft.MultiHeadAttention <num_heads = 2, scale = 0.3> (q, s, q, , , a)""",
        ["Gelu", "Attention"],
    ),
}


def tokens(model: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = model(pixels).last_hidden_state
    return found


def read(body: str) -> ir.Model:
    model = ir.from_proto(onnx.parser.parse_model(f"{HEAD} {{ {body} }}"))
    resolve_shapes(model)
    return model


@pytest.mark.parametrize(("body", "written"), FUSED.values(), ids=FUSED.keys())
def test_what_is_written_computes_the_same(body, written) -> None:
    model = read(body)
    feeds = random_feeds(model)
    before = run(model, feeds)
    assert write_fused(model)
    assert op_types(model) == written
    assert all(not node.domain for node in model.graph)
    resolve_shapes(model)
    # both in float32, sums in another order
    np.testing.assert_allclose(run(model, feeds), before, rtol=1e-5, atol=1e-5)


def test_biases_of_three_projections_are_added_apart() -> None:
    model = read("y = com.microsoft.MultiHeadAttention <num_heads = 2> (x, s, x, wide)")
    feeds = random_feeds(model)
    wide = next(value for value in model.graph.inputs if value.name == "wide")
    model.graph.inputs.remove(wide)
    wide.const_value = ir.tensor(feeds.pop("wide"), name="wide")
    model.graph.register_initializer(wide)
    before = run(model, feeds)
    assert write_fused(model)
    assert op_types(model) == ["Add", "Add", "Add", "Attention"]
    np.testing.assert_allclose(run(model, feeds), before, rtol=1e-5, atol=1e-5)


def test_a_bias_and_the_stream_are_added_apart() -> None:
    """BiasAdd has no kernel on a CPU."""
    model = read("y = com.microsoft.BiasAdd (x, bias, s)")
    feeds = random_feeds(model)
    assert write_fused(model)
    want = feeds["x"] + feeds["bias"] + feeds["s"]
    np.testing.assert_allclose(run(model, feeds), want, rtol=1e-6, atol=1e-6)


UNREAD = {
    "a mean that is read": """n, m = com.microsoft.SkipLayerNormalization (x, s, gain)
        y = Mul (n, m)""",
    "a mask": "y = com.microsoft.Attention <num_heads = 2> (x, w, wide, k)",
    "later tokens hidden": """y = com.microsoft.MultiHeadAttention <num_heads = 2,
        unidirectional = 1> (x, s, x)""",
    "packed keys and values": "y = com.microsoft.MultiHeadAttention <num_heads = 2> (t, t, t)",
    "batches turned": "y = com.microsoft.FusedMatMul <transBatchA = 1> (t, t)",
    "another operator": "y = com.microsoft.BiasSplitGelu (x, wide)",
    "another domain's": "y = example.SkipLayerNormalization (x, s, gain)",
}


@pytest.mark.parametrize("body", UNREAD.values(), ids=UNREAD.keys())
def test_what_holds_more_stays_as_it_is(body) -> None:
    text = HEAD.replace("float[b,2,3,3] a", "float[b,2,3,3] a, int32[b,3] k").replace(
        '"com.microsoft" : 1', '"com.microsoft" : 1, "example" : 1'
    )
    model = ir.from_proto(onnx.parser.parse_model(f"{text} {{ {body} }}"))
    before = op_types(model)
    assert not write_fused(model)
    assert op_types(model) == before


# --- graphs that onnxruntime optimised ------------------------------------------------------------


def structure(path: Path) -> tuple[Structure, list[str]]:
    """Read a graph as a comparison does."""
    model = ir.from_proto(onnx.load(path))
    understand(model)
    model = raised_where_possible(model)
    stream = find_stream(model)
    return structure_of(model, stream), unread(model, stream)


@pytest.mark.parametrize("writer", [scripted, exported])
@pytest.mark.parametrize("level", ["EXTENDED", "transformers"])
def test_an_optimised_graph_has_the_structure_it_had(writer, level, tmp_path) -> None:
    model = Reading(hugging_face(tmp_path / "hf"), cls)
    path = writer(tmp_path / "m.onnx", model)
    before, _ = structure(path)
    optimised = fused_by_onnxruntime(path, level)
    assert "com.microsoft" in {node.domain for node in onnx.load(optimised).graph.node}
    after, notes = structure(optimised)
    assert after == pytest.approx(before)
    assert notes == []


def test_an_addition_that_is_missing_is_named_in_an_optimised_graph(tmp_path) -> None:
    path = exported(tmp_path / "m.onnx", Reading(hugging_face(tmp_path / "hf"), tokens))
    before, _ = structure(path)
    after, _ = structure(rewritten(fused_by_onnxruntime(path), without_last_skip))
    assert differences(before, after) == [
        "addition of the MLP to the stream is missing, the reference's present in block 1"
    ]


def test_a_block_is_not_compared_where_an_operator_of_another_domain_stands(tmp_path) -> None:
    """The last addition is in it, and the final norm."""
    path = exported(tmp_path / "m.onnx", Reading(hugging_face(tmp_path / "hf"), tokens))
    before, _ = structure(path)
    fused = onnx.load(fused_by_onnxruntime(path))
    last = next(node for node in fused.graph.node if node.op_type.startswith("Skip"))
    last.domain = "example"
    fused.opset_import.append(onnx.helper.make_opsetid("example", 1))
    onnx.save(fused, path)
    after, notes = structure(path)
    assert differences(before, after) == []
    assert set(before) - set(after) == {name for name in before if not name.startswith("block 0")}
    assert notes == [
        "its epsilons, activations and additions were not compared, "
        "example.SkipLayerNormalization is not read: in block 1, what follows the blocks"
    ]


def test_where_attention_of_another_domain_stands_no_block_is_compared(tmp_path) -> None:
    path = exported(tmp_path / "m.onnx", Reading(hugging_face(tmp_path / "hf"), tokens))
    model = ir.from_proto(onnx.load(path))
    understand(model)
    model = raised_where_possible(model)
    entry = find_stream(model).entry
    strange = ir.node("PagedAttention", [entry], domain="example")
    model.graph.insert_after(entry.producer(), strange)
    stream = find_stream(model)
    assert structure_of(model, stream) == {}
    assert unread(model, stream) == [
        "its epsilons, activations and additions were not compared, example.PagedAttention is not "
        "read: in block 0, block 1, what follows the blocks"
    ]
