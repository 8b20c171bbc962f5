"""ViT-MSN, the PyTorch reference: "Masked Siamese Networks", arXiv 2204.07141.

The same function as Hugging Face's ViTMSNModel and the original src/deit.py. One packed
projection gives queries, keys and values [b, 3 * h, n, d] in three ONNX nodes, from which
TensorRT builds the fewest kernels (docs/performance.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msn_export.errors import CheckpointError
from msn_export.models.config import READS, LinearClassifier, VitConfig

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


ACTIVATIONS: dict[str, Activation] = {
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
    if name in _LEARNED:
        raise CheckpointError(f"activation {name!r} has learned parameters; it is not supported")
    if name not in ACTIVATIONS:
        supported = ", ".join(sorted(ACTIVATIONS))
        raise CheckpointError(f"activation {name!r} is unknown; expected one of {supported}")
    return ACTIVATIONS[name]


# b batch, n tokens, h heads, d head size, dim = h * d, c channels

AttentionKind = Literal["sdpa", "eager"]


class Attention(nn.Module):
    """Multi-head self-attention; ``eager`` writes out what ``sdpa`` fuses."""

    def __init__(self, config: VitConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.heads, self.kind = config.heads, kind
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=config.qkv_bias)
        self.proj = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Run [b, n, dim] to [b, n, dim]; ``maps`` is given [CLS]'s attention [b, h, 1, n]."""
        packed = self.qkv(x).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2)  # [b, 3h, n, d]
        q, k, v = packed.chunk(3, dim=1)
        if maps is not None:
            of_cls = q[:, :, :1] @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            maps.append(of_cls.softmax(dim=-1))
        if self.kind == "sdpa":
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            x = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v
        projected: Tensor = self.proj(x.transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.dim, config.mlp_dim)
        self.act = activation(config.activation)
        self.fc2 = nn.Linear(config.mlp_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:  # [b, n, dim] -> [b, n, dim]
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class TransformerBlock(nn.Module):
    def __init__(self, config: VitConfig, kind: AttentionKind) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps)
        self.attn = Attention(config, kind)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        """Run [b, n, dim] to [b, n, dim]; ``maps`` as of ``Attention``."""
        x = x + self.attn(self.norm1(x), maps)
        x = x + self.mlp(self.norm2(x))
        return x  # noqa: RET504  two lines of the same form


class LinearProbe(nn.Module):
    """The classifier of facebookresearch/msn linear_eval.py: LayerNorm, norm 1, linear layer."""

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5)  # torch's default, which linear_eval.py takes
        self.linear = nn.Linear(width, labels)

    def forward(self, x: Tensor) -> Tensor:  # [b, blocks * dim] -> [b, labels]
        logits: Tensor = self.linear(F.normalize(self.norm(x), dim=-1))
        return logits


class Hidden(NamedTuple):
    """The states that the heads read.

    ``tokens`` [b, n, dim] went through the final LayerNorm where the model has one; ``blocks`` are
    the outputs [b, n, dim] of the last blocks, as many as were asked for, and never did.
    ``attention`` [b, h, 1, n] is [CLS]'s over all tokens in the last block, if it was asked for.
    """

    tokens: Tensor
    blocks: tuple[Tensor, ...] = ()
    attention: Tensor | None = None


