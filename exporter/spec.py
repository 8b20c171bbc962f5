"""The nouns of an export: values that cannot be wrong once they exist. Standard library only."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Literal, Self

from msn_export.errors import SpecError


class Dtype(StrEnum):
    """The type of a graph's weights and activations; 8 bits by calibration."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"

    @property
    def is_quantised(self) -> bool:
        """True of an 8-bit type, written as QuantizeLinear and DequantizeLinear."""
        return self in {Dtype.INT8, Dtype.FP8}


class Observer(StrEnum):
    """The way in which the range of an 8-bit tensor is chosen from a histogram."""

    MAX = "max"
    PERCENTILE = "percentile"
    ENTROPY = "entropy"
    MSE = "mse"


class Head(StrEnum):
    """The output that is read off the final LayerNorm's tokens [b, n, dim]."""

    CLS = "cls"
    MEAN = "mean"
    TOKENS = "tokens"
    LOGITS = "logits"
    FEATURES = "features"
    ATTENTION = "attention"

    @property
    def output(self) -> str:
        """The name of this head's output tensor."""
        return _OUTPUT_NAMES[self]


_OUTPUT_NAMES = {
    Head.CLS: "embedding",
    Head.MEAN: "mean_embedding",
    Head.TOKENS: "last_hidden_state",
    Head.LOGITS: "logits",
    Head.FEATURES: "features",
    Head.ATTENTION: "attention",
}


class InputFormat(StrEnum):
    """The input of a graph: normalised floats as planes, or the bytes a decoder gives.

    The values are ONNX's names of the types. HALF is read in graphs of other tools, never written.
    """

    FLOAT = "float"
    UINT8 = "uint8"
    HALF = "float16"

    @property
    def tensor(self) -> str:
        """The name of the input tensor."""
        return "images" if self is InputFormat.UINT8 else "pixel_values"

    @classmethod
    def of(cls, dtype: str) -> Self:
        """Choose by the input's type as ONNX spells it; any other float is FLOAT."""
        return cls(dtype) if dtype in {kind.value for kind in cls} else cls.FLOAT


class AttentionForm(StrEnum):
    """The form in which an attention core is written in ONNX."""

    HEADS = "4-D Attention"  # q, k, v as [b, h, n, d]
    PACKED = "3-D Attention"  # q, k, v as [b, n, h * d] with q_num_heads
    PLAIN = "MatMul, Softmax, MatMul"


ENGINES = (".engine", ".plan", ".trt")  # endings of an engine's file
TENSORRT_8 = "tensorrt-8"  # another name of Target.PORTABLE, in commands and older manifests


class Target(StrEnum):
    """The runtime that a graph is written for; it decides opset and the form of attention."""

    TENSORRT = "tensorrt"
    ONNXRUNTIME = "onnxruntime"
    PORTABLE = "portable"

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        """Read the name that ``portable`` had before."""
        return cls("portable") if value == TENSORRT_8 else None

    @classmethod
    def of(cls, name: str | None) -> Self | None:
        """Read a manifest's target; None where that is none of these, as an engine's."""
        return cls(name) if name is not None and name in {TENSORRT_8, *cls} else None

    @property
    def opset(self) -> int:
        """ONNX opset: 23 brought Attention; 17 is the last that TensorRT 8.6's parser reads."""
        return 17 if self is Target.PORTABLE else 23

    @property
    def attention(self) -> AttentionForm:
        """The form measured best for this target (docs/performance.md)."""
        return _ATTENTION_FORMS[self]

    @property
    def splits_queries(self) -> bool:
        """True if one token's query is projected apart from all keys and values.

        Fewer multiply-adds, two kernels more in TensorRT (docs/performance.md).
        """
        return self is Target.ONNXRUNTIME


_ATTENTION_FORMS = {
    Target.TENSORRT: AttentionForm.HEADS,
    Target.ONNXRUNTIME: AttentionForm.PACKED,
    Target.PORTABLE: AttentionForm.PLAIN,
}


LARGEST_BATCH = 999_999  # images; as many as --batch can name


@dataclass(frozen=True, slots=True)
class BatchRange:
    """Batch sizes an artifact accepts. ``opt`` is the one TensorRT tunes for."""

    form: ClassVar[str] = "N|MIN:OPT:MAX"  # what ``parse`` reads, in a few words
    min: int = 1
    opt: int = 8
    max: int = 32

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise SpecError(f"batch range {self} is not ordered; expected 1 <= MIN <= OPT <= MAX")
        if self.max > LARGEST_BATCH:
            raise SpecError(f"batch range {self} is out of range; expected at most {LARGEST_BATCH}")

    def __str__(self) -> str:
        return f"{self.min}:{self.opt}:{self.max}"

    @property
    def is_static(self) -> bool:
        """True if only one batch size is accepted."""
        return self.min == self.max

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``N`` or ``MIN:OPT:MAX``."""
        parts = text.split(":")
        if len(parts) not in {1, 3} or not all(re.fullmatch(r"[0-9]{1,6}", part) for part in parts):
            raise SpecError(
                f"batch {text!r} is not a size; expected N or MIN:OPT:MAX, as in 1:8:32"
            )
        sizes = [int(part) for part in parts]
        return cls(*(sizes if len(sizes) == 3 else sizes * 3))


LARGEST_SIDE = 16384  # pixels


class Scores(StrEnum):
    """The use of a classifier's logits, by transformers' image-classification rule."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    RAW = "raw"

    @classmethod
    def of(cls, problem_type: str | None, classes: int) -> Self:
        """Decide by the configuration's ``problem_type`` and the number of classes.

        transformers ``pipelines/image_classification.py``, ``postprocess``: a regression's values
        are left alone; several labels at once, and a single output, go through a sigmoid.
        """
        if problem_type == "regression":
            return cls("raw")
        if problem_type == "multi_label_classification" or classes == 1:
            return cls("sigmoid")
        return cls("softmax")

    @property
    def are_probabilities(self) -> bool:
        """True if a score is from 0 to 1."""
        return self is not Scores.RAW


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Height and width of what the model receives, in pixels."""

    form: ClassVar[str] = "N|HxW"
    height: int
    width: int

    def __post_init__(self) -> None:
        if not (1 <= self.height <= LARGEST_SIDE and 1 <= self.width <= LARGEST_SIDE):
            raise SpecError(
                f"image size {self} is out of range; expected 1 to {LARGEST_SIDE} pixels a side"
            )

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``N`` (square) or ``HxW``."""
        match = re.fullmatch(r"([0-9]{1,6})(?:x([0-9]{1,6}))?", text)
        if match is None:
            raise SpecError(
                f"image size {text!r} is not a size; expected N or HxW, as in 224 or 224x320"
            )
        return cls(int(match[1]), int(match[2] or match[1]))


