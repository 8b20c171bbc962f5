"""The reference reads each head off the tokens as the sources do."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from msn_export.errors import GraphError
from msn_export.graph.blocks import ENTRY
from msn_export.graph.torch_reference import (
    TorchRunner,
    TorchStream,
    read_head,
    readable_heads,
    require_readable,
    shaken,
)
from msn_export.models.config import VitConfig
from msn_export.models.vit import Hidden, VitMsn
from msn_export.spec import Head

ENCODER = VitConfig((16, 16), (8, 8), 3, dim=8, depth=1, heads=2, mlp_dim=12)
CLASSIFIER = VitConfig((16, 16), (8, 8), 3, 8, 1, 2, 12, labels=("a", "b", "c"))


@pytest.fixture
def model() -> VitMsn:
    torch.manual_seed(0)
    return VitMsn(CLASSIFIER).eval()


def test_each_head_reads_what_it_is_called(model) -> None:
    tokens = torch.randn(2, 5, 8)
    with torch.no_grad():
        states = Hidden(tokens, (tokens,), torch.rand(2, 2, 1, 5))
        read = {head: read_head(model, head, states) for head in Head}
    assert torch.equal(read[Head.TOKENS], tokens)
    assert torch.equal(read[Head.CLS], tokens[:, 0])
    # the mean is of the patches alone: src/deit.py, x[:, 1:, :]
    torch.testing.assert_close(read[Head.MEAN], (tokens.sum(1) - tokens[:, 0]) / 4)
    assert read[Head.LOGITS].shape == (2, 3)
    assert read[Head.FEATURES].shape == (2, 8)
    assert torch.equal(read[Head.ATTENTION].flatten(2), states.attention[:, :, 0, 1:])


def test_the_runner_gives_each_output_under_its_name(model) -> None:
    runner = TorchRunner(model, [Head.LOGITS, Head.TOKENS])
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    outputs = runner(images)
    assert {name: output.shape for name, output in outputs.items()} == {
        "logits": (2, 3),
        "last_hidden_state": (2, 5, 8),
    }
    assert runner.name == f"torch {torch.__version__}, cpu, fp32"
    with torch.no_grad():
        np.testing.assert_array_equal(
            outputs["last_hidden_state"], model(torch.from_numpy(images)).numpy()
        )


def test_a_stream_shows_stages_takes_given_ones_and_leaves_no_hook(model) -> None:
    images = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    stream = TorchStream(model, [Head.TOKENS], [ENTRY, "block 0"])
    shown = stream(images)
    assert {name: value.shape for name, value in shown.items()} == dict.fromkeys(
        (ENTRY, "block 0", "last_hidden_state"), (2, 5, 8)
    )
    entry = model.blocks[0](torch.from_numpy(shown[ENTRY]))
    np.testing.assert_array_equal(shown["block 0"], entry.detach().numpy())
    other = stream(images, {ENTRY: 2 * shown[ENTRY]})
    assert not np.allclose(other["block 0"], shown["block 0"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_logits_need_a_classifier() -> None:
    encoder = VitMsn(ENCODER)
    message = "head logits needs a classifier, this checkpoint has none; use cls"
    for ask in (require_readable, TorchRunner):
        with pytest.raises(GraphError, match=message):
            ask(encoder, [Head.CLS, Head.LOGITS])
    require_readable(encoder, [Head.CLS, Head.MEAN, Head.TOKENS])


@pytest.mark.parametrize(
    ("pooling", "reads"),
    [
        ("patches", "the mean of the last block's patches"),
        ("blocks", "[CLS] of the last blocks before the final LayerNorm"),
    ],
)
def test_without_a_final_layer_norm_there_are_no_heads_behind_it(pooling, reads) -> None:
    model = VitMsn(replace(CLASSIFIER, pooling=pooling))
    assert readable_heads(model) == (Head.LOGITS, Head.FEATURES, Head.ATTENTION)
    require_readable(model, [Head.LOGITS])
    with pytest.raises(GraphError) as raised:
        require_readable(model, [Head.LOGITS, Head.MEAN])
    assert str(raised.value) == (
        f"head mean needs the final LayerNorm, which this checkpoint lacks (its classifier reads "
        f"{reads}); use logits, or the pre-trained checkpoint"
    )


def test_a_shaken_model_differs_by_its_weights_last_bits(model) -> None:
    moved = shaken(model, 0)
    for own, other in zip(model.parameters(), moved.parameters(), strict=True):
        assert torch.all((own - other).abs() <= own.abs() * 2.0**-23)
    weight, other = model.blocks[0].mlp.fc1.weight, moved.blocks[0].mlp.fc1.weight
    assert 0 < (weight != other).float().mean() < 1
    assert torch.equal(other, shaken(model, 0).blocks[0].mlp.fc1.weight)
    assert not torch.equal(other, shaken(model, 1).blocks[0].mlp.fc1.weight)
