"""The activations a Hugging Face config may name, by transformers' ``ACT2FN`` names."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from msn_export.errors import CheckpointError

Activation = Callable[[Tensor], Tensor]

_LEARNED = frozenset({"prelu", "xielu"})


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_10(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(-10, 10)  # arXiv 2004.09602


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)  # hendrycks/GELUs


def _laplace(x: Tensor) -> Tensor:
    # arXiv 2209.10655: mean and deviation that match relu2 where both bend
    return 0.5 * (1.0 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2.0))))


def _sqrt_softplus(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()  # arXiv 2109.08668


def _linear(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_10": _gelu_10,
    "gelu_accurate": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": _linear,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu2": _relu2,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": _sqrt_softplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Activation:
    """Look an activation up.

    Raises:
        CheckpointError: it is unknown, or has learned parameters that no ViT-MSN file holds.
    """
    if name in _LEARNED:
        raise CheckpointError(f"activation {name!r} has learned parameters; it is not supported")
    if name not in _ACTIVATIONS:
        known = ", ".join(sorted(_ACTIVATIONS))
        raise CheckpointError(f"activation {name!r} is unknown; expected one of {known}")
    return _ACTIVATIONS[name]


def names() -> list[str]:
    """List the activations that are supported."""
    return sorted(_ACTIVATIONS)
