"""Every key is used, none is missing, every shape is right: else each is named."""

import math
from dataclasses import replace

import pytest
import torch

from msn_export.errors import CheckpointError
from msn_export.models.config import VARIANTS, VitConfig
from msn_export.models.state_dict import assemble, classes_of, config_of, with_classifier
from msn_export.models.vit import VitMsn

TINY = VitConfig((16, 16), (8, 8), 3, dim=8, depth=2, heads=2, mlp_dim=12)
Tensors = dict[str, torch.Tensor]


def weights(config: VitConfig = TINY, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VitMsn(config).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def message_of(tensors: Tensors, config: VitConfig = TINY) -> str:
    with pytest.raises(CheckpointError) as raised:
        assemble(tensors, config, "checkpoint x", "c.json")
    return str(raised.value)


def test_the_model_has_the_weights_and_the_caller_no_longer_holds_them() -> None:
    tensors = weights()
    kept = dict(tensors)
    made = assemble(tensors, TINY, "checkpoint x", "c.json")
    assert tensors == {}
    assert made.notes == ()
    assert not made.model.training
    for name, tensor in made.model.named_parameters():
        assert torch.equal(tensor, kept.pop(name))
        assert not tensor.requires_grad
    assert kept == {}


def test_a_weight_that_is_stored_negated_is_read_with_its_sign() -> None:
    plain, negated = weights(), weights()
    for name, tensor in negated.items():
        negated[name] = torch._neg_view(-tensor)
    expected = assemble(plain, TINY, "x", "c")
    made = assemble(negated, TINY, "x", "c")
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
    hashes = [assemble(t, TINY, "x", "c").sha256 for t in (packed, strided, apart, changed)]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_read_as_fp32_and_told(dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    made = assemble(dict(tensors), TINY, "x", "c")
    assert made.notes == (f"weights were {str(dtype).removeprefix('torch.')}, read as float32",)
    assert torch.equal(made.model.norm.bias, tensors["norm.bias"].float())


def test_what_pre_training_left_is_told() -> None:
    tensors = weights()
    tensors["fc.fc1.weight"] = torch.zeros(2)
    tensors["fc.\x1b[2J"] = torch.zeros(2)
    tensors["pooler.dense.weight"] = torch.zeros(2)
    assert assemble(tensors, TINY, "x", "c").notes == (
        "not read: 2 keys of pre-training (fc.fc1.weight, 'fc.\\x1b[2J')",
        "not read: 1 key that transformers ignores with a warning (pooler.dense.weight)",
    )


def test_missing_unexpected_and_mis_shaped_keys_are_named_at_once() -> None:
    tensors = weights()
    del tensors["blocks.1.norm2.weight"]
    tensors["blocks.0.ls1.gamma"] = torch.zeros(3)
    tensors["norm.bias"] = torch.zeros(9)
    assert message_of(tensors) == (
        "checkpoint x: 1 key missing (blocks.1.norm2.weight), 1 key unexpected "
        "(blocks.0.ls1.gamma), 1 key of another shape (norm.bias is [9], expected [8]); "
        "the shape is from c.json: is it right?"
    )


def test_the_shape_is_blamed_only_where_shapes_contradict_it() -> None:
    tensors = weights()
    del tensors["blocks.1.norm2.weight"]
    assert message_of(tensors) == (
        "checkpoint x: 1 key missing (blocks.1.norm2.weight), 0 keys unexpected, 0 keys of another "
        "shape; the file is not whole, or of another model"
    )
    tensors = weights() | {"blocks.0.ls1.gamma": torch.zeros(3)}
    assert message_of(tensors) == (
        "checkpoint x: 0 keys missing, 1 key unexpected (blocks.0.ls1.gamma), 0 keys of another "
        "shape; all of a ViT-MSN is there and more that it would not compute, so the file is of "
        "another model; remove the keys if you know that they are not used"
    )
    deeper = weights(replace(TINY, depth=3))
    assert message_of(deeper).endswith("; the shape is from c.json: is it right?")


def test_a_long_list_of_keys_is_cut() -> None:
    message = message_of({})
    assert message.startswith("checkpoint x: 38 keys missing (cls_token, pos_embed, patch.weight, ")
    assert ", …), 0 keys unexpected, 0 keys of another shape; the" in message


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
    assert torch.equal(assemble(tensors, TINY, "x", "c").model.norm.bias, torch.full((8,), 3e38))


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
    found = config_of(of_variant(name), None, "file")
    assert found.config == VARIANTS[name]
    assert found.origin == f"the patch, width and depth of {name}"
    assert found.notes == ()


@pytest.mark.parametrize("variant", [None, "vit-msn-small"])
def test_another_image_size_is_read_off_the_position_embedding_and_told(variant) -> None:
    larger = {"pos_embed": torch.zeros(1, 1 + 24 * 24, 384)}
    found = config_of({**of_variant("vit-msn-small"), **larger}, variant, "file")
    assert found.config == replace(VARIANTS["vit-msn-small"], image_size=(384, 384))
    assert found.notes == ("image size 384x384, as the position embedding is for",)


@pytest.mark.parametrize("shape", [(1, 197 + 1, 384), (1, 1, 384), (1, 577, 385), (197, 384), ()])
def test_a_position_embedding_of_no_square_fits_nothing(shape) -> None:
    odd = {**of_variant("vit-msn-small"), "pos_embed": torch.zeros(shape)}
    with pytest.raises(CheckpointError, match="fits no published shape"):
        config_of(odd, None, "file")
    assert config_of(odd, "vit-msn-small", "file").config == VARIANTS["vit-msn-small"]


def test_its_classifier_is_counted() -> None:
    head = {"classifier.weight": torch.zeros(3, 384), "classifier.bias": torch.zeros(3)}
    config = config_of(of_variant("vit-msn-small", **head), None, "file").config
    assert config.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    other = config_of({**weights(), **head}, "vit-msn-base", "file")
    assert other.config.labels == config.labels
    assert other.origin == "--variant vit-msn-base"


def test_weights_of_another_model_are_not_asked_for_their_shape() -> None:
    with pytest.raises(CheckpointError) as raised:
        config_of({"conv1.weight": torch.zeros(1), "\x1b": torch.zeros(1)}, None, "file")
    assert str(raised.value) == (
        "file holds no weights of a ViT-MSN; its keys are such as conv1.weight, '\\x1b'"
    )


def test_weights_that_fit_no_published_shape_ask_for_one() -> None:
    with pytest.raises(CheckpointError) as raised:
        config_of(weights(), None, "file")
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


# --- what a classifier reads ----------------------------------------------------------------------


def linear(name: str, width: int = 8) -> Tensors:
    return {f"{name}.weight": torch.zeros(3, width), f"{name}.bias": torch.zeros(3)}


def norm(name: str, width: int = 8) -> Tensors:
    return {f"{name}.weight": torch.ones(width), f"{name}.bias": torch.zeros(width)}


@pytest.mark.parametrize(
    ("head", "pooling", "blocks"),
    [
        ({}, "cls", 1),
        (linear("classifier"), "cls", 1),
        (linear("head"), "cls", 1),
        (norm("fc_norm") | linear("head"), "patches", 1),
        (norm("classifier.norm") | linear("classifier.linear"), "blocks", 1),
        (norm("classifier.norm", 16) | linear("classifier.linear", 16), "blocks", 2),
    ],
)
def test_what_a_classifier_reads_is_told_by_its_keys(head, pooling, blocks) -> None:
    tensors = weights() | head
    config = with_classifier(tensors, replace(TINY, labels=("a", "b", "c") if head else ()), "x")
    assert (config.pooling, config.pooled_blocks) == (pooling, blocks)
    if pooling != "cls":
        del tensors["norm.weight"], tensors["norm.bias"]
    assert assemble(dict(tensors), config, "x", "c").model.config == config


@pytest.mark.parametrize(("width", "reads"), [(12, 12), (24, 24), (4, 4)])
def test_a_linear_evaluation_of_no_whole_blocks_is_refused(width, reads) -> None:
    tensors = weights() | linear("classifier.linear", width)
    with pytest.raises(CheckpointError) as raised:
        with_classifier(tensors, TINY, "file")
    assert str(raised.value) == (
        f"file: classifier.linear.weight reads {reads} numbers; expected a multiple of the hidden "
        "size 8, for up to 2 blocks"
    )


@pytest.mark.parametrize("pooling", ["patches", "blocks"])
def test_a_final_layer_norm_that_the_classifier_would_not_read_is_unexpected(pooling) -> None:
    head = {
        "patches": norm("fc_norm") | linear("head"),
        "blocks": norm("classifier.norm") | linear("classifier.linear"),
    }[pooling]
    config = replace(TINY, labels=("a", "b", "c"), pooling=pooling)
    assert "2 keys unexpected (norm.weight, norm.bias)" in message_of(weights() | head, config)


@pytest.mark.parametrize(
    ("head", "note"),
    [
        (
            linear("head"),
            "the classifier is 'head.weight' and reads [CLS] after the final LayerNorm",
        ),
        (
            norm("fc_norm") | linear("head"),
            "the classifier is 'head.weight' and reads the mean of the last block's patches",
        ),
        (
            norm("classifier.norm") | linear("classifier.linear"),
            "the classifier is msn's linear evaluation and reads [CLS] of the last blocks before "
            "the final LayerNorm (1); norm 1 before the linear layer is assumed, as in its "
            "configuration (normalize: true), for the file does not say; its evaluation prepares "
            "images as --preprocess msn-eval does",
        ),
    ],
)
def test_what_a_classifier_is_taken_for_is_a_note(head, note) -> None:
    tensors = weights() | head
    config = with_classifier(tensors, replace(TINY, labels=("a", "b", "c")), "x")
    if config.pooling != "cls":
        del tensors["norm.weight"], tensors["norm.bias"]
    assert assemble(tensors, config, "x", "c").notes == (note,)
