"""Each family of models exports, and its graph computes what transformers' model computes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from msn_export.models.checkpoint import in_memory, load_checkpoint
from msn_export.models.config import FAMILIES, family_of, parse_config
from tests.builders.checkpoints import TINY, randomised
from tests.builders.exports import export

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NOTE = "a plain ViT: same architecture, checked, not the product's subject"


def saved(kind: type, folder: Path, **settings: Any) -> torch.nn.Module:
    """Save a random plain ViT with ``save_pretrained``."""
    model = randomised(kind(ViTConfig(**TINY, **settings)))
    model.save_pretrained(folder)
    return model


def exported(folder: Path, *options: str) -> tuple[Any, np.ndarray]:
    """Export with ``msn-export onnx``; give the manifest and the graph's output for IMAGES."""
    result = export(folder, folder / "m.onnx", *options)
    assert result.exit_code == 0, result.output
    session = onnxruntime.InferenceSession(folder / "m.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"pixel_values": IMAGES.numpy()})
    return json.loads((folder / "m.onnx.json").read_text()), output


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"qkv_bias": False, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-3},
    ],
    ids=["defaults", "other settings"],
)
def test_a_plain_vit_model_exports_without_its_pooler(tmp_path, settings) -> None:
    theirs = saved(ViTModel, tmp_path, **settings)
    manifest, output = exported(tmp_path, "--head", "tokens")
    with torch.no_grad():
        wanted = theirs(IMAGES).last_hidden_state.numpy()
    # fp32 on both sides, sums in another order; measured 3e-6
    np.testing.assert_allclose(output, wanted, atol=1e-5, rtol=1e-5)
    assert manifest["checkpoint"]["notes"] == [
        NOTE,
        "not read: 2 keys of ViTModel's pooler, which no head reads (pooler.dense.bias, "
        "pooler.dense.weight)",
    ]


def test_a_plain_vit_classifier_exports(tmp_path) -> None:
    theirs = saved(ViTForImageClassification, tmp_path, num_labels=5)
    manifest, output = exported(tmp_path)
    with torch.no_grad():
        wanted = theirs(IMAGES).logits.numpy()
    np.testing.assert_allclose(output, wanted, atol=1e-5, rtol=1e-5)
    assert manifest["checkpoint"]["notes"] == [NOTE]
    assert manifest["labels"] == [f"LABEL_{i}" for i in range(5)]


def test_a_plain_vit_in_memory_is_the_one_that_was_saved(tmp_path) -> None:
    theirs = saved(ViTModel, tmp_path)
    with in_memory(theirs) as source:
        checkpoint = load_checkpoint(source)
    on_disk = load_checkpoint(str(tmp_path))
    assert checkpoint.sha256 == on_disk.sha256
    assert checkpoint.config == on_disk.config
    assert checkpoint.notes[0] == on_disk.notes[0] == NOTE
    assert "2 keys of ViTModel's pooler" in checkpoint.notes[1]


def test_what_a_file_does_not_say_is_its_familys_default() -> None:
    written = json.loads(ViTConfig().to_json_string())
    assert parse_config({"model_type": "vit"}, "c") == parse_config(written, "c")
    assert parse_config(written, "c").eps == 1e-12


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_family_is_told_by_its_model_type(family) -> None:
    assert family_of({"model_type": family.model_type}, "c") is family
