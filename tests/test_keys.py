"""Whatever a file calls a weight, it has one name here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.errors import CheckpointError
from msn_export.models.keys import canonical, rename

# our name: transformers < 5, transformers 5, facebookresearch/msn; None where it has no such key
WEIGHTS = {
    "cls_token": ("embeddings.cls_token", "embeddings.cls_token", "cls_token"),
    "pos_embed": (
        "embeddings.position_embeddings",
        "embeddings.position_embeddings",
        "pos_embed",
    ),
    "patch.weight": (
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embeddings.projection.weight",
        "patch_embed.proj.weight",
    ),
    "norm.bias": ("layernorm.bias", "layernorm.bias", "norm.bias"),
    "blocks.3.norm1.weight": (
        "encoder.layer.3.layernorm_before.weight",
        "layers.3.layernorm_before.weight",
        "blocks.3.norm1.weight",
    ),
    "blocks.3.attn.q.weight": (
        "encoder.layer.3.attention.attention.query.weight",
        "layers.3.attention.q_proj.weight",
        None,
    ),
    "blocks.3.attn.k.bias": (
        "encoder.layer.3.attention.attention.key.bias",
        "layers.3.attention.k_proj.bias",
        None,
    ),
    "blocks.3.attn.v.weight": (
        "encoder.layer.3.attention.attention.value.weight",
        "layers.3.attention.v_proj.weight",
        None,
    ),
    "blocks.3.attn.qkv.bias": (None, None, "blocks.3.attn.qkv.bias"),
    "blocks.11.attn.proj.weight": (
        "encoder.layer.11.attention.output.dense.weight",
        "layers.11.attention.o_proj.weight",
        "blocks.11.attn.proj.weight",
    ),
    "blocks.11.norm2.bias": (
        "encoder.layer.11.layernorm_after.bias",
        "layers.11.layernorm_after.bias",
        "blocks.11.norm2.bias",
    ),
    "blocks.11.mlp.fc1.weight": (
        "encoder.layer.11.intermediate.dense.weight",
        "layers.11.mlp.fc1.weight",
        "blocks.11.mlp.fc1.weight",
    ),
    "blocks.11.mlp.fc2.bias": (
        "encoder.layer.11.output.dense.bias",
        "layers.11.mlp.fc2.bias",
        "blocks.11.mlp.fc2.bias",
    ),
}
PAIRS = [(key, name) for name, keys in WEIGHTS.items() for key in keys if key is not None]
PREFIXES = ("", "vit.", "module.", "module.vit.")

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
        "encoder.layer.0.attention.attention.query.weight_scale",  # of a quantised checkpoint
        "pooler.dense.weight",
        "vit.module.cls_token",
        "cls_token.weight",
        "classifier",
    ],
)
def test_what_no_vit_msn_has_is_unknown(key) -> None:
    assert canonical(key) is None
    assert rename([key], "file").unknown == (key,)


@pytest.mark.parametrize(
    "key",
    [
        "module.fc.fc1.weight",
        "fc.bn1.num_batches_tracked",
        "module.pred.fc1.bias",
        "embeddings.mask_token",
        "vit.embeddings.mask_token",
    ],
)
def test_what_only_pre_training_reads_is_left_unread(key) -> None:
    assert rename([key], "file").unread == (key,)


def test_one_weight_twice_is_refused_by_name() -> None:
    twice = ["vit.embeddings.cls_token", "module.cls_token"]
    with pytest.raises(CheckpointError) as raised:
        rename(twice, "checkpoint x")
    assert str(raised.value) == (
        "checkpoint x: keys 'vit.embeddings.cls_token' and 'module.cls_token' are the same weight"
    )


@given(st.lists(keys, unique=True, max_size=20))
def test_each_key_is_sorted_once_whatever_it_is(found) -> None:
    try:
        sorted_keys = rename(found, "file")
    except CheckpointError as error:
        assert "are the same weight" in str(error)
        return
    everywhere = [*sorted_keys.known.values(), *sorted_keys.unread, *sorted_keys.unknown]
    assert sorted(everywhere) == sorted(found)


@given(keys)
def test_our_names_are_their_own(key) -> None:
    name = canonical(key)
    if name is not None and not any(f".attn.{part}." in name for part in "qkv"):
        assert canonical(name) == name
