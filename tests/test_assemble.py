"""Every key is used, none is missing, every shape is right: else each is named."""

import math
from dataclasses import replace

import pytest
import torch

from msn_export.errors import CheckpointError
from msn_export.models.assemble import assemble, classes_of, config_of
from msn_export.models.variants import VARIANTS, VitConfig
from msn_export.models.vit_msn import VitMsn

TINY = VitConfig((16, 16), (8, 8), 3, dim=8, depth=2, heads=2, mlp_dim=12)
Tensors = dict[str, torch.Tensor]


def weights(config: VitConfig = TINY, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VitMsn(config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def message_of(tensors: Tensors, config: VitConfig = TINY) -> str:
    with pytest.raises(CheckpointError) as raised:
        assemble(tensors, config, "checkpoint x")
    return str(raised.value)


def test_the_model_has_the_weights_and_the_caller_no_longer_holds_them() -> None:
    tensors = weights()
    kept = dict(tensors)
    made = assemble(tensors, TINY, "checkpoint x")
    assert tensors == {}
    assert made.notes == ()
    assert not made.model.training
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, kept[name])
        assert not tensor.requires_grad


def test_a_weight_that_is_stored_negated_is_read_with_its_sign() -> None:
    plain, negated = weights(), weights()
    for name, tensor in negated.items():
        negated[name] = torch._neg_view(-tensor)
    expected = assemble(plain, TINY, "x")
    made = assemble(negated, TINY, "x")
    assert made.sha256 == expected.sha256
    for tensor in made.model.state_dict().values():
        assert not tensor.is_neg()
        tensor.numpy()  # what reads the memory sees it too


def test_the_hash_is_that_of_the_weights_not_of_their_layout() -> None:
    packed, strided, apart = weights(), weights(), weights()
    strided["blocks.0.mlp.fc1.weight"] = strided["blocks.0.mlp.fc1.weight"].T.contiguous().T
    for leaf in ("weight", "bias"):
        for i in range(2):
            parts = apart.pop(f"blocks.{i}.attn.qkv.{leaf}").chunk(3)
            for part, tensor in zip(("q", "k", "v"), parts, strict=True):
                apart[f"layers.{i}.attention.{part}_proj.{leaf}"] = tensor
    changed = weights()
    changed["norm.bias"] = changed["norm.bias"] + 1e-3
    hashes = [assemble(t, TINY, "x").sha256 for t in (packed, strided, apart, changed)]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read_as_fp32_and_told(dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    made = assemble(dict(tensors), TINY, "x")
    assert made.notes == (f"weights were {str(dtype).removeprefix('torch.')}, read as float32",)
    assert torch.equal(made.model.norm.bias, tensors["norm.bias"].float())


def test_what_pre_training_left_is_told() -> None:
    tensors = weights()
    tensors["fc.fc1.weight"] = torch.zeros(2)
    tensors["fc.\x1b[2J"] = torch.zeros(2)
    assert assemble(tensors, TINY, "x").notes == (
        "not read, as inference does not need it: 2 keys of pre-training "
        "(fc.fc1.weight, 'fc.\\x1b[2J')",
    )


def test_missing_unexpected_and_mis_shaped_keys_are_named_at_once() -> None:
    tensors = weights()
    del tensors["blocks.1.norm2.weight"]
    tensors["pooler.dense.weight"] = torch.zeros(3)
    tensors["norm.bias"] = torch.zeros(9)
    assert message_of(tensors) == (
        "checkpoint x: 1 key missing (blocks.1.norm2.weight), 1 key unexpected "
        "(pooler.dense.weight), 1 key of another shape (norm.bias is [9], expected [8]); "
        "is the configuration (--variant) right?"
    )


def test_a_long_list_of_keys_is_cut() -> None:
    message = message_of({})
    assert message.startswith("checkpoint x: 38 keys missing (cls_token, pos_embed, patch.weight, ")
    assert ", …), 0 keys unexpected, 0 keys of another shape; is the" in message


def test_a_third_of_a_projection_is_missing_by_its_own_name() -> None:
    tensors = weights()
    parts = tensors.pop("blocks.0.attn.qkv.weight").chunk(3)
    tensors["layers.0.attention.q_proj.weight"] = parts[0]
    tensors["layers.0.attention.k_proj.weight"] = parts[1]
    assert "1 key missing (blocks.0.attn.v.weight), 0 keys unexpected" in message_of(tensors)


def test_a_packed_and_a_separate_projection_at_once_are_refused() -> None:
    tensors = weights()
    tensors["layers.0.attention.q_proj.weight"] = torch.zeros(8, 8)
    assert "1 key unexpected (layers.0.attention.q_proj.weight)" in message_of(tensors)


def test_a_bias_that_the_configuration_denies_is_unexpected() -> None:
    assert "2 keys unexpected (blocks.0.attn.qkv.bias, blocks.1" in message_of(
        weights(), replace(TINY, qkv_bias=False)
    )


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_named(number) -> None:
    tensors = weights()
    tensors["blocks.1.mlp.fc2.weight"][3, 4] = number
    assert (
        message_of(tensors) == "checkpoint x: weight 'blocks.1.mlp.fc2.weight' has NaN or infinity"
    )


def test_finite_weights_whose_sum_is_not_are_accepted() -> None:
    tensors = weights()
    tensors["norm.bias"][:] = 3e38
    assert torch.equal(assemble(tensors, TINY, "x").model.norm.bias, torch.full((8,), 3e38))


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.ones(8, dtype=torch.int8), "int8"),
        (torch.ones(8, dtype=torch.complex64), "complex64"),
        (torch.ones(8).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.zeros(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "float4_e2m1fn_x2"),
        (torch.ones(8).to_sparse(), "torch.sparse_coo on cpu"),
        (torch.ones(8, device="meta"), "torch.strided on meta"),
    ],
)
def test_a_weight_that_is_no_plain_tensor_is_refused(tensor, kind) -> None:
    tensors = weights()
    tensors["norm.bias"] = tensor
    assert message_of(tensors) == (
        f"checkpoint x: weight 'norm.bias' is {kind}; expected dense floating-point numbers "
        "of 16 bits or more (quantised checkpoints are not read)"
    )


