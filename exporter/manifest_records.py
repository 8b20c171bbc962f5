"""The parts of a manifest: what each says of an artifact. Standard library only."""

from dataclasses import dataclass, field
from typing import Any

from msn_export.spec import ComputeCapability, Targets


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """Where the weights came from, and what the user said to read them so."""

    source: str
    sha256: str
    notes: tuple[str, ...] = ()
    variant: str | None = None
    weights: str | None = None


@dataclass(frozen=True, slots=True)
class AttentionRecord:
    """How many attention cores the model has, and how many are fused operators."""

    expected: int
    fused: int
    form: str


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image's worst figures in a check. None: not a number."""

    name: str
    cosine: float | None
    max_abs: float | None


@dataclass(frozen=True, slots=True)
class CheckRecord:
    """What a check measured; figures are those of the worst output. None: not a number.

    ``images`` of the ``given`` ones were run. ``relative``, ``cls`` and ``worst_token`` are errors
    relative to the reference (``msn_export.check.compare.Errors``); ``limits`` says by output what
    they may be, as it was measured on ``limits_from``, and is empty where nothing could be.
    ``twin_error`` is what the candidate's precision costs the reference on these images.
    ``neighbours`` and ``classes`` are the shares of images whose nearest neighbour and whose class
    are the reference's, None where not measured. ``gate`` holds the numbers that had to be reached
    beside the limits. ``skipped`` says by reason how many files of the folder are no pictures that
    can be read.
    """

    images: int
    source: str
    batches: tuple[int, ...]
    max_abs: float | None
    mean_abs: float | None
    cosine_min: float | None
    cosine_p1: float | None
    cosine_median: float | None
    passed: bool
    executed_on: str
    reference: str
    outputs: dict[str, dict[str, float | None]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    neighbours: float | None = None
    classes: float | None = None
    per_image: tuple[ImageRecord, ...] = ()
    gate: dict[str, float] = field(default_factory=dict)
    given: int = 0
    relative: float | None = None
    norm_ratio_min: float | None = None
    norm_ratio_max: float | None = None
    cls: float | None = None
    worst_token: float | None = None
    twin_error: float | None = None
    limits: dict[str, dict[str, float | None]] = field(default_factory=dict)
    limits_from: str = ""
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SumsRecord:
    """What fused attention computes with in the engine, and what that was judged by.

    ``fp16`` are the ONNX nodes whose kernel sums in fp16, ``bf16`` those typed bf16 in the engine
    alone. ``scores`` and ``sums`` are the largest absolute score and unnormalised sum of values of
    those in ``fp16`` in the CPU's emulation of the kernel (None: not finite), ``check`` what came
    of it; None where it was not emulated.
    """

    fp16: tuple[str, ...] = ()
    bf16: tuple[str, ...] = ()
    scores: dict[str, float | None] = field(default_factory=dict)
    sums: dict[str, float | None] = field(default_factory=dict)
    check: CheckRecord | None = None


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What a compiled engine is made of, and whether it has run.

    ``later`` says that it is for GPUs after the last of ``compute_capabilities`` too.
    ``accumulators`` counts the fused attention kernels by what they sum in: fp16, fp32, int32, or
    unknown where the engine does not tell.
    """

    backend: str
    version: str
    compute_capabilities: tuple[str, ...]
    precision: str
    kernels: int
    kernels_per_block: dict[str, int]
    fused_attention: int
    gemm_dtypes: dict[str, int]
    executed: bool
    reason: str
    later: bool = False
    quantised_products: int = 0
    accumulators: dict[str, int] = field(default_factory=dict)
    census: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    check: CheckRecord | None = None
    attention: SumsRecord | None = None

    def __post_init__(self) -> None:
        _ = self.targets  # a manifest that names no generation is refused where it is read

    @property
    def targets(self) -> Targets:
        """The GPU generations it is for."""
        return Targets(tuple(map(ComputeCapability.parse, self.compute_capabilities)), self.later)


@dataclass(frozen=True, slots=True)
class GoldenRecord:
    """A seeded input as a recipe, and what the reference made of it (``msn_export.golden``).

    ``shape`` is that of the pixels [b, h, w, c]; ``values`` are float32 [b, dim], little endian,
    in base64: the output called ``output``, of tokens [b, n, dim] the first. ``limit`` is what the
    relative error of a machine may be; None where nothing was checked.
    """

    generator: str
    seed: int
    shape: tuple[int, ...]
    output: str
    dim: int
    values: str
    reference: str
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class SourceRecord:
    """The file an artifact was made from."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class QuantizationRecord:
    """How a graph was quantised, what it costs and what it saves.

    Shares are from 0 to 1, sizes in bytes. ``kept`` names the blocks that stay in ``base`` with
    why; ``drift`` is the relative error of the embedding with one block quantised at a time, where
    that was measured. ``twin`` is the same graph in ``base``, ``compiled`` what TensorRT made of
    both, or why it did not.
    """

    format: str
    base: str
    observer: str
    smoothing: float | None
    smoothing_errors: dict[str, float]
    attention: bool
    bias_correction: bool
    products: int
    expected: int
    kept: dict[str, str]
    drift: dict[str, float]
    calibration_images: int
    held_out: tuple[str, ...]
    seed: int
    limit: int
    ranges: SourceRecord
    sizes: dict[str, int]
    twin: CheckRecord
    neighbours: dict[str, float | None]
    classes: dict[str, float | None]
    compiled: dict[str, Any]
    latency: dict[str, Any]
    worthwhile: bool
    verdict: str
