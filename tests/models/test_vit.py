"""The reference's own properties; that it agrees with transformers is test_vit_parity.py's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from msn_export.errors import CheckpointError
from msn_export.models.config import LinearClassifier, VitConfig
from msn_export.models.vit import VitMsn, interpolate

TINY = VitConfig((16, 24), (8, 4), 3, dim=8, depth=2, heads=2, mlp_dim=12, labels=("a", "b", "c"))


def model(config: VitConfig = TINY) -> VitMsn:
    torch.manual_seed(0)
    made = VitMsn(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made


def test_shapes_are_those_that_are_written_at_the_lines() -> None:
    tiny = model()
    images = torch.randn(5, 3, 16, 24)
    with torch.no_grad():
        patches = tiny.patch(images)
        tokens = tiny(images)
    assert patches.shape == (5, 8, *TINY.grid)
    assert tokens.shape == (5, TINY.tokens, TINY.dim)
    assert tiny.classifier is not None
    assert tiny.classifier(tokens[:, 0]).shape == (5, 3)


def test_attention_written_out_computes_what_the_fused_kernel_does() -> None:
    written = VitMsn(TINY, attention="eager").eval()
    written.load_state_dict(model().state_dict())
    images = torch.randn(3, 3, 16, 24)
    with torch.no_grad():
        # the same sums in another order; measured 1e-6
        torch.testing.assert_close(written(images), model()(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_written_out_takes_its_softmax_in_fp32_as_transformers_does(dtype) -> None:
    """What the benchmark calls eager: two casts and an fp32 softmax are part of its time."""
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if "softmax" in str(func):
                seen.append((args[0].dtype, made.dtype))
            return made

    written = VitMsn(TINY, attention="eager").to(dtype).eval()
    with torch.no_grad(), Watch():
        tokens = written(torch.randn(1, 3, 16, 24, dtype=dtype))
    assert seen == [(torch.float32, torch.float32)] * TINY.depth
    assert tokens.dtype is dtype


def test_the_order_of_patches_matters_only_through_their_positions() -> None:
    tiny = model()
    images = torch.randn(2, 3, 16, 24)
    order = torch.randperm(TINY.tokens - 1)
    with torch.no_grad():
        patches = tiny.patch(images)
        tiny.pos_embed[:, 1:] = 0
        wanted = tiny.encode(patches, tiny.positions()).tokens
        moved = patches.flatten(2)[:, :, order].reshape(patches.shape)
        got = tiny.encode(moved, tiny.positions()).tokens
    torch.testing.assert_close(got[:, 0], wanted[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, 1:], wanted[:, 1:][:, order], atol=1e-5, rtol=1e-5)


def test_the_cls_token_stands_in_front_and_has_a_position() -> None:
    tiny = model()
    images = torch.randn(2, 3, 16, 24)
    with torch.no_grad():
        patches = tiny.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat((tiny.cls_token.expand(2, -1, -1), patches), dim=1) + tiny.pos_embed
        for block in tiny.blocks:
            x = block(x)
        assert tiny.norm is not None
        assert torch.equal(tiny(images), tiny.norm(x))


def test_images_of_a_batch_do_not_see_each_other() -> None:
    tiny = model()
    images = torch.randn(4, 3, 16, 24)
    with torch.no_grad():
        together = tiny(images)
        alone = torch.cat([tiny(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_another_size_shares_every_weight_but_the_positions() -> None:
    tiny = model()
    other = tiny.for_image_size((32, 24))
    assert other.config.grid == (4, 6)
    assert not other.training
    mine, theirs = tiny.state_dict(), other.state_dict()
    for name in mine:
        shared = mine[name].data_ptr() == theirs[name].data_ptr()
        assert shared == (name != "pos_embed"), name
    assert theirs["pos_embed"].shape == (1, 25, 8)
    assert torch.equal(theirs["pos_embed"][:, 0], mine["pos_embed"][:, 0])


def test_another_size_keeps_the_form_of_attention_and_the_parameters_themselves() -> None:
    written = VitMsn(TINY, attention="eager").eval().requires_grad_(requires_grad=False)
    other = written.for_image_size((32, 24))
    assert other.attention == "eager"
    assert {block.attn.kind for block in other.blocks} == {"eager"}
    assert other.norm.weight is written.norm.weight
    assert not any(parameter.requires_grad for parameter in other.parameters())


@pytest.mark.parametrize("pooling", ["features", "cls"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_classifier_that_is_given_replaces_its_own(pooling, blocks) -> None:
    tiny = model()
    rows = np.random.default_rng(0).standard_normal((2, blocks * 8), np.float32)
    other = tiny.with_classifier(LinearClassifier(rows, ("x", "y"), pooling, blocks))
    images = torch.randn(5, 3, 16, 24)
    with torch.no_grad():
        states = tiny.hidden(images, blocks=blocks).blocks
        if pooling == "cls":
            read = torch.cat([tiny.norm(state[:, :1]).flatten(1) for state in states], dim=1)
        else:
            read = torch.cat([state[:, 0] for state in states], dim=1).double()
            read -= read.mean(dim=1, keepdim=True)
            read /= read.norm(dim=1, keepdim=True)
        logits = other.classify(other.hidden(images))
    wanted = read.double().numpy() @ rows.T
    np.testing.assert_allclose(logits.numpy(), wanted, rtol=1e-4, atol=1e-4)  # the eps of 1e-6
    assert other.config.labels == ("x", "y")
    assert not other.training
    mine, theirs = tiny.state_dict(), other.state_dict()
    shared = [name for name in mine if not name.startswith("classifier.")]
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in shared)
    assert other.blocks[0].norm1.weight.requires_grad


@pytest.mark.parametrize("pooling", ["patches", "blocks"])
def test_a_model_without_a_final_layer_norm_takes_no_other_classifier(pooling) -> None:
    tuned = model(replace(TINY, pooling=pooling))
    with pytest.raises(CheckpointError, match=r"has no final LayerNorm .*; give the pre-trained"):
        tuned.with_classifier(LinearClassifier(np.zeros((2, 8), np.float32), ("x", "y"), "cls"))


def test_a_classifier_of_another_width_is_refused() -> None:
    other = LinearClassifier(np.zeros((2, 9), np.float32), ("x", "y"), "features")
    with pytest.raises(CheckpointError, match="its features have 8 numbers and the classifier re"):
        model().with_classifier(other)


def test_its_own_size_changes_nothing() -> None:
    tiny = model()
    assert tiny.for_image_size((16, 24)).pos_embed is not None
    assert torch.equal(tiny.for_image_size((16, 24)).pos_embed, tiny.pos_embed)


def test_a_size_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(CheckpointError, match="image width 23 is not divisible by the patch's 4"):
        model().for_image_size((16, 23))


sides = st.integers(1, 6)


@settings(max_examples=40)
@given(sides, sides, sides, sides)
def test_a_constant_embedding_stays_constant_at_every_size(rows, columns, high, wide) -> None:
    # bicubic weights sum to 1: what is the same everywhere stays so
    flat = torch.cat([torch.full((1, 1, 4), 7.0), torch.full((1, rows * columns, 4), -3.0)], dim=1)
    resized = interpolate(flat, (rows, columns), (high, wide))
    assert resized.shape == (1, high * wide + 1, 4)
    assert torch.equal(resized[:, :1], flat[:, :1])
    torch.testing.assert_close(resized[:, 1:], torch.full((1, high * wide, 4), -3.0))


@settings(max_examples=20)
@given(sides, sides, sides, sides)
def test_rows_and_columns_are_not_mixed_up(rows, columns, high, wide) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(1, 1 + rows * columns, 2, generator=generator)
    turned = torch.cat(
        [table[:, :1], table[:, 1:].reshape(1, rows, columns, 2).transpose(1, 2).flatten(1, 2)],
        dim=1,
    )
    one = interpolate(table, (rows, columns), (high, wide))[:, 1:].reshape(high, wide, 2)
    other = interpolate(turned, (columns, rows), (wide, high))[:, 1:].reshape(wide, high, 2)
    torch.testing.assert_close(one, other.transpose(0, 1), atol=1e-5, rtol=1e-5)
