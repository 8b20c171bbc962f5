"""The traced graph is small, named after modules, and carries nothing of this machine."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from msn_export.errors import GraphError
from msn_export.graph.summary import tensor_specs
from msn_export.graph.torch_reference import TorchRunner, trace
from msn_export.images import normalize
from msn_export.models.checkpoint import load_checkpoint
from msn_export.preprocessing import preset
from msn_export.spec import BatchRange, Head, ImageSize, InputFormat
from tests.builders.checkpoints import hugging_face
from tests.builders.graphs import op_types

PREPROCESSING = preset("hf", ImageSize(32, 32))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    hugging_face(folder, labels=3)
    return load_checkpoint(str(folder)).model


def traced(
    model, heads=(Head.CLS,), input_format=InputFormat.FLOAT, batch=BatchRange()
) -> ir.Model:
    return trace(
        model, heads=heads, input_format=input_format, batch=batch, preprocessing=PREPROCESSING
    )


def run(graph: ir.Model, images: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: images})


def test_a_block_is_one_fused_attention_and_no_more_nodes_than_it_needs(model) -> None:
    graph = traced(model, [Head.TOKENS])
    block = [node.op_type for node in graph.graph if (node.name or "").startswith("blocks.1.")]
    assert block == [
        "LayerNormalization",
        "MatMul", "Add", "Reshape", "Transpose", "Split", "Attention", "Transpose", "Reshape",
        "MatMul", "Add", "Add",
        "LayerNormalization", "MatMul", "Add", "Gelu", "MatMul", "Add", "Add",
    ]  # fmt: skip
    assert not {"Identity", "Constant", "Slice", "Squeeze", "Where"} & set(op_types(graph))
    assert all(len(node.inputs) == 3 for node in graph.graph if node.op_type == "Attention")


def test_nodes_and_weights_are_named_after_modules(model) -> None:
    graph = traced(model)
    names = {node.name for node in graph.graph}
    assert {
        "blocks.0.attn.qkv.MatMul",
        "blocks.0.attn.Attention",
        "norm.LayerNormalization",
    } <= names
    assert {"blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias", "patch.weight", "pos_embed"} <= set(
        graph.graph.initializers
    )
    assert len(names) == len(graph.graph)


def test_the_graph_carries_no_path_of_this_machine(model) -> None:
    text = ir.to_proto(traced(model)).SerializeToString()
    assert b"/site-packages/" not in text
    assert b".py" not in text


@pytest.mark.parametrize("input_format", [InputFormat.FLOAT, InputFormat.UINT8])
def test_every_head_computes_what_the_reference_does(model, input_format) -> None:
    heads = list(Head)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    planes = normalize(pixels, PREPROCESSING)
    wanted = TorchRunner(model, heads)(planes)
    got = run(
        traced(model, heads, input_format), pixels if input_format is InputFormat.UINT8 else planes
    )
    for head, output in zip(heads, got, strict=True):
        # fp32, other order of additions; folding the normalisation adds a rounding a weight
        np.testing.assert_allclose(output, wanted[head.output], atol=2e-5)


@pytest.mark.parametrize(("batch", "size"), [("1:8:32", "batch"), ("4", 4), ("1", 1)])
def test_batch_is_the_only_dynamic_axis(model, batch, size) -> None:
    graph = traced(model, batch=BatchRange.parse(batch))
    (spec,) = tensor_specs(list(graph.graph.inputs))
    assert spec.name == "pixel_values"
    assert spec.shape == (size, 3, 32, 32)
    (output,) = tensor_specs(list(graph.graph.outputs))
    assert (output.name, output.shape) == ("embedding", (size, 64))


def test_a_dynamic_graph_runs_at_any_batch(model) -> None:
    graph = traced(model)
    for count in (1, 2, 5):
        images = np.zeros((count, 3, 32, 32), np.float32)
        assert run(graph, images)[0].shape == (count, 64)


def test_logits_without_a_classifier_are_refused(tmp_path) -> None:
    hugging_face(tmp_path)
    model = load_checkpoint(str(tmp_path)).model
    with pytest.raises(GraphError, match="head logits needs a classifier"):
        traced(model, [Head.LOGITS])


def test_the_exporters_own_remarks_stay_silent(model, capfd) -> None:
    traced(model)
    assert capfd.readouterr() == ("", "")
    assert torch.onnx.__name__
