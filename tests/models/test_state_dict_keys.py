"""A weight has one name here, by any writer's name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.errors import CheckpointError
from msn_export.models.state_dict import canonical, rename

# our name: transformers < 5, transformers 5, facebookresearch/msn, torchvision
WEIGHTS = {
    "cls_token": (
        "embeddings.cls_token",
        "embeddings.cls_token",
        "cls_token",
        "class_token",
    ),
    "pos_embed": (
        "embeddings.position_embeddings",
        "embeddings.position_embeddings",
        "pos_embed",
        "encoder.pos_embedding",
    ),
    "patch.weight": (
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.weight",
        "conv_proj.weight",
    ),
    "norm.bias": (
        "layernorm.bias",
        "layernorm.bias",
        "norm.bias",
        "encoder.ln.bias",
    ),
    "blocks.3.norm1.weight": (
        "encoder.layer.3.layernorm_before.weight",
        "layers.3.layernorm_before.weight",
        "blocks.3.norm1.weight",
        "encoder.layers.encoder_layer_3.ln_1.weight",
    ),
    "blocks.3.attn.q.weight": (
        "encoder.layer.3.attention.attention.query.weight",
        "layers.3.attention.q_proj.weight",
        None,
        None,
    ),
    "blocks.3.attn.k.bias": (
        "encoder.layer.3.attention.attention.key.bias",
        "layers.3.attention.k_proj.bias",
        None,
        None,
    ),
    "blocks.3.attn.v.weight": (
        "encoder.layer.3.attention.attention.value.weight",
        "layers.3.attention.v_proj.weight",
        None,
        None,
    ),
    "blocks.3.attn.qkv.bias": (
        None,
        None,
        "blocks.3.attn.qkv.bias",
        "encoder.layers.encoder_layer_3.self_attention.in_proj_bias",
    ),
    "blocks.11.attn.proj.weight": (
        "encoder.layer.11.attention.output.dense.weight",
        "layers.11.attention.o_proj.weight",
        "blocks.11.attn.proj.weight",
        "encoder.layers.encoder_layer_11.self_attention.out_proj.weight",
    ),
    "blocks.11.norm2.bias": (
        "encoder.layer.11.layernorm_after.bias",
        "layers.11.layernorm_after.bias",
        "blocks.11.norm2.bias",
        "encoder.layers.encoder_layer_11.ln_2.bias",
    ),
    "blocks.11.mlp.fc1.weight": (
        "encoder.layer.11.intermediate.dense.weight",
        "layers.11.mlp.fc1.weight",
        "blocks.11.mlp.fc1.weight",
        "encoder.layers.encoder_layer_11.mlp.0.weight",
    ),
    "blocks.11.mlp.fc2.bias": (
        "encoder.layer.11.output.dense.bias",
        "layers.11.mlp.fc2.bias",
        "blocks.11.mlp.fc2.bias",
        "encoder.layers.encoder_layer_11.mlp.3.bias",
    ),
    "classifier.weight": (
        "classifier.weight",
        "classifier.weight",
        "head.weight",
        "heads.head.weight",
    ),
    "fc_norm.bias": (
        None,
        None,
        "fc_norm.bias",
        None,
    ),
    "classifier.norm.weight": (
        None,
        None,
        "classifier.norm.weight",
        None,
    ),
    "classifier.linear.bias": (
        None,
        None,
        "classifier.linear.bias",
        None,
    ),
}
PAIRS = [(key, name) for name, keys in WEIGHTS.items() for key in keys if key is not None]
PREFIXES = ("", "vit.")

prefixes = st.sampled_from(PREFIXES)
keys = st.one_of(
    st.text(max_size=40),
    st.builds("".join, st.tuples(prefixes, st.sampled_from([key for key, _ in PAIRS]))),
    st.from_regex(r"\A(vit\.)?(layers|blocks|encoder\.layer)\.\d+\.[a-z._0-9]{1,30}\Z"),
)


@pytest.mark.parametrize(("key", "name"), PAIRS)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_every_style_has_our_name(prefix, key, name) -> None:
    assert canonical(prefix + key) == name


@pytest.mark.parametrize(
    "key",
    [
        "",
        "encoder.layer.0.attention.attention.query",  # a module, no weight
        "encoder.layer.x.layernorm_before.weight",
        "encoder.layer.12345.layernorm_before.weight",
        "encoder.layer.0.layernorm_before.running_mean",
        "vit.module.cls_token",  # wrappers are taken off before
        "module.cls_token",
        "cls_token.weight",
        "classifier",
    ],
)
def test_what_no_vit_msn_has_is_unknown(key) -> None:
    assert canonical(key) is None
    assert rename([key], "file").unknown == (key,)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("fc.fc1.weight", "of pre-training"),
        ("fc.bn1.num_batches_tracked", "of pre-training"),
        ("pred.fc1.bias", "of pre-training"),
        ("embeddings.mask_token", "of pre-training"),
        ("vit.embeddings.mask_token", "of pre-training"),
        ("mask_token", "of pre-training"),
        ("pooler.dense.weight", "that transformers ignores with a warning"),
        ("vit.pooler.dense.bias", "that transformers ignores with a warning"),
        ("embeddings.position_ids", "that transformers ignores with a warning"),
        ("position_ids", "that transformers ignores with a warning"),
    ],
)
def test_what_inference_does_not_read_is_left_unread_by_reason(key, why) -> None:
    assert rename([key], "file").unread == {why: (key,)}


@pytest.mark.parametrize("head", ["vit.head.weight", "vit.heads.head.bias"])
def test_the_head_within_lightlys_masked_vit_is_not_applied(head) -> None:
    assert rename([head], "file").names != {}
    found = rename([head, "mask_token"], "file")
    assert found.names == {}
    assert found.unread["of a head that lightly's masked ViT does not apply"] == (head,)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.vit.layers.0.attention.q_proj.lora_A.default.weight",
        "layers.0.attention.q_proj.base_layer.weight",
        "classifier.modules_to_save.default.weight",
        "layers.0.mlp.fc1.ia3_l.default.weight",
    ],
)
def test_an_adapter_that_is_not_merged_says_so(key) -> None:
    with pytest.raises(CheckpointError) as raised:
        rename(["cls_token", key], "checkpoint x")
    assert str(raised.value) == (
        "checkpoint x holds a PEFT adapter that is not merged; call merge_and_unload() on the PEFT "
        f"model, then save_pretrained() on what it returns (key {key})"
    )


@pytest.mark.parametrize(
    "leaf",
    [
        *("SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.nested_absmax"),
        *("weight.quant_state.bitsandbytes__nf4", "qweight", "qzeros", "scales", "weight_scale"),
        *("weight_scale_inv", "weight_packed", "weight._data", "_packed_params.dtype"),
    ],
)
def test_a_quantised_file_says_so(leaf) -> None:
    with pytest.raises(CheckpointError) as raised:
        rename([f"encoder.layer.0.intermediate.dense.{leaf}"], "checkpoint x")
    assert str(raised.value).startswith(
        "checkpoint x is quantised; give the checkpoint it was made from, and quantise the "
        "exported graph with msn-export calibrate (key encoder.layer.0.intermediate.dense."
    )


def test_one_weight_twice_is_refused_by_name() -> None:
    twice = ["vit.embeddings.cls_token", "cls_token"]
    with pytest.raises(CheckpointError) as raised:
        rename(twice, "checkpoint x")
    assert str(raised.value) == (
        "checkpoint x: keys 'vit.embeddings.cls_token' and 'cls_token' are the same weight"
    )


@given(st.lists(keys, unique=True, max_size=20))
def test_each_key_is_sorted_once_whatever_it_is(found) -> None:
    try:
        sorted_keys = rename(found, "file")
    except CheckpointError as error:
        assert "are the same weight" in str(error)
        return
    unread = [key for found in sorted_keys.unread.values() for key in found]
    everywhere = [*sorted_keys.names.values(), *unread, *sorted_keys.unknown]
    assert sorted(everywhere) == sorted(found)


@given(keys)
def test_our_names_are_their_own(key) -> None:
    name = canonical(key)
    if name is not None and not any(f".attn.{part}." in name for part in "qkv"):
        assert canonical(name) == name
