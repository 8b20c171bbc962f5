"""A folding changes weights and leaves the function as it was."""

import numpy as np
import pytest
import torch
from torch import nn

from msn_export.graph.torch_reference import with_normalisation
from msn_export.images import normalize
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize


@pytest.mark.parametrize("bias", [True, False])
def test_normalisation_folds_into_the_patch_convolution(bias) -> None:
    preprocessing = preset("hf", ImageSize(16, 16))
    torch.manual_seed(0)
    patch = nn.Conv2d(3, 8, 4, 4, bias=bias)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    with torch.no_grad():
        wanted = patch(torch.from_numpy(normalize(pixels, preprocessing)))
        planes = torch.from_numpy(pixels).float().permute(0, 3, 1, 2)
        got = with_normalisation(patch, preprocessing)(planes)
    # folding rounds each weight once more
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_what_is_folded_is_rounded_once() -> None:
    preprocessing = preset("hf", ImageSize(16, 16))
    torch.manual_seed(0)
    patch = nn.Conv2d(3, 8, 4, 4)
    folded = with_normalisation(patch, preprocessing)
    weight = patch.weight.detach().double().numpy()
    mean, std = (
        np.array(values).reshape(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std)
    )
    exact = weight * preprocessing.scale / std
    np.testing.assert_array_equal(folded.weight.numpy(), exact.astype(np.float32))
    exact = patch.bias.detach().double().numpy() - (weight * mean / std).sum((1, 2, 3))
    np.testing.assert_array_equal(folded.bias.numpy(), exact.astype(np.float32))
    assert not folded.weight.requires_grad
