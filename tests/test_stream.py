"""The residual stream is found by structure, in graphs of any exporter; parts by structure too."""

import contextlib
import io as stdio
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from checkpoints import hugging_face
from graphs import parse, run

from msn_export.errors import GraphError
from msn_export.graph import io
from msn_export.graph.emulate import emulate_bf16
from msn_export.graph.expose import SEEN, expose
from msn_export.graph.inside import inside, modules_of, parts_of
from msn_export.graph.narrow import narrow_to_first_token
from msn_export.graph.precision import type_graph
from msn_export.graph.precision_map import precision_map
from msn_export.graph.stream import ENTRY, find_stream, stages_of
from msn_export.graph.structure import differences, structure_of, structure_of_module
from msn_export.models.checkpoints import load_checkpoint
from msn_export.progress import Silent
from msn_export.run_onnx import OnnxJob, run_onnx
from msn_export.spec import Dtype, Head, Target

# One pre-norm block; the tanh form of GELU has an addition of two computed values inside
BLOCK = """
g (float[b,3,4] x) => (float[b,3,4] y)
<float[4] gain = {1.0, 1.0, 1.0, 1.0}, float[4,4] w = {1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0,
 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0}, float[4] position = {0.1, 0.2, 0.3, 0.4},
 float cube = {0.04}>
{
    entry = Add (x, position)
    n1 = LayerNormalization <epsilon = 0.000001> (entry, gain)
    q = MatMul (n1, w)
    kt = Transpose <perm = [0, 2, 1]> (n1)
    scores = MatMul (q, kt)
    p = Softmax <axis = -1> (scores)
    mixed = MatMul (p, n1)
    attended = MatMul (mixed, w)
    middle = Add (attended, entry)
    n2 = LayerNormalization <epsilon = 0.00001> (middle, gain)
    hidden = MatMul (n2, w)
    squared = Mul (hidden, hidden)
    third = Mul (squared, cube)
    inner = Add (hidden, third)
    bent = Tanh (inner)
    added = MatMul (bent, w)
    stream = Add (middle, added)
    y = LayerNormalization <epsilon = 0.000001> (stream, gain)
}
"""


def text() -> ir.Model:
    return parse(BLOCK)


def test_the_stream_is_the_operand_that_the_other_comes_from() -> None:
    stream = find_stream(text())
    (block,) = stream.blocks
    assert stream.entry.name == "entry"
    assert [value.name for value in block.streams] == ["middle", "stream"]
    assert [value.name for value in block.branches] == ["attended", "added"]
    assert block.output.name == "stream"
    assert len(block.nodes) == 16
    assert list(stages_of(text())) == [ENTRY, "block 0"]


def test_parts_are_found_by_structure() -> None:
    (block,) = find_stream(text()).blocks
    assert {part: value.name for part, value in parts_of(block).items()} == {
        "block 0 norm before attention": "n1",
        "block 0 attention heads": "mixed",
        "block 0 attention": "attended",
        "block 0 stream after attention": "middle",
        "block 0 norm before MLP": "n2",
        "block 0 activation": "bent",
        "block 0 MLP": "added",
    }
    names = [names for names, _ in inside(block)]
    assert ("n1", "block 0 norm before attention") in names
    assert ("scores",) in names


def test_what_a_graph_says_of_itself_is_read() -> None:
    told = structure_of(text())
    assert told["block 0 norm before attention: epsilon"] == pytest.approx(1e-6)
    assert told["block 0 norm before MLP: epsilon"] == pytest.approx(1e-5)
    assert told["block 0: activation"] == "gelu, tanh form"
    assert told["final norm: epsilon"] == pytest.approx(1e-6)


def test_contradictions_are_told_once_for_all_their_places() -> None:
    reference = {f"block {i} norm before MLP: epsilon": 1e-6 for i in range(12)}
    candidate = dict.fromkeys(reference, 1e-5) | {"block 3: activation": "gelu"}
    assert differences(reference, candidate) == [
        "epsilon is 1e-05, the reference's 1e-06 in block 0 norm before MLP, block 1 norm before "
        "MLP, block 2 norm before MLP and 9 more"
    ]
    assert differences(reference, {}) == []
    assert differences(reference, dict.fromkeys(reference, float(np.float32(1e-6)))) == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{ y = Relu (x) }", "no residual stream"),
        ("{ a = Relu (x)  y = Add (x, a) }", "no residual stream with attention"),
    ],
)
def test_what_is_no_transformer_is_refused(body, reason) -> None:
    model = parse(f"g (float[b,3] x) => (float[b,3] y) {body}")
    with pytest.raises(GraphError, match=reason):
        find_stream(model)
    assert structure_of(model) == {}
    assert precision_map(model) == ()