# --- weights that come without a config.json ------------------------------------------------------


def of_variant(name: str, **more: torch.Tensor) -> Tensors:
    with torch.device("meta"):
        return {**VitMsn(VARIANTS[name]).state_dict(), **more}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_shape_is_recognised(name) -> None:
    assert config_of(of_variant(name), None, "file") == VARIANTS[name]


def test_its_classifier_is_counted() -> None:
    head = {"classifier.weight": torch.zeros(3, 384), "classifier.bias": torch.zeros(3)}
    config = config_of(of_variant("vit-msn-small", **head), None, "file")
    assert config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert config_of({**weights(), **head}, "vit-msn-base", "file").labels == config.labels


@pytest.mark.parametrize("tensors", [{}, weights()])
def test_weights_that_fit_no_published_shape_ask_for_one(tensors) -> None:
    with pytest.raises(CheckpointError) as raised:
        config_of(tensors, None, "file")
    assert str(raised.value) == (
        "file fits no published shape; put its config.json beside it, or name one with --variant "
        "(vit-msn-small, vit-msn-base, vit-msn-large, vit-msn-base-4, vit-msn-large-7)"
    )


@pytest.mark.parametrize("shape", [(), (3,), (0, 8), (2, 2, 2)])
def test_a_classifier_that_is_no_matrix_is_named(shape) -> None:
    with pytest.raises(CheckpointError) as raised:
        classes_of({"classifier.weight": torch.zeros(shape)}, "file")
    assert str(raised.value) == (
        f"file: classifier.weight is {list(shape)}; expected [classes, hidden size]"
    )
