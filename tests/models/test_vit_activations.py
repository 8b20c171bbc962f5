"""Every activation a Hugging Face config may name is transformers' own function."""

import pytest
import torch
from transformers.activations import ACT2CLS, ACT2FN

from msn_export.errors import CheckpointError
from msn_export.models.vit import ACTIVATIONS, activation

LEARNED = {"prelu", "xielu"}


@pytest.mark.parametrize("name", sorted(set(ACT2CLS) - LEARNED))
def test_it_computes_what_transformers_computes(name) -> None:
    x = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([0.0, -0.0, 60.0, -60.0])])
    # 5e-7 of 12: forms of the tanh GELU that are equal in real arithmetic
    torch.testing.assert_close(activation(name)(x), ACT2FN[name](x), rtol=1e-6, atol=5e-6)


def test_none_is_missing_and_none_is_ours_alone() -> None:
    assert set(ACTIVATIONS) == set(ACT2CLS) - LEARNED


@pytest.mark.parametrize("name", sorted(LEARNED))
def test_learned_parameters_are_refused(name) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}' has learned parameters; it is not"):
        activation(name)


def test_an_unknown_name_lists_what_is_known() -> None:
    with pytest.raises(CheckpointError) as raised:
        activation("gelus")
    assert str(raised.value).startswith("activation 'gelus' is unknown; expected one of gelu, ")
