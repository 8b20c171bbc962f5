"""Fold what is constant into the weights before the graph is written; the function stays."""

import torch
from torch import Tensor, nn

from msn_export.preprocessing import Preprocessing


def with_normalisation(patch: nn.Conv2d, preprocessing: Preprocessing) -> nn.Conv2d:
    """Give the convolution that does on bytes what ``patch`` does on normalised planes.

    ``conv((x * scale - mean) / std)`` is ``conv'(x)`` with ``w' = w * scale / std`` and
    ``b' = b - sum(w * mean / std)``; exact in real arithmetic, for the convolution has no padding.
    """
    std = torch.tensor(preprocessing.std, dtype=torch.float64).view(1, -1, 1, 1)
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64).view(1, -1, 1, 1)
    weight = patch.weight.double()
    bias = -(weight * mean / std).sum(dim=(1, 2, 3))
    if patch.bias is not None:
        bias = bias + patch.bias.double()
    with torch.device("meta"):
        folded = nn.Conv2d(patch.in_channels, patch.out_channels, patch.kernel_size, patch.stride)  # type: ignore[arg-type]
    folded.weight = _constant(weight * preprocessing.scale / std)
    folded.bias = _constant(bias)
    return folded


def with_cls_token(pos_embed: Tensor, cls_token: Tensor) -> nn.Parameter:
    """Give position embeddings [1, n, dim] whose first row holds the [CLS] token too.

    ``[cls; x] + pos`` is ``[0; x] + pos'``, the same sums.
    """
    table = pos_embed.detach().clone()
    table[:, :1] += cls_token.detach()
    return nn.Parameter(table, requires_grad=False)


def _constant(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.float(), requires_grad=False)