def test_shown_values_are_the_graphs_own_and_change_nothing() -> None:
    model = text()
    shown = expose(model, {"block 0": find_stream(model).blocks[0].output})
    assert [value.name for value in shown.graph.outputs] == ["y", f"{SEEN}block 0"]
    assert len(model.graph.outputs) == 1
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    np.testing.assert_array_equal(run(shown, {"x": x}), run(model, {"x": x}))


def test_half_precision_is_shown_as_float32() -> None:
    for dtype in (Dtype.FP16, Dtype.BF16):
        model = text()
        type_graph(model, dtype)
        shown = expose(model, {"block 0": find_stream(model).blocks[0].output})
        assert shown.graph.outputs[1].dtype == ir.DataType.FLOAT
        if dtype is Dtype.BF16:
            emulated = emulate_bf16(shown)
            assert [value.name for value in emulated.graph.outputs] == ["y", f"{SEEN}block 0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream")
    hugging_face(path / "hf")
    return path


@pytest.mark.parametrize("target", Target)
def test_our_graphs_of_every_target_name_blocks_and_modules(target, folder, tmp_path) -> None:
    job = OnnxJob(str(folder / "hf"), tmp_path / "m.onnx", target=target, check=False)
    run_onnx(replace(job, heads=(Head.TOKENS,)), Silent())
    model = io.load(tmp_path / "m.onnx")
    io.infer_shapes(model)
    stream = find_stream(model)
    assert [block.number for block in stream.blocks] == [0, 1]
    assert all(block.output.name.startswith(f"blocks.{block.number}.") for block in stream.blocks)
    assert set(modules_of(stream.blocks[1])) == {
        f"blocks.1.{leaf}"
        for leaf in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    }
    assert len(parts_of(stream.blocks[1])) == 7
    module = load_checkpoint(str(folder / "hf")).model
    assert structure_of(model).keys() == structure_of_module(module).keys()
    assert differences(structure_of_module(module), structure_of(model)) == []
    (first, _) = precision_map(model)
    assert set(first.dtypes) == {"fp32"}


def test_a_last_block_for_the_first_token_alone_keeps_its_place(folder, tmp_path) -> None:
    run_onnx(OnnxJob(str(folder / "hf"), tmp_path / "m.onnx", check=False), Silent())
    model = io.load(tmp_path / "m.onnx")
    narrow_to_first_token(model)
    stream = find_stream(model)
    assert [block.number for block in stream.blocks] == [0, 1]
    assert list(stream.blocks[1].output.shape)[1:] == [1, 64]
    assert len(parts_of(stream.blocks[1])) == 7


class Tokens(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).last_hidden_state


def exported_elsewhere(model: torch.nn.Module, path: Path, opset: int) -> Path:
    """Export Hugging Face's own model with torch alone; opset 14 writes LayerNorm out."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(stdio.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Tokens(model), (torch.zeros(2, 3, 32, 32),), path, dynamo=opset > 17,
            opset_version=opset, input_names=["pixel_values"], output_names=["last_hidden_state"],
            verbose=False,
            **({"external_data": False} if opset > 17 else {}),
        )  # fmt: skip
    return path


@pytest.mark.parametrize("opset", [14, 18, 23])
def test_a_graph_of_another_exporter_has_the_same_stream(opset, tmp_path) -> None:
    path = exported_elsewhere(hugging_face(tmp_path / "hf"), tmp_path / "hf.onnx", opset)
    model = io.load(path)
    io.infer_shapes(model)
    stream = find_stream(model)
    assert [block.number for block in stream.blocks] == [0, 1]
    expected = 5 if opset == 14 else 7  # a LayerNorm that is written out has no operator
    assert [len(parts_of(block)) for block in stream.blocks] == [expected, expected]
