"""ONNX files of Hugging Face's model as other tools write them compile like our own."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from checkpoints import hugging_face
from click.testing import CliRunner
from torch import Tensor, nn

from msn_export.cli import main
from msn_export.graph import io
from msn_export.graph.fuse import fuse_attention
from msn_export.source import read_source
from msn_export.spec import AttentionForm, ImageSize

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Probabilities(nn.Module):
    """A classifier as people deploy it: its logits through a softmax."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).logits.softmax(dim=-1)


class Tokens(Probabilities):
    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens: Tensor = self.model(pixel_values).last_hidden_state
        return tokens


BATCH = torch.export.Dim("batch")
# The inputs of a ViTOnnxConfig: Hugging Face's optimum, and transformers before it
OPTIMUM = {"pixel_values": {0: "batch_size", 1: "num_channels", 2: "height", 3: "width"}}
EXPORTS: dict[str, dict[str, Any]] = {
    "torch, opset 18": {"opset_version": 18, "dynamic_shapes": ({0: BATCH},)},
    "torch, opset 23": {"opset_version": 23, "dynamic_shapes": ({0: BATCH},)},
    "TorchScript, eager attention": {
        "opset_version": 14,
        "dynamo": False,
        "dynamic_axes": {"pixel_values": {0: "batch"}},
        "attention": "eager",
    },
    "optimum": {"opset_version": 17, "dynamo": False, "dynamic_axes": OPTIMUM},
    "probabilities": {"opset_version": 18, "dynamic_shapes": ({0: BATCH},), "labels": 3},
}


def export(
    folder: Path, *, labels: int = 0, attention: str = "sdpa", **options: Any
) -> tuple[Path, nn.Module]:
    model = hugging_face(folder / "hf", labels=labels)
    model.config._attn_implementation = attention
    wrapped = (Probabilities if labels else Tokens)(model).eval()
    path = folder / "theirs.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():  # of torch, about its own exporters
        warnings.simplefilter("ignore")
        torch.onnx.export(
            wrapped, (IMAGES,), path, input_names=["pixel_values"], verbose=False, **options
        )
    return path, wrapped


@pytest.fixture(scope="module", params=EXPORTS.values(), ids=EXPORTS.keys())
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return export(tmp_path_factory.mktemp("theirs"), **request.param)


def test_the_graph_is_understood_and_still_the_model(theirs, tmp_path) -> None:
    path, model = theirs
    source = read_source(path)
    assert source.size == ImageSize(32, 32)
    assert source.notes[0].startswith("theirs.onnx has no manifest; ")
    assert fuse_attention(source.model, AttentionForm.HEADS) == 2
    io.save(source.model, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for images in (IMAGES, IMAGES[:1]):
        (got,) = session.run(None, {"pixel_values": images.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, model(images).numpy(), atol=1e-4)


def test_it_compiles_fused_and_in_half(theirs, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    path, _ = theirs
    arguments = ["trt", str(path), "-o", str(tmp_path / "m.engine"), "--fp16", "--json"]
    arguments += ["--backend", "tensorrt-rtx", "--compute-capability", "8.9", "--batch", "1:2:4"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["engine"]["fused_attention"] == 2
    assert set(told["engine"]["gemm_dtypes"]) == {"Half"}
    assert told["check"]["passed"] is True


def test_a_size_that_was_dynamic_is_told(tmp_path) -> None:
    path, _ = export(tmp_path, **EXPORTS["optimum"])
    assert read_source(path).notes[1] == (
        "its image size was dynamic, and is 32x32 as its position embedding has it"
    )


def test_a_model_without_attention_is_refused(tmp_path) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))
    path = tmp_path / "cnn.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(layers.eval(), (IMAGES,), path, dynamic_shapes=({0: BATCH},))
    result = CliRunner().invoke(main, ["trt", str(path), "-o", str(tmp_path / "m.engine")])
    assert result.exit_code == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "error: the graph has no Softmax and no Attention; expected a vision transformer"
    )
    assert not (tmp_path / "m.engine").exists()
