"""A ViT-MSN trained without labels on scikit-learn's handwritten digits, kept between test runs.

Masked siamese networks (arXiv 2204.07141), trained as facebookresearch/msn does: from a view of
which patches are dropped, an encoder predicts which prototypes a moving average of itself finds in
another view of the same picture, of which that sees all patches. Both see the pictures that
digits.py trains on, none of their labels and none of the pictures for testing.
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTImageProcessorPil, ViTMSNConfig, ViTMSNModel

from msn_export.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from tests.builders import digits

# 17 tokens of 2x2 original pixels; attention heads of 32, for which TensorRT has fused kernels
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.1,
}
PATCHES = 16
SEED, EPOCHS, BATCH, RATE = 0, 90, 64, 2e-3
# facebookresearch/msn src/losses.py and its configurations: temperature, sharpening of the targets,
# steps that even the targets out, weight of the mean prediction's entropy. There are 1024
# prototypes for ImageNet; here 64 for ten digits, each in several hands
TEMPERATURE, SHARPENING, EVENING, ENTROPY = 0.1, 0.25, 3, 1.0
PROTOTYPES, PROJECTED, HIDDEN = 64, 64, 256
VIEWS, DROPPED = 2, 0.3
MOMENTUM = 0.95  # of the moving average at first, rising to 1; facebookresearch/msn begins at 0.996

# b images, n patches, k prototypes


def kept(folder: Path) -> Path:
    """Give the trained backbone in a folder; train it where there is none of this recipe."""
    return digits.kept(folder, train, __file__)


def train(folder: Path) -> None:
    """Train the backbone, save it with its preprocessing as Hugging Face does."""
    _processor(folder)
    with digits.seeded(SEED):
        _fit(_pictures()).save_pretrained(folder)


def untrained(folder: Path) -> Path:
    """Save the backbone as it is before training."""
    _processor(folder)
    with digits.seeded(SEED):
        _Network().encoder.save_pretrained(folder)
    return folder


def _processor(folder: Path) -> None:
    size = {"height": SHAPE["image_size"], "width": SHAPE["image_size"]}
    processor = ViTImageProcessorPil(
        size=size, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD)
    )
    processor.save_pretrained(folder)


def _pictures() -> Tensor:  # [1198, 3, 16, 16]
    train, _ = digits.load()
    return torch.from_numpy(train.planes(SHAPE["image_size"]))


class _Network(nn.Module):
    """The encoder, and the projection in front of the prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ViTMSNModel(ViTMSNConfig(**SHAPE))
        with torch.no_grad():  # transformers starts both at zero
            nn.init.normal_(self.encoder.embeddings.cls_token, std=0.02)
            nn.init.normal_(self.encoder.embeddings.position_embeddings, std=0.1)
        self.projection = nn.Sequential(
            *_layer(SHAPE["hidden_size"]), *_layer(HIDDEN), nn.Linear(HIDDEN, PROJECTED)
        )

    def forward(self, images: Tensor, patches: Tensor | None = None) -> Tensor:
        """Project images [b, 3, h, w] to [b, 64] of norm 1; ``patches`` are those it sees."""
        tokens = self.encoder.embeddings(images)
        if patches is not None:  # behind the position embedding, as facebookresearch/msn drops
            tokens = torch.cat((tokens[:, :1], tokens[:, 1 + patches]), dim=1)
        for layer in self.encoder.layers:
            tokens = layer(tokens)
        return F.normalize(self.projection(self.encoder.layernorm(tokens)[:, 0]), dim=-1)


def _layer(width: int) -> tuple[nn.Module, ...]:
    return nn.Linear(width, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.GELU()


def _fit(pictures: Tensor) -> ViTMSNModel:
    """Train on pictures [n, 3, h, w]; give the moving average of the encoder, as MSN publishes."""
    network, prototypes = _Network(), nn.Parameter(0.05 * torch.randn(PROTOTYPES, PROJECTED))
    average = copy.deepcopy(network).requires_grad_(requires_grad=False)
    optimizer = _optimizer(network, prototypes)
    batches = len(pictures) // BATCH
    steps = EPOCHS * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.15)
    for step in range(steps):
        if step % batches == 0:
            order = torch.randperm(len(pictures))
        images = pictures[order[step % batches * BATCH :][:BATCH]]
        loss = _loss(network, average, prototypes, images)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 3.0)
        optimizer.step()
        schedule.step()
        momentum = 1 - (1 - MOMENTUM) * (1 + math.cos(math.pi * step / steps)) / 2
        for mean, new in zip(average.parameters(), network.parameters(), strict=True):
            mean.lerp_(new, 1 - momentum)
    return average.encoder.eval()


def _optimizer(network: nn.Module, prototypes: nn.Parameter) -> torch.optim.Optimizer:
    matrices = [weight for weight in network.parameters() if weight.ndim > 1]
    rest = [weight for weight in network.parameters() if weight.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": [*rest, prototypes]}]
    return torch.optim.AdamW(groups, RATE, weight_decay=0.0)


def _loss(network: nn.Module, average: nn.Module, prototypes: Tensor, images: Tensor) -> Tensor:
    """Give the cross-entropy of the views' predictions, less the entropy of their mean."""
    directions = F.normalize(prototypes, dim=-1)
    with torch.no_grad():
        targets = _targets(average(_moved(images, 0.5)) @ directions.T)
    predictions = []
    for _ in range(VIEWS):
        # one permutation for the batch, as there
        patches = torch.randperm(PATCHES)[: math.floor(PATCHES * (1 - DROPPED))]
        cosines = network(_moved(images), patches) @ directions.T
        predictions.append(F.log_softmax(cosines / TEMPERATURE, dim=-1))
    logs = torch.stack(predictions)  # [views, b, k]
    mean = logs.exp().mean(dim=(0, 1))
    entropy = torch.special.entr(mean).sum()
    return -(targets * logs).sum(dim=-1).mean() - ENTROPY * entropy


def _targets(cosines: Tensor) -> Tensor:
    """Sharpen softmax predictions [b, k], and let each prototype have as much of the batch.

    The alternating division of Sinkhorn and Knopp, as in SwAV (arXiv 2006.09882).
    """
    targets = F.softmax(cosines / (TEMPERATURE * SHARPENING), dim=-1)
    for _ in range(EVENING):
        targets = targets / targets.sum(dim=0)
        targets = targets / targets.sum(dim=1, keepdim=True)
    return targets


def _moved(images: Tensor, strength: float = 1.0) -> Tensor:
    """Turn, scale, shear, shift and brighten each image by chance."""
    count = len(images)
    turn, shear, *scales = (_between(count) * strength for _ in range(4))
    width, height = (torch.exp(0.15 * scale) for scale in scales)
    angle = 0.25 * turn  # radians
    matrix = torch.stack((angle.cos() * width, (0.2 * shear - angle.sin()) * height,
                          angle.sin() * width, angle.cos() * height), dim=1)  # fmt: skip
    shift = 0.15 * strength * _between(count, 2, 1)  # of half the image
    grid = F.affine_grid(
        torch.cat((matrix.view(-1, 2, 2), shift), dim=2), list(images.shape), align_corners=False
    )
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    darkest = images.amin(dim=(2, 3), keepdim=True)
    return darkest + (moved - darkest) * (1 + 0.2 * _between(count, 1, 1, 1))


def _between(*shape: int) -> Tensor:
    """Draw numbers between -1 and 1."""
    return torch.rand(*shape) * 2 - 1
