"""A ViT-MSN classifier trained on scikit-learn's handwritten digits, kept between test runs.

1,797 real images of 8x8 pixels (Alpaydin and Kaynak, 1998), a third of them for testing.
"""

import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTMSNConfig, ViTMSNForImageClassification

from msn_export.images import preprocess
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize

# 17 tokens of 2x2 original pixels; heads of 32, for which TensorRT has fused kernels
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.1,
}
EPOCHS, BATCH, RATE, SEED = 40, 64, 2e-3, 0
TESTED = 599


@dataclass(frozen=True)
class Digits:
    """Pictures [count, 8, 8] uint8 with their labels, shuffled once."""

    pictures: np.ndarray
    labels: np.ndarray

    def write(self, folder: Path, count: int | None = None) -> Path:
        folder.mkdir()
        for index, picture in enumerate(self.pictures[:count]):
            Image.fromarray(picture).save(folder / f"{index:04}.png")
        return folder

    def write_labelled(self, folder: Path, rows: Sequence[int] | np.ndarray | None = None) -> Path:
        """Write pictures, or some of them, with a subfolder for each class."""
        for index in range(len(self.labels)) if rows is None else rows:
            path = folder / str(self.labels[index]) / f"{index:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(self.pictures[index]).save(path)
        return folder

    def planes(self, side: int = 32) -> np.ndarray:
        """Give what a model sees, [count, 3, side, side] float32."""
        return preprocess(map(Image.fromarray, self.pictures), preset("hf", ImageSize(side, side)))


def load() -> tuple[Digits, Digits]:
    """Give the images to train on and those to test on."""
    digits = load_digits()
    pictures = np.round(digits.images * (255 / 16)).astype(np.uint8)
    order = np.random.default_rng(SEED).permutation(len(pictures))
    test, train = order[:TESTED], order[TESTED:]
    return Digits(pictures[train], digits.target[train]), Digits(
        pictures[test], digits.target[test]
    )


def recipe(*files: str) -> str:
    """Name what a trained model depends on: this file, others given, and torch's version."""
    content = b"".join(Path(file).read_bytes() for file in (__file__, *files))
    return hashlib.sha256(content + torch.__version__.encode()).hexdigest()[:16]


def train(folder: Path) -> None:
    """Train the classifier and save it as Hugging Face does."""
    with seeded(SEED):
        _fit().save_pretrained(folder)


def kept(folder: Path, train: Callable[[Path], None] = train, *files: str) -> Path:
    """Give the trained model in a folder; train it where there is none of this recipe.

    Args:
        folder: where models are kept, each under its recipe.
        train: writes a model into a folder that it is given.
        files: further files that the model depends on.
    """
    model = folder / recipe(*files)
    with model.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of several pytest processes trains
        if not model.is_dir():
            stage = model.with_suffix(".stage")
            shutil.rmtree(stage, ignore_errors=True)
            train(stage)
            stage.rename(model)
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Train from a seed on one thread: more of them only wait for each other here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def plant(
    folder: Path, trained: Path, blocks: Sequence[int] = (0, 1, 2), factor: float = 50.0
) -> Path:
    """Copy a model with the two largest channels of each LayerNorm ``factor`` times as large.

    What reads them is divided by as much, so the function is the same. Such channels come by
    themselves in large models (arXiv 2208.07339); a tiny one has none.
    """
    model = ViTMSNForImageClassification.from_pretrained(trained)
    with torch.no_grad():
        for layer in (model.vit.layers[block] for block in blocks):
            attention = layer.attention
            readers = {
                layer.layernorm_before: (attention.q_proj, attention.k_proj, attention.v_proj),
                layer.layernorm_after: (layer.mlp.fc1,),
            }
            for norm, projections in readers.items():
                channels = norm.weight.abs().topk(2).indices
                norm.weight[channels] *= factor
                norm.bias[channels] *= factor
                for projection in projections:
                    projection.weight[:, channels] /= factor
    model.save_pretrained(folder)
    return folder


def _fit() -> ViTMSNForImageClassification:
    images, _ = load()
    x, y = torch.from_numpy(images.planes()), torch.from_numpy(images.labels)
    model = ViTMSNForImageClassification(ViTMSNConfig(**SHAPE, num_labels=10))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x)).split(BATCH):
            logits = model(_moved(x[chosen])).logits
            loss = F.cross_entropy(logits, y[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _moved(x: torch.Tensor) -> torch.Tensor:
    """Shift each image by up to half an original pixel and turn it by up to 0.15 radians."""
    angle = (torch.rand(len(x)) * 2 - 1) * 0.15
    matrix = torch.zeros(len(x), 2, 3)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1
    matrix[:, 0, 1], matrix[:, 1, 0] = angle, -angle
    matrix[:, :, 2] = (torch.rand(len(x), 2) * 2 - 1) / 8
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)