class VitMsn(nn.Module):
    """The encoder, and the classifier where the configuration has labels."""

    def __init__(self, config: VitConfig, *, attention: AttentionKind = "sdpa") -> None:
        super().__init__()
        self.config, self.attention = config, attention
        self.patch = nn.Conv2d(config.channels, config.dim, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.dim))
        self.blocks = nn.ModuleList(
            TransformerBlock(config, attention) for _ in range(config.depth)
        )
        norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.norm = norm if config.has_final_norm else None
        self.fc_norm = norm if config.pooling == "patches" else None
        self.classifier = _classifier(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Turn normalised images [b, c, height, width] into tokens [b, n, dim], [CLS] first."""
        return self.hidden(pixel_values).tokens

    def hidden(self, pixel_values: Tensor, *, blocks: int = 0, attention: bool = False) -> Hidden:
        """Turn normalised images [b, c, height, width] into the states that the heads read."""
        patches, positions = self.patch(pixel_values), self.positions()
        return self.encode(patches, positions, blocks=blocks, attention=attention)

    def positions(self) -> Tensor:  # [1, n, dim]
        """Give the position embeddings with [CLS] added to its own."""
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        return torch.cat((cls + self.cls_token, patches), dim=1)

    def encode(
        self, patches: Tensor, positions: Tensor, *, blocks: int = 0, attention: bool = False
    ) -> Hidden:
        """Run everything behind the patch embedding.

        Args:
            patches: [b, dim, rows, columns].
            positions: as ``positions`` gives them, [1, n, dim].
            blocks: how many of the last blocks' outputs are read besides the classifier's.
            attention: whether [CLS]'s attention in the last block is read.
        """
        # an empty row in front, whose position holds [CLS]: joining a token that is repeated over
        # the batch would take a kernel that computes the batch's size
        x = F.pad(patches.flatten(2).transpose(1, 2), (0, 0, 1, 0)) + positions
        if self.config.kept:  # facebookresearch/msn src/deit.py drops behind the position embedding
            x = x[:, [0, *(1 + patch for patch in self.config.kept)]]
        if self.config.pooling in {"blocks", "features"} or self.config.pooled_blocks > 1:
            blocks = max(blocks, self.config.pooled_blocks)
        read, maps, last = [], list[Tensor](), len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            x = block(x, maps) if attention and number == last else block(x)
            if number > last - blocks:
                read.append(x)
        tokens = x if self.norm is None else self.norm(x)
        return Hidden(tokens, tuple(read), maps[0] if maps else None)

    def classify(self, hidden: Hidden) -> Tensor:
        """Give logits [b, labels]; the model must have a classifier."""
        assert self.classifier is not None
        if self.fc_norm is not None:
            read = self.fc_norm(hidden.tokens[:, 1:].mean(dim=1))
        elif self.config.pooling == "blocks":
            read = cls_of(hidden.blocks[-self.config.pooled_blocks :])
        elif self.config.pooling == "features":
            read = self.features(hidden, self.config.pooled_blocks)
        else:
            read = self.embedding(hidden, self.config.pooled_blocks)
        logits: Tensor = self.classifier(read)
        return logits

    def embedding(self, hidden: Hidden, blocks: int) -> Tensor:
        """Give [CLS] of the last blocks behind the final LayerNorm, [b, blocks * dim]."""
        if blocks == 1:
            return hidden.tokens[:, 0]
        assert self.norm is not None
        return cls_of([self.norm(block) for block in hidden.blocks[-blocks:]])

    def features(self, hidden: Hidden, blocks: int) -> Tensor:
        """Give [CLS] of the last blocks before the final LayerNorm, [b, blocks * dim].

        The rows are centred by their own mean and divided by their norm: facebookresearch/msn
        logistic_eval.py prepares the features of its classifier so. That is a LayerNorm with a gain
        of one over the root of the width, whose eps makes the rows shorter by eps / (2 variance),
        relatively.
        """
        width = blocks * self.config.dim
        rows = cls_of(hidden.blocks[-blocks:])
        unit: Tensor = F.layer_norm(rows, (width,), eps=self.config.eps) * width**-0.5
        return unit

    def for_image_size(self, size: tuple[int, int]) -> VitMsn:
        """Give the model for images of ``size`` (height, width); weights are shared."""
        return self.with_config(self.config.for_image_size(size))

    def with_config(self, config: VitConfig) -> VitMsn:
        """Give the model with another image size, patches and heads; weights are shared."""
        weights = self.state_dict(keep_vars=True)
        weights["pos_embed"] = interpolate(self.pos_embed.detach(), self.config.grid, config.grid)
        return self._sharing(weights, config)

    def with_classifier(self, classifier: LinearClassifier) -> VitMsn:
        """Give the model with a classifier in its own's place; the other weights are shared."""
        if not self.config.has_final_norm:
            raise CheckpointError(
                f"it has no final LayerNorm (its own classifier reads "
                f"{READS[self.config.pooling]}); give the pre-trained checkpoint"
            )
        width = classifier.weight.shape[1]
        if width != classifier.blocks * self.config.dim:
            raise CheckpointError(
                f"its features have {classifier.blocks * self.config.dim} numbers and the "
                f"classifier reads {width}; give the checkpoint that it was fitted on"
            )
        config = replace(
            self.config,
            labels=classifier.labels,
            pooling=classifier.pooling,
            pooled_blocks=classifier.blocks,
            problem_type=None,
        )
        weights = {
            name: weight
            for name, weight in self.state_dict(keep_vars=True).items()
            if not name.startswith("classifier.")
        }
        weights["classifier.weight"] = torch.from_numpy(classifier.weight)
        if config.pooling == "cls":
            weights["classifier.bias"] = torch.zeros(len(config.labels))
        return self._sharing(weights, config)

    def _sharing(self, weights: Mapping[str, Tensor], config: VitConfig) -> VitMsn:
        with torch.device("meta"):
            model = VitMsn(config, attention=self.attention)
        own = dict(self.named_parameters())
        for name, parameter in model.named_parameters():  # assigned, each takes over what is here
            parameter.requires_grad_(name in own and own[name].requires_grad)
        model.load_state_dict(weights, assign=True)
        return model.train(self.training)


def cls_of(blocks: Sequence[Tensor]) -> Tensor:
    """Put the [CLS] tokens of blocks [b, n, dim] side by side, [b, blocks * dim]."""
    tokens = [block[:, 0] for block in blocks]
    return tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=-1)


def _classifier(config: VitConfig) -> nn.Module | None:
    labels = len(config.labels)
    if not labels:
        return None
    if config.pooling == "blocks":
        return LinearProbe(config.pooled_blocks * config.dim, labels)
    has_bias = config.pooling != "features"  # logistic_eval.py fits no intercept
    return nn.Linear(config.pooled_blocks * config.dim, labels, bias=has_bias)


def interpolate(pos_embed: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Resample position embeddings [1, 1 + rows * columns, dim] to another grid.

    transformers ViTMSNEmbeddings.interpolate_pos_encoding: [CLS] kept, the rest bicubic,
    align_corners false, to a size and not by a factor.
    """
    if grid == wanted:
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    image = patches.reshape(1, *grid, -1).permute(0, 3, 1, 2)  # [1, dim, rows, columns]
    image = F.interpolate(image, size=wanted, mode="bicubic", align_corners=False)
    return torch.cat((cls, image.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
