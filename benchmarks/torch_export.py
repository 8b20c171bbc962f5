"""Export a Hugging Face folder as PyTorch's own exporter does, and check nothing: a peer.

    python benchmarks/torch_export.py FOLDER OUTPUT.onnx

torch.onnx.export(dynamo=True) at opset 23 with a dynamic batch, [CLS] out.
"""

import sys
import warnings

import torch
from torch import Tensor, nn
from transformers import ViTMSNModel


class Embedding(nn.Module):
    """The model with [CLS] read off it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map images [b, 3, h, w] to embeddings [b, dim]."""
        tokens: Tensor = self.model(pixel_values).last_hidden_state
        return tokens[:, 0]


def main(folder: str, output: str) -> None:
    """Export and write."""
    model = Embedding(ViTMSNModel.from_pretrained(folder)).eval()
    size = model.model.config.image_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own making: deprecations inside torch
        torch.onnx.export(
            model,
            (torch.zeros(2, 3, size, size),),
            output,
            dynamo=True,
            opset_version=23,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=32)},),
            external_data=False,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
