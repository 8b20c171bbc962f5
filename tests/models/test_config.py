"""The published shapes, and shapes that cannot be."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ViTMSNConfig, ViTMSNModel

from msn_export.errors import CheckpointError
from msn_export.models.config import VARIANTS, named_variant
from msn_export.models.vit import VitMsn

SMALL = VARIANTS["vit-msn-small"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_shape_has_the_parameters_transformers_gives_it(name) -> None:
    config = VARIANTS[name]
    theirs = ViTMSNConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        intermediate_size=config.mlp_dim,
        patch_size=config.patch_size[0],
    )
    with torch.device("meta"):
        ours, wanted = VitMsn(config), ViTMSNModel(theirs)
    assert parameters(ours) == parameters(wanted)


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


IMPOSSIBLE = [
    ({"dim": 0}, "hidden size 0 is out of range; expected 1 to 1048576"),
    ({"channels": -3}, "channels -3 is out of range"),
    ({"depth": 1025}, "layers 1025 is out of range; expected 1 to 1024"),
    ({"mlp_dim": 1 << 21}, "intermediate size 2097152 is out of range"),
    ({"heads": 7}, "hidden size 384 is not divisible by 7 attention heads"),
    ({"pooled_blocks": 13}, "a classifier reads 13 blocks; expected 1 to 12"),
    ({"eps": 0.0}, "LayerNorm eps 0.0 is out of range; expected 1e-6 or so"),
    ({"eps": float("nan")}, "LayerNorm eps nan is out of range"),
    (
        {"image_size": (224, 230)},
        "image width 230 is not divisible by the patch's 16; nearest sizes are 224 and 240",
    ),
    (
        {"image_size": (5, 16)},
        "image height 5 is not divisible by the patch's 16; nearest size is 16",
    ),
]


@pytest.mark.parametrize(("change", "message"), IMPOSSIBLE)
def test_numbers_that_contradict_each_other_are_named(change, message) -> None:
    with pytest.raises(CheckpointError) as raised:
        replace(SMALL, **change)
    assert message in str(raised.value)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 40), st.integers(1, 40))
def test_tokens_are_the_patches_and_cls(rows, columns, high, wide) -> None:
    config = replace(SMALL, image_size=(rows * high, columns * wide), patch_size=(high, wide))
    assert config.grid == (rows, columns)
    assert config.tokens == rows * columns + 1


@given(st.integers(1, 999))
def test_the_nearest_sizes_of_the_message_are_divisible(size) -> None:
    try:
        SMALL.for_image_size((size, 16))
    except CheckpointError as error:
        nearest = [int(word) for word in str(error).split("nearest")[1].split() if word.isdigit()]
        assert nearest
        for better in nearest:
            assert abs(better - size) < 16
            assert SMALL.for_image_size((better, 16)).grid == (better // 16, 1)
    else:
        assert size % 16 == 0


def test_a_config_is_plain_json() -> None:
    labelled = replace(SMALL, labels=("cat", "dog"))
    assert labelled.to_json() == {
        "image_size": [224, 224],
        "patch_size": [16, 16],
        "channels": 3,
        "dim": 384,
        "depth": 12,
        "heads": 6,
        "mlp_dim": 1536,
        "activation": "gelu",
        "eps": 1e-6,
        "qkv_bias": True,
        "labels": ["cat", "dog"],
        "pooling": "cls",
        "pooled_blocks": 1,
        "problem_type": None,
    }


def test_a_mistyped_variant_is_met_with_the_nearest_name() -> None:
    with pytest.raises(CheckpointError, match=r"vit-msn-large-7; did you mean vit-msn-base\?$"):
        named_variant("vit-msn-bse")


def test_an_unknown_variant_lists_what_is_known() -> None:
    with pytest.raises(CheckpointError, match=r"variant 'vits16' is unknown; expected one of vit-"):
        named_variant("vits16")
    with pytest.raises(CheckpointError, match=r"vit-msn-large-7$"):  # nothing is near it
        named_variant("resnet50")
