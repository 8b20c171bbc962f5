"""Tiny ViT-MSN checkpoints, written by transformers or as the original repository writes them."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import ViTMSNConfig, ViTMSNForImageClassification, ViTMSNModel

from msn_export.models.checkpoint import load_checkpoint

# 17 tokens; heads of 32, the smallest batch of 2 heads TensorRT has a fused kernel for
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}


def randomised(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draw every parameter: transformers starts positions, biases and gains at 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            torch.nn.init.normal_(parameter, std=0.15, generator=generator)
            if "layernorm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


def hugging_face(
    folder: Path, *, labels: int = 0, seed: int = 0, shard_size: str = "5GB", **config: Any
) -> torch.nn.Module:
    """Save a model with ``save_pretrained`` and give it back."""
    settings: dict[str, Any] = {**TINY, **config}
    if labels:
        settings["id2label"] = {i: f"class {i}" for i in range(labels)}
        settings["label2id"] = {f"class {i}": i for i in range(labels)}
    kind = ViTMSNForImageClassification if labels else ViTMSNModel
    model = randomised(kind(ViTMSNConfig(**settings)), seed)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def small(folder: Path, *, labels: int = 8) -> Path:
    """Save the first half of vit-msn-small as msn initialises it, with a classifier.

    For images of 64 pixels: a run takes a tenth of a second.
    """
    model = load_checkpoint("random:vit-msn-small:0").model.for_image_size((64, 64))
    second_half = tuple(f"blocks.{i}." for i in range(6, 12))
    state = {
        name: tensor.clone().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.startswith(second_half)
    }
    generator = torch.Generator().manual_seed(1)
    state["classifier.weight"] = torch.randn(labels, 384, generator=generator) * 0.1
    state["classifier.bias"] = torch.randn(labels, generator=generator) * 0.02
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors")
    config = {
        "model_type": "vit_msn", "hidden_size": 384, "num_hidden_layers": 6,
        "num_attention_heads": 6, "intermediate_size": 1536, "image_size": 64, "patch_size": 16,
        "id2label": {str(i): f"class {i}" for i in range(labels)},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    size = {"height": 64, "width": 64}
    processor(folder, size=size, resample=2, image_mean=[0.485, 0.456, 0.406],
              image_std=[0.229, 0.224, 0.225])  # fmt: skip
    return folder


def massive(source: Path, folder: Path) -> Path:
    """Copy a checkpoint with one channel of one token near 1e5, as trained ViTs have them near 1e3.

    One token, as there (arXiv:2309.16588): the others, and [CLS], stay what the picture makes them.
    """
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    state["pos_embed"][0, 3, 5] += 1e5
    save_file(state, folder / "model.safetensors")
    return folder


def processor(folder: Path, **settings: Any) -> None:
    """Write a preprocessor_config.json."""
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def original_state(model: torch.nn.Module, depth: int) -> dict[str, torch.Tensor]:
    """Rename transformers' weights as facebookresearch/msn src/deit.py names them."""
    weights = model.state_dict()
    state = {
        "cls_token": weights["embeddings.cls_token"],
        "pos_embed": weights["embeddings.position_embeddings"],
    }
    modules = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    for i in range(depth):
        for theirs, hf in (
            ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
            ("attn.proj", "attention.o_proj"), ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
        ):  # fmt: skip
            modules[f"blocks.{i}.{theirs}"] = f"layers.{i}.{hf}"
        for leaf in ("weight", "bias"):
            parts = [weights[f"layers.{i}.attention.{p}_proj.{leaf}"] for p in "qkv"]
            state[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(parts)
    for theirs, hf in modules.items():
        for leaf in ("weight", "bias"):
            state[f"{theirs}.{leaf}"] = weights[f"{hf}.{leaf}"]
    return state


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (f"open({str(self.path)!r}, 'w').close()",)
