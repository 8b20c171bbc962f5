"""Kernels are read out of a log and an inspector's answer; their nodes name the block."""

import json

import pytest

from msn_export.engine.census import by_profile
from msn_export.engine.kernels import (
    Constant,
    Kernel,
    block_of,
    is_fused_attention,
    read_inspector,
    read_log,
)
from msn_export.errors import BuildError

# One record of each form out of a log of TensorRT-RTX 1.7.1, strides left out.
LOG = """Layers:
Name: __mye7575_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], \
TacticName: , StreamId: 0, Metadata:\x20
Name: __myl_FcAdd_myl1_4, LayerType: runtime_fusion, Inputs: [ { Name: a [profile 1], \
Dimensions: [-1,64], Datatype: Half, Format: (Linear) Row major linear format }], Constants: [ \
{ Name: b, Dimensions: [1,192], Datatype: Half, Format: (Linear) Row major linear format }, \
{ Name: w, Dimensions: [64,192], Datatype: Half, Format: (Linear) Row major linear format }], \
Outputs: [ { Name: c, Dimensions: [-1,192], Datatype: Half, Format: (Linear) Row major linear \
format }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: blocks.0.a][ONNX Layer: blocks.0.b]

I/O Tensors:
 Name: x, IOMode: Input, DataType: Half
"""


def test_records_of_a_log() -> None:
    shape, product = read_log(["[W] something else", LOG])
    assert shape == Kernel("__mye7575_0_myl0_0", "shape_call", (), ())
    assert product == Kernel(
        "__myl_FcAdd_myl1_4",
        "runtime_fusion",
        ("Half",),
        ("Half",),
        (Constant("b", "Half", (1, 192)), Constant("w", "Half", (64, 192))),
        ("blocks.0.a", "blocks.0.b"),
        profile=1,
    )
    assert product.constants[1].bytes == 2 * 64 * 192
    assert [census.profile for census in by_profile((shape, product))] == [0, 1]


def test_a_log_without_records_is_refused() -> None:
    with pytest.raises(BuildError, match="log has no kernel records; the engine cannot be judged"):
        read_log(["nothing of interest"])


def test_a_record_of_unknown_form_is_refused() -> None:
    with pytest.raises(BuildError, match=r"unknown form \(no '\], TacticName:' in 'Name: x, Lay"):
        read_log(
            ["Layers:\nName: x, LayerType: y, Inputs: [], Constants: [], Outputs: [ and so on"]
        )


INSPECTED = {
    "Layers": [
        {
            "Name": "_gemm_mha_v2_myl0_6",
            "LayerType": "kgen",
            "Inputs": [{"Name": "q", "Dimensions": [-1, 6, 197, 64], "Format/Datatype": "Half"}],
            "Outputs": [
                {"Name": "y", "Dimensions": [-1], "Format/Datatype": "Row major linear FP16 format"}
            ],
            "TacticName": "_gemm_mha_v2_0xf3",
            "StreamId": 0,
            "Metadata": "[ONNX Layer: blocks.0.q]\x1e[ONNX Layer: blocks.0.attn]",
        },
        {
            "Name": "fc1 [profile 1]",
            "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Datatype": "Half"}],
            "Outputs": [{"Name": "y", "Datatype": "Half"}],
            "Constants": [{"Name": "w", "Dimensions": [64, 256], "Datatype": "Half"}],
            "Metadata": None,
        },
    ],
    "Bindings": ["x", "y"],
}


def test_layers_of_an_inspector() -> None:
    attention, product = read_inspector(json.dumps(INSPECTED))
    assert is_fused_attention(attention)
    assert (attention.inputs, attention.outputs) == (("Half",), ("Half",))
    assert attention.layers == ("blocks.0.q", "blocks.0.attn")
    assert product.constants == (Constant("w", "Half", (64, 256)),)
    assert (attention.profile, product.profile) == (0, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"Layers": ["conv1", "fc1"]}', "tells only the names of its layers"),
        ('{"Layers": []}', "tells only the names of its layers"),
        ("", "inspector's answer is not understood"),
        ("{}", "inspector's answer is not understood"),
        ('{"Layers": [{"Name": "x"}]}', "inspector's answer is not understood"),
        ('{"Layers": 3}', "inspector's answer is not understood"),
    ],
)
def test_an_inspector_that_tells_too_little(text: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        read_inspector(text)


@pytest.mark.parametrize(
    ("layers", "block"),
    [
        (("blocks.3.attn.qkv.MatMul", "blocks.3.attn.qkv.Add"), 3),
        (("blocks.3.add2", "blocks.4.norm1"), 3),
        (("blocks.3.add2", "blocks.4.norm1", "blocks.4.norm1.Cast"), 4),
        (("pos.Add", "blocks.0.norm1"), 0),
        (("norm", "pos.Add"), None),
        ((), None),
    ],
)
def test_a_kernel_belongs_to_the_block_most_of_its_nodes_name(
    layers: tuple[str, ...], block: int | None
) -> None:
    assert Kernel("k", "kgen", ("Half",), ("Half",), layers=layers).block == block


@pytest.mark.parametrize(
    ("node", "block"),
    [
        ("blocks.11.mlp.fc1.MatMul", 11),
        ("/vit/encoder/layer.7/attention/attention/query/MatMul", 7),
        ("/layers.0/q_proj/MatMul", 0),
        ("vit.encoder.layer.0.attentionvalue", 0),
        ("encoder/layers/encoder_layer_5/self_attention", 5),
        ("node_layer_norm_12", None),
        ("node_MatMul_12", None),
        ("layernorm.0", None),
        ("", None),
    ],
)
def test_block_of_a_node(node: str, block: int | None) -> None:
    assert block_of(node) == block
