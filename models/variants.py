"""The shape of a ViT-MSN, and the five that were published. Standard library only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from msn_export.errors import CheckpointError

# No real ViT comes near these; a hostile config.json may, and a model is built from it
_LARGEST = 1 << 20
_DEEPEST = 1024


# What a classifier reads. cls: transformers, torchvision, timm, MAE with --cls_token; patches: MAE,
# timm with global_pool="avg", both with a LayerNorm behind it; blocks: facebookresearch/msn
# linear_eval.py
Pooling = Literal["cls", "patches", "blocks"]
READS = {
    "cls": "[CLS] after the final LayerNorm",
    "patches": "the mean of the last block's patches",
    "blocks": "[CLS] of the last blocks before the final LayerNorm",
}


@dataclass(frozen=True, slots=True)
class VitConfig:
    """The shape of a model. Sizes are (height, width) in pixels; ``labels`` () means no head.

    ``pooling`` is what the classifier reads, ``pooled_blocks`` of how many last blocks where that
    is ``blocks``. A model whose pooling is not ``cls`` has no final LayerNorm. ``problem_type`` is
    transformers' word for what a head's outputs mean; None says nothing.

    Raises:
        CheckpointError: the numbers contradict each other; the message names them.
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    channels: int
    dim: int
    depth: int
    heads: int
    mlp_dim: int
    activation: str = "gelu"
    eps: float = 1e-6
    qkv_bias: bool = True
    labels: tuple[str, ...] = ()
    pooling: Pooling = "cls"
    pooled_blocks: int = 1
    problem_type: str | None = None

    def __post_init__(self) -> None:
        sizes = {
            "image height": self.image_size[0],
            "image width": self.image_size[1],
            "patch height": self.patch_size[0],
            "patch width": self.patch_size[1],
            "channels": self.channels,
            "hidden size": self.dim,
            "layers": self.depth,
            "attention heads": self.heads,
            "intermediate size": self.mlp_dim,
        }
        for name, size in sizes.items():
            most = _DEEPEST if name == "layers" else _LARGEST
            if not 1 <= size <= most:
                raise CheckpointError(f"{name} {size} is out of range; expected 1 to {most}")
        if self.dim % self.heads:
            raise CheckpointError(
                f"hidden size {self.dim} is not divisible by {self.heads} attention heads"
            )
        if not 1 <= self.pooled_blocks <= self.depth:
            raise CheckpointError(
                f"a classifier reads {self.pooled_blocks} blocks; expected 1 to {self.depth}"
            )
        if not 0 < self.eps < 1:
            raise CheckpointError(f"LayerNorm eps {self.eps} is out of range; expected 1e-6 or so")
        for side, image, patch in zip(
            ("height", "width"), self.image_size, self.patch_size, strict=True
        ):
            if image % patch:
                below = image - image % patch
                nearest = f"sizes are {below} and {below + patch}" if below else f"size is {patch}"
                raise CheckpointError(
                    f"image {side} {image} is not divisible by the patch's {patch}; "
                    f"nearest {nearest}"
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return (
            self.image_size[0] // self.patch_size[0],
            self.image_size[1] // self.patch_size[1],
        )

    @property
    def tokens(self) -> int:
        """Sequence length: the patches and [CLS]."""
        return self.grid[0] * self.grid[1] + 1

    def for_image_size(self, size: tuple[int, int]) -> VitConfig:
        """Give the same model for another image size.

        Raises:
            CheckpointError: the patch does not divide it.
        """
        return replace(self, image_size=size)

    def to_json(self) -> dict[str, Any]:
        """Give plain JSON values."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def _vit(patch: int, dim: int, depth: int, heads: int) -> VitConfig:
    # facebookresearch/msn src/deit.py: mlp_ratio=4, qkv_bias=True, LayerNorm eps 1e-6; images of
    # 224 pixels, main config configs/pretrain/msn_vits16.yaml (rand_size: 224)
    return VitConfig((224, 224), (patch, patch), 3, dim, depth, heads, 4 * dim)


# facebookresearch/msn README, "Pre-trained models", and the src/deit.py function of each:
VARIANTS = {
    "vit-msn-small": _vit(16, 384, 12, 6),  # vits16_800ep.pth.tar, deit_small
    "vit-msn-base": _vit(16, 768, 12, 12),  # vitb16_600ep.pth.tar, deit_base
    "vit-msn-large": _vit(16, 1024, 24, 16),  # vitl16_600ep.pth.tar, deit_large
    "vit-msn-base-4": _vit(4, 768, 12, 12),  # vitb4_300ep.pth.tar, deit_base_p4
    "vit-msn-large-7": _vit(7, 1024, 24, 16),  # vitl7_200ep.pth.tar, deit_large_p7
}


def named_variant(name: str) -> VitConfig:
    """Look a published shape up.

    Raises:
        CheckpointError: there is none of that name.
    """
    if name not in VARIANTS:
        raise CheckpointError(f"variant {name!r} is unknown; expected one of {', '.join(VARIANTS)}")
    return VARIANTS[name]
