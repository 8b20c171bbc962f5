"""The reference computes what transformers computes, in torch and through ONNX."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import ViTMSNConfig, ViTMSNModel

from msn_export.graph import io
from msn_export.graph.fuse import fuse_attention
from msn_export.graph.torch_reference import trace
from msn_export.models.checkpoint import load_checkpoint
from msn_export.models.vit import ACTIVATIONS, VitMsn
from msn_export.preprocessing import preset
from msn_export.spec import AttentionForm, BatchRange, Head, ImageSize, InputFormat
from tests.builders.checkpoints import hugging_face, original_state, randomised

CONFIGURATIONS = 36
THROUGH_ONNX = 8  # in every run; the others are marked slow


def configuration(seed: int) -> dict[str, Any]:
    """Draw a shape; every activation occurs, one after another."""
    draw = random.Random(seed)  # noqa: S311  reproducible, not secret
    heads, size = draw.choice([1, 2, 3]), draw.choice([16, 32])
    patch = [draw.choice([4, 8]), draw.choice([4, 8])]
    grid = [draw.choice([2, 3, 4]), draw.choice([2, 3, 4])]
    known = sorted(ACTIVATIONS)
    return {
        "hidden_size": heads * size,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "intermediate_size": draw.choice([24, 64]),
        "hidden_act": known[seed % len(known)],
        "qkv_bias": draw.random() < 0.7,
        "num_channels": draw.choice([1, 3, 4]),
        "patch_size": patch,
        "image_size": [grid[0] * patch[0], grid[1] * patch[1]],
        "labels": draw.choice([0, 0, 3]),
    }


def pictures(config: dict[str, Any], count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, config["num_channels"], *config["image_size"], generator=generator)


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    config = configuration(request.param)
    theirs = hugging_face(tmp_path, seed=request.param, **config)
    return config, theirs, load_checkpoint(str(tmp_path))


def wanted(theirs: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output = theirs(images)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


@pytest.mark.parametrize("pair", range(CONFIGURATIONS), indirect=True)
def test_torch_reference_agrees_to_1e_5(pair) -> None:
    config, theirs, ours = pair
    images = pictures(config)
    with torch.no_grad():
        tokens = ours.model(images)
        got = ours.model.classifier(tokens[:, 0]) if config["labels"] else tokens
    assert (got - wanted(theirs, images)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(seed, marks=[] if seed < THROUGH_ONNX else pytest.mark.slow)
        for seed in range(CONFIGURATIONS)
    ],
    indirect=True,
)
def test_onnx_agrees_to_1e_4(pair, tmp_path) -> None:
    config, theirs, ours = pair
    images = pictures(config, 3)
    graph = trace(
        ours.model,
        heads=[Head.LOGITS if config["labels"] else Head.TOKENS],
        input_format=InputFormat.FLOAT,
        batch=BatchRange(),
        preprocessing=preset("hf", ImageSize(*config["image_size"]), config["num_channels"]),
    )
    fuse_attention(graph, AttentionForm.HEADS, expected=config["num_hidden_layers"])
    io.save(graph, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    got = session.run(None, {"pixel_values": images.numpy()})[0]
    assert np.abs(got - wanted(theirs, images).numpy()).max() <= 1e-4


def test_eager_attention_agrees_with_the_fused_one(tmp_path) -> None:
    hugging_face(tmp_path)
    fused = load_checkpoint(str(tmp_path)).model
    eager = VitMsn(fused.config, attention="eager").eval()
    eager.load_state_dict(fused.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (fused(images) - eager(images)).abs().max() <= 1e-5


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (16, 40), (64, 24)])
def test_position_embedding_is_interpolated_as_transformers_does(size, tmp_path) -> None:
    theirs = hugging_face(tmp_path)
    ours = load_checkpoint(str(tmp_path)).model.for_image_size(size)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(images, interpolate_pos_encoding=True).last_hidden_state
        assert (ours(images) - expected).abs().max() <= 1e-5


def test_a_checkpoint_of_the_original_repository_agrees(tmp_path) -> None:
    # vit-msn-small's own width and patches, so that the shape is found without being told
    config = ViTMSNConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    theirs = randomised(ViTMSNModel(config))
    head = {f"fc.fc{i}.weight": torch.zeros(4, 4) for i in (1, 2, 3)}
    head["fc.bn1.num_batches_tracked"] = torch.tensor(7)
    encoder = {f"module.{key}": t for key, t in (original_state(theirs, 12) | head).items()}
    # facebookresearch/msn src/msn_train.py, save_checkpoint
    saved = {
        "target_encoder": encoder,
        "encoder": {"module.cls_token": torch.zeros(1)},
        "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
        "prototypes": torch.zeros(2, 2),
        "epoch": 800,
        "loss": 1.5,
        "batch_size": 64,
    }
    torch.save(saved, tmp_path / "vits16_800ep.pth.tar")
    ours = load_checkpoint(str(tmp_path / "vits16_800ep.pth.tar"))
    assert ours.config.heads == 6
    assert any("4 keys of pre-training (fc.fc1.weight" in note for note in ours.notes)
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(images).last_hidden_state
        assert (ours.model(images) - expected).abs().max() <= 1e-4