# Sixteenths of a step at which a row may start, neighbours far apart: van der Corput's sequence
_STARTS = (8, 0, 12, 4, 10, 2, 14, 6, 9, 1, 13, 5, 11, 3, 15, 7)


def _spread(count: int, rows: int, columns: int) -> Iterator[int]:
    """Spread patches over a grid: as many in each row, at even steps, as many in each column.

    A row starts where its columns hold the fewest so far. Even steps through all rows at once meet
    the same columns in each row: half of 14 x 14 patches would be seven whole columns.
    """
    held = [0] * columns
    for row in range(rows):
        wanted = (row + 1) * count // rows - row * count // rows
        chosen = min(
            (
                [int((place + start / 16) * columns / wanted) for place in range(wanted)]
                for start in _STARTS
            ),
            key=lambda places: sum(held[place] for place in places),
        )
        for column in chosen:
            held[column] += 1
            yield row * columns + column


@dataclass(frozen=True, slots=True)
class KeptPatches:
    """A share of the patches, in a fixed pattern: ``0.3``, ``0.3:random`` or ``0.3:random:7``.

    MSN drops patches in pre-training, one pattern for a whole batch (facebookresearch/msn
    src/deit.py), 0.15 of them for ViT-S/16 and 0.7 for ViT-B/4; it keeps ``floor(n * share)``.
    """

    share: float
    pattern: Literal["grid", "random"] = "grid"
    seed: int = 0

    form: ClassVar[str] = "R[:grid|:random[:SEED]]"

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise SpecError(f"share {self.share} of the patches is none; expected above 0 to 1")

    def __str__(self) -> str:
        return f"{self.share:g}:{self.pattern}" + f":{self.seed}" * (self.pattern == "random")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``R``, ``R:grid``, ``R:random`` or ``R:random:SEED``."""
        match = re.fullmatch(r"([0-9.]{1,12})(?::(?:(grid)|(random)(?::(\d{1,9}))?))?", text)
        try:
            share = float(match[1]) if match else math.nan
        except ValueError:
            share = math.nan
        if match is None or math.isnan(share):
            raise SpecError(f"{text!r} is no share of the patches; expected {cls.form}, as in 0.3")
        return cls(share, "random" if match[3] else "grid", int(match[4] or 0))

    def of(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Choose patches of a grid (rows, columns), ascending from 0; empty where all are kept."""
        patches = grid[0] * grid[1]
        count = math.floor(patches * self.share + 1e-9)  # 0.3 * 10 is not 3 in binary
        if not count:
            raise SpecError(f"{self.share:g} of {patches} patches is less than one; keep more")
        if count == patches:
            return ()
        if self.pattern == "random":
            import random  # not for all that import this file

            drawn = random.Random(self.seed).sample(range(patches), count)  # noqa: S311
            return tuple(sorted(drawn))
        return tuple(_spread(count, *grid))


@dataclass(frozen=True, slots=True, order=True)
class ComputeCapability:
    """An NVIDIA GPU generation, such as 8.9 (Ada)."""

    form: ClassVar[str] = "8.9|89|sm_89"
    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``8.9``, ``89`` or ``sm_89``."""
        match = re.fullmatch(r"(?:sm_?)?([0-9]{1,2})\.?([0-9])", text, re.IGNORECASE)
        if match is None:
            raise SpecError(f"compute capability {text!r} is not a version; expected as in 8.9")
        return cls(int(match[1]), int(match[2]))


AMPERE = ComputeCapability(8, 0)


@dataclass(frozen=True, slots=True)
class Targets:
    """The GPU generations an engine is for; none where that is not known.

    ``later`` says that those after the last of ``named`` are served too.
    """

    named: tuple[ComputeCapability, ...] = ()
    later: bool = False

    def __bool__(self) -> bool:
        return bool(self.named)

    def __contains__(self, capability: ComputeCapability) -> bool:
        later = self.later and bool(self.named) and capability > max(self.named)
        return later or capability in self.named

    def __str__(self) -> str:
        names = ", ".join(map(str, self.named))
        return f"SM {names}{' and later' if self.later else ''}" if names else "its builder's GPU"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A graph's input or output: ``shape`` holds sizes, and names where a size is dynamic."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"


_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """Read an amount of memory: ``4GiB``, ``4G`` (the same), ``512MiB``, ``1048576``.

    Raises:
        SpecError: it is none, or zero.
    """
    match = re.fullmatch(r"([0-9]{1,15})\s*([KMGT](?:iB)?|B|)", text, re.IGNORECASE)
    if match is None or int(match[1]) == 0:
        raise SpecError(f"{text!r} is no amount of memory; expected as in 4GiB or 512MiB")
    return int(match[1]) * _UNITS[match[2][:1].upper()]
