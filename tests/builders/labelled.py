"""Labelled pictures: handwritten digits in a folder for each class, with transformers' states."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTMSNModel

from tests.builders import digits


def write(folder: Path, *, each: int, classes: int = 10, test: bool = False) -> Path:
    """Write ``each`` pictures of each class, of the training set or of the test set."""
    held = digits.load()[test]
    for label in range(classes):
        for number in np.flatnonzero(held.labels == label)[:each]:
            path = folder / f"digit {label}" / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(held.pictures[number]).save(path)
    return folder


def noise(folder: Path, *, each: int, classes: int, side: int = 8, first: int = 0) -> Path:
    """Write seeded pictures that say nothing of their class; ``first`` is the first's seed."""
    for number in range(first, first + each * classes):
        path = folder / f"class {number % classes:05}" / f"{number:06}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def features(
    checkpoint: Path, pixels: np.ndarray, *, kind: str = "msn", blocks: int = 1
) -> np.ndarray:
    """Compute a classifier's features [n, blocks * dim] in transformers, in fp64 from its states.

    Args:
        checkpoint: a folder of transformers.
        pixels: normalised planes [n, c, h, w].
        kind: ``msn``: before the final LayerNorm, centred, of norm 1; ``embedding``: behind it.
        blocks: how many of the last blocks.
    """
    peer = ViTMSNModel.from_pretrained(checkpoint).eval()
    layers = next(m for m in peer.modules() if isinstance(m, torch.nn.ModuleList))
    states: list[torch.Tensor] = []
    for layer in layers:
        layer.register_forward_hook(
            lambda _m, _i, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.no_grad():
        peer(torch.from_numpy(pixels))
        if kind == "embedding":
            tokens = [peer.layernorm(state)[:, 0] for state in states[-blocks:]]
            return torch.cat(tokens, dim=1).double().numpy()
    rows = torch.cat([state[:, 0] for state in states[-blocks:]], dim=1).double()
    rows -= rows.mean(dim=1, keepdim=True)
    return (rows / rows.norm(dim=1, keepdim=True)).numpy()
