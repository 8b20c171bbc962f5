"""The reference reads each head off the tokens as the sources do."""

import copy
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from threading import Event

import numpy as np
import pytest
import torch

from msn_export.errors import GraphError
from msn_export.graph.blocks import ENTRY
from msn_export.graph.torch_reference import (
    InThread,
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


def test_fp64_holds_one_layer_of_weights_at_a_time(model) -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    wanted = copy.deepcopy(model).double().hidden(torch.from_numpy(images).double()).tokens
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    exact = TorchRunner(model, [Head.TOKENS], exact=True)
    wide: list[int] = []

    def count(*_: object) -> None:
        held = [w for w in exact.model.parameters() if w.dtype is torch.float64]
        wide.append(len(held))

    for block in exact.model.blocks:
        block.mlp.fc2.register_forward_hook(count)
    found = exact(images)[Head.TOKENS.output]
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-14, atol=1e-14)
    assert wide == [2] * len(model.blocks), "[CLS] and positions, the layer's own are narrow again"
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name])
        assert weight.dtype is torch.float32
    shared = {weight.data_ptr() for weight in model.parameters()}
    assert sum(weight.data_ptr() not in shared for weight in exact.model.parameters()) == 2


def test_a_run_in_a_thread_gives_its_result_and_leaves_no_trace(model) -> None:
    images, threads = np.zeros((1, 3, 16, 16), np.float32), torch.get_num_threads()
    runner = TorchRunner(model, [Head.TOKENS])
    with InThread(model, partial(runner, images)) as run:
        found = run.result()[Head.TOKENS.output]
    np.testing.assert_array_equal(found, runner(images)[Head.TOKENS.output])
    assert torch.get_num_threads() == threads
    assert not any(block._forward_pre_hooks for block in model.blocks)


def test_a_failure_in_the_thread_is_raised_where_it_is_waited_for(model) -> None:
    def fails() -> None:
        raise GraphError("not finite")

    with InThread(model, fails) as run, pytest.raises(GraphError, match="not finite"):
        run.result()


def test_leaving_ends_a_run_at_its_next_block() -> None:
    images, blocks = torch.zeros(1, 3, 16, 16), []
    started, left = Event(), Event()

    def block_ran(*_: object) -> None:
        blocks.append(1)
        started.set()
        assert left.wait(10)

    deep = VitMsn(replace(ENCODER, depth=3)).eval()
    for block in deep.blocks:
        block.register_forward_hook(block_ran)
    with pytest.raises(KeyboardInterrupt), InThread(deep, partial(deep, images)) as run:  # noqa: PT012
        assert started.wait(10)
        run._is_over.set()  # as leaving does before it waits
        left.set()
        raise KeyboardInterrupt
    assert blocks == [1]
    with pytest.raises(CancelledError):
        run.result()
