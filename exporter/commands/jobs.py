"""What the commands are asked for. It loads no torch, so that a mistake is told at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from msn_export.errors import SpecError
from msn_export.files import require_writable
from msn_export.manifest import manifest_path
from msn_export.models.named import WEIGHTS, Choices, files_of, kind_of
from msn_export.preprocessing import Exif
from msn_export.processor_config import require_choice
from msn_export.schema import Count, Index, Job, Within
from msn_export.spec import (
    BatchRange,
    ComputeCapability,
    Dtype,
    Head,
    ImageSize,
    InputFormat,
    Target,
)

FIRST_BF16 = 22  # the first opset whose Conv takes bfloat16: onnx/onnx docs/Changelog.md, Conv-22


@dataclass(frozen=True, slots=True)
class OnnxJob(Job):
    """Options as the command line names them."""

    checkpoint: str
    output: Path | None = None
    variant: str | None = None
    weights: str | None = None
    labels: Path | None = None
    heads: tuple[Head, ...] = ()
    input_format: InputFormat = InputFormat.FLOAT
    dtype: Dtype = Dtype.FP32
    batch: BatchRange = BatchRange()
    image_size: ImageSize | None = None
    target: Target = Target.TENSORRT
    preprocess: str = "auto"
    exif: Exif | None = None
    images: Path | None = None
    islands: str = "measured"
    simplify: bool = True
    check: bool = True
    force: bool = False
    command: str = ""

    @property
    def choices(self) -> Choices:
        """What is said of a checkpoint that does not say it itself, or holds several."""
        return Choices(self.variant, self.weights, self.labels)

    def require_consistent(self) -> None:
        """Refuse 8 bits, which take ranges, bf16 before its opset, and an input only read."""
        if self.input_format is InputFormat.HALF:
            raise SpecError("OnnxJob.input_format is float16; expected float or uint8")
        if self.dtype.is_quantised:
            raise SpecError(
                f"OnnxJob.dtype is {self.dtype}; a CalibrateJob quantises an fp32 graph"
            )
        if self.dtype is Dtype.BF16 and self.target.opset < FIRST_BF16:
            raise SpecError(
                f"bf16 needs opset {FIRST_BF16} and {self.target} is opset {self.target.opset}, "
                "whose convolution has no bf16; take fp16, or another target"
            )

    def judge(self) -> Path:
        """Refuse what cannot be done whatever the checkpoint holds.

        Returns:
            The path of the file to write.

        Raises:
            OutputError: the output exists, or its folder cannot be written.
            CheckpointError: there is no such checkpoint.
            SpecError: there is no such preprocessing.
        """
        output = self.output or self._default_output()
        kind_of(self.checkpoint, self.variant)
        require_choice(self.preprocess)
        outputs = [output, manifest_path(output)]
        sources = [Path(self.checkpoint), *files_of(self.checkpoint)]
        require_writable(outputs, force=self.force, sources=sources)
        return output

    def _default_output(self) -> Path:
        """Name the file after the checkpoint: ``vit-msn-small.onnx`` in the current folder."""
        source = self.checkpoint.rstrip("/").split("@")[0]
        stem = source.split(":")[1] if source.startswith("random:") else Path(source).name
        while stem.endswith(WEIGHTS):  # .pth.tar
            stem = stem.rpartition(".")[0]
        suffix = "" if self.dtype is Dtype.FP32 else f".{self.dtype}"
        return Path(f"{stem or 'model'}{suffix}.onnx")


@dataclass(frozen=True, slots=True)
class TrtJob(Job):
    """What ``msn-export trt`` was asked for; ``precision`` None is as the graph is typed."""

    model: Path
    output: Path | None = None
    precision: Dtype | None = None
    backend: str = "auto"
    capabilities: tuple[ComputeCapability, ...] = ()
    profiles: tuple[BatchRange, ...] = ()
    islands: str = "measured"
    workspace: Count | None = None
    optimization_level: Annotated[int, Within(0, 5)] | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    tf32: bool = False
    timeout: Annotated[float, Within(1)] | None = None
    memory_limit: Count | None = None
    images: Path | None = None
    preprocess: str | None = None
    exif: Exif | None = None
    allow_unfused: bool = False
    allow_fp32: bool = False
    check: bool = True
    bf16_attention: tuple[str, ...] = ()  # nodes to begin with; those that need it are found
    stages: bool = False  # show the residual stream as outputs; for drift, not for production
    log: Path | None = None
    force: bool = False
    command: str = ""


Against = Literal["eager", "sdpa", "compile", "onnxruntime"]
AGAINST: tuple[Against, ...] = get_args(Against)


@dataclass(frozen=True, slots=True)
class BenchJob(Job):
    """What ``msn-export bench`` was asked for; ``seconds`` is for each contender at each batch."""

    artifacts: tuple[Path, ...]
    against: tuple[Against, ...] = ("sdpa",)
    batches: tuple[Count, ...] = (1, 8)
    checkpoint: str | None = None
    variant: str | None = None
    weights: str | None = None
    rounds: Count = 10
    seconds: float = 10.0
    threads: Count | None = None
    images: Path | None = None
    image_size: ImageSize | None = None
    preprocess: str | None = None
    exif: Exif | None = None
    dtype: Dtype | None = None
    device: Index | None = None
    providers: tuple[str, ...] = ()
    trust: bool = False
    resident: bool = False
    cuda_graphs: bool = True
    report: Path | None = None
    force: bool = False
    preset: str | None = None
    command: str = ""

    def require_consistent(self) -> None:
        """Refuse to time nothing."""
        if not self.artifacts or not self.batches:
            raise SpecError("a BenchJob takes at least one artifact and one batch size")
