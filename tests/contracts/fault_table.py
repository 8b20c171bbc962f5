"""The table of faults: what each does to the outputs, and whether ``validate`` catches it.

The effect is measured here, with arithmetic of its own, and never by what judges a candidate.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTMSNForImageClassification

from msn_export.commands.calibrate import CalibrateJob, run_calibrate
from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.commands.validate import ValidateJob, run_validate
from msn_export.compare.sides import Validation
from msn_export.graph import io
from msn_export.mixed_precision import cpu_runner
from msn_export.runtime import open_runner
from msn_export.spec import BatchRange, Dtype, Head
from tests.builders import digits
from tests.builders.checkpoints import hugging_face, processor
from tests.contracts import faults
from tests.contracts.fault_kinds import LOGITS, TOKENS, Fault, Graph, drawn

Outputs = Mapping[str, NDArray[Any]]
BATCH = BatchRange(1, 2, 4)
IMAGES = 8
PICTURES = 48  # three in four are calibrated on
SHARPNESS = 2.5  # of queries and of keys: see test_attention_is_neither_flat_nor_one_hot


def relative_error(have: Outputs, want: Outputs) -> float:
    """Give the largest relative error in the L2 norm: over outputs, [CLS] and single images.

    Infinity where a value is not finite.
    """
    found = []
    for name, wanted in want.items():
        parts = [(have[name], wanted)]
        if wanted.ndim == 3:
            parts.append((have[name][:, :1], wanted[:, :1]))
        for a, b in parts:
            x, y = a.astype(np.float64), b.astype(np.float64)
            if not np.isfinite(x).all():
                return float("inf")
            pairs = [(x, y), *zip(x, y, strict=True)]
            found += [np.linalg.norm(i - j) / np.linalg.norm(j) for i, j in pairs]
    return float(max(found))


@dataclass(frozen=True)
class Subject:
    """A checkpoint with a classifier, pictures of its kind, and what its graphs give."""

    checkpoint: Path
    images: Path
    heads: tuple[Head, ...]

    @property
    def checked(self) -> Path:
        """The pictures that candidates are compared on."""
        return self.images / "checked"

    def graph(self, dtype: Dtype) -> Path:
        """Export it; 8 bits by calibration of the fp32 graph."""
        output = self.checkpoint.with_name(f"{self.checkpoint.name}-{dtype}.onnx")
        if output.exists():
            return output
        if dtype.is_quantised:
            job = CalibrateJob(
                self.graph(Dtype.FP32), dtype, self.images, output, compile=False, gate_cosine=0.9
            )
            return run_calibrate(job)[0]
        job = OnnxJob(
            str(self.checkpoint), output, heads=self.heads, dtype=dtype, images=self.checked,
            batch=BATCH,
        )  # fmt: skip
        return run_onnx(job)[0]

    def reference(self, dtype: Dtype) -> Path:
        """Give what candidates are compared with: the fp32 graph where it can be, for speed."""
        return self.checkpoint if dtype is Dtype.FP32 else self.graph(Dtype.FP32)

    def truth(self, pixels: NDArray[Any]) -> tuple[Outputs, list[float]]:
        """Run transformers' model in fp64 on images [count, 3, h, w].

        Returns:
            The outputs by name, and the mean of attention's largest probability by block.
        """
        model = ViTMSNForImageClassification.from_pretrained(
            self.checkpoint, attn_implementation="eager"
        )
        model = model.double().eval()
        with torch.no_grad():
            found = model.vit(torch.from_numpy(pixels).double(), output_attentions=True)
            tokens = found.last_hidden_state
            outputs = {TOKENS: tokens, "embedding": tokens[:, 0]}
            outputs[LOGITS] = model.classifier(tokens[:, 0])
        peaks = [float(block.amax(dim=-1).mean()) for block in found.attentions]
        return {name: value.numpy() for name, value in outputs.items()}, peaks


def sharp(folder: Path, photographs: Path) -> Subject:
    """Make a checkpoint of four blocks with random weights, its queries and keys larger."""
    checkpoint = folder / "sharp"
    hugging_face(checkpoint, labels=8, num_hidden_layers=4)
    processor(
        checkpoint, size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    state = load_file(checkpoint / "model.safetensors")
    for name in state:
        if any(f"attention.{part}" in name for part in ("q_proj", "k_proj", "attention.query")):
            state[name] *= SHARPNESS
    save_file(state, checkpoint / "model.safetensors", {"format": "pt"})
    pictures = []
    for path in sorted(photographs.iterdir()):
        with Image.open(path) as picture:
            pictures.append(picture.convert("RGB"))
    parts = [
        picture.resize((48, 40), box=(left * w, 0, right * w, picture.height))
        for left, right in ((0.0, 1.0), (0.0, 0.5), (0.5, 1.0))
        for picture in pictures
        for w in (picture.width,)
    ]
    return Subject(checkpoint, _written(folder / "small", parts), (Head.TOKENS, Head.LOGITS))


def trained(folder: Path, checkpoint: Path) -> Subject:
    """Give the classifier of digits with pictures of its test set."""
    own = folder / "digits"
    own.symlink_to(checkpoint)
    pictures = [Image.fromarray(p) for p in digits.load()[1].pictures[:PICTURES]]
    return Subject(own, _written(folder / "digit", pictures), (Head.CLS, Head.LOGITS))


def _written(folder: Path, pictures: list[Image.Image]) -> Path:
    (folder / "checked").mkdir(parents=True)
    for index, picture in enumerate(pictures):
        picture.save(folder / ("checked" if index < IMAGES else "") / f"{index:02}.png")
    return folder


@dataclass(frozen=True)
class Row:
    """A planted fault: its effect in multiples of the clean error, and what ``validate`` says."""

    fault: Fault
    dtype: Dtype
    size: float
    effect: float
    validation: Validation
    path: Path

    @property
    def must_be_caught(self) -> bool:
        return self.effect >= 2

    def __str__(self) -> str:
        caught = "passed" if self.validation.passed else "caught"
        return (
            f"{self.dtype} {self.fault}, size {self.size:.3g}, effect {self.effect:.3g}: {caught}"
        )


class Candidate:
    """A clean candidate of a subject, in which faults are planted.

    ``error`` is its relative error against the reference in fp64, ``peaks`` the reference's
    sharpness of attention by block.
    """

    def __init__(self, subject: Subject, dtype: Dtype, stage: Path) -> None:
        self.subject, self.dtype, self.stage = subject, dtype, stage
        self.path = subject.graph(dtype)
        # bf16 has no kernels here: the fp32 graph has the same preprocessing
        with open_runner(subject.graph(Dtype.FP32)) as runner:
            self.pixels = runner.preprocess(sorted(subject.checked.iterdir()))
        self.clean = self._run(io.load(self.path))
        truth, self.peaks = subject.truth(self.pixels)
        self.error = relative_error(self.clean, {name: truth[name] for name in self.clean})

    def drawn(self, seed: int) -> Iterator[Fault]:
        """Draw a fault of each kind that has a place here."""
        return drawn(Graph(io.load(self.path), self.pixels.mean(axis=(1, 2, 3))), seed)

    def validated(self, path: Path | None = None) -> Validation:
        """Let ``validate`` compare a graph, or the clean one, with the reference."""
        return run_validate(
            ValidateJob(
                str(self.subject.reference(self.dtype)), str(path or self.path),
                images=self.subject.checked, batch=BATCH,
            )
        )  # fmt: skip

    def row(self, fault: Fault, wanted: float) -> Row:
        """Plant a fault with the effect that is wanted, or as near as it comes, and judge it."""
        size, effect = self._sized(fault, wanted)
        path = self.stage / f"{self.path.stem}-faulty.onnx"
        io.save(self._faulty(fault, size), path)
        faults.describe(self.path, path)
        return Row(fault, self.dtype, size, effect, self.validated(path), path)

    def _run(self, model: ir.Model) -> Outputs:
        path = self.stage / "run.onnx"
        io.save(model, path)
        with cpu_runner(path, self.dtype, self.stage) as runner:
            size = BATCH.max
            parts = [runner(self.pixels[at : at + size]) for at in range(0, len(self.pixels), size)]
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _faulty(self, fault: Fault, size: float) -> ir.Model:
        model = io.load(self.path)
        fault.plant(model, size)
        return model

    def _effect(self, fault: Fault, size: float) -> float:
        return relative_error(self._run(self._faulty(fault, size)), self.clean) / self.error

    def _sized(self, fault: Fault, wanted: float, tries: int = 8) -> tuple[float, float]:
        """Find the size, at most 1, whose effect is ``wanted`` to 1.1 times it; and that effect."""
        size, aim = 1.0, 1.05 * wanted
        best = size, self._effect(fault, size)
        if not fault.has_size or best[1] <= 1.1 * wanted:
            return best
        low, high, effect = 0.0, 1.0, best[1]
        for _ in range(tries):
            # most effects grow in proportion; where this one does not, halve what is left
            guess = size * aim / effect if np.isfinite(effect) and effect > 0 else 0.0
            size = guess if low < guess < high else (low + high) / 2
            effect = self._effect(fault, size)
            if abs(effect - aim) < abs(best[1] - aim):
                best = size, effect
            if wanted <= effect <= 1.1 * wanted:
                break
            low, high = (size, high) if effect < aim else (low, size)
        return best
