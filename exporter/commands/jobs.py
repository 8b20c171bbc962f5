"""The options of the commands. They load no torch, so that a mistake is reported at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

from msn_export import options
from msn_export.errors import SpecError
from msn_export.files import require_writable
from msn_export.manifest import manifest_path
from msn_export.models.checkpoint import MEMORY, WEIGHTS, Choices, files_of, kind_of
from msn_export.models.config import LinearClassifier
from msn_export.options import DTYPES, EIGHT_BITS, OUTPUT, Opt
from msn_export.processor_config import require_choice
from msn_export.schema import Count, Job, Within
from msn_export.spec import (
    ENGINES,
    TENSORRT_8,
    BatchRange,
    ComputeCapability,
    Dtype,
    Head,
    ImageSize,
    InputFormat,
    KeptPatches,
    Target,
    parse_bytes,
)
from msn_export.version_table import Client, table


def _target_help() -> str:
    """Name the form of each target, and the first onnxruntime and TensorRT that take it in fp16."""
    lines = []
    for target, form in _FORMS.items():
        row = table()[target][Dtype.FP16]
        runtime, tensorrt = row[Client.ONNXRUNTIME].least, row[Client.TENSORRT].least
        lines.append(f"{target}: {form}; onnxruntime >= {runtime}, TensorRT >= {tensorrt}.")
    return f"{' '.join(lines)} Versions for fp16; {TENSORRT_8} is portable's other name."


_FORMS = {
    Target.TENSORRT: "opset 23, 4-D Attention",
    Target.ONNXRUNTIME: "the same with 3-D Attention",
    Target.PORTABLE: "opset 17, plain attention",
}
TARGETS = (*(target.value for target in Target), TENSORRT_8)
FIRST_BF16 = 22  # the first opset whose Conv takes bfloat16: onnx/onnx docs/Changelog.md, Conv-22
_MEMORY = "4GiB|512MiB|BYTES"
GATE_NUMBERS = {
    "relative": "Largest relative error, of all images and of the worst one; replaces the measured "
    "limit, as --max-abs and --cosine do.",
    "max_abs": "Largest absolute difference, times the reference's RMS where that is above 1.",
    "cosine": "Least cosine: of every image in fp32, else of the first percentile.",
    "cls_cosine": "Least cosine of [CLS], where an output has tokens.",
    "norm_ratio": "Largest distance from 1 of the candidate's norm over the reference's.",
    "neighbours": "Least share of images whose nearest neighbour is the reference's.",
    "classes": "Least share of images whose class is the reference's.",
}


@dataclass(frozen=True, slots=True)
class OnnxJob(Job):
    """Options of ``msn-export onnx``.

    ``classifier`` takes the place of the checkpoint's own; ``pictures`` are those of ``images``
    that the check reads.
    """

    checkpoint: str
    output: options.Output = None
    variant: options.Variant = None
    weights: options.Weights = None
    labels: options.Labels = None
    heads: Annotated[
        tuple[Head, ...],
        Opt("Output; repeatable. Default: logits for a classifier, else cls.", "--head"),
    ] = ()
    blocks: Annotated[
        Count, Opt("Of how many last blocks cls and features hold [CLS], side by side.")
    ] = 1
    normalize: Annotated[bool, Opt("Give the rows of cls, mean and features norm 1.")] = False
    keep_patches: Annotated[
        KeptPatches | None, Opt("Compute a share of the patches only, in a fixed pattern.")
    ] = None
    input_format: Annotated[
        InputFormat,
        Opt("Normalised planes, or bytes [b, h, w, 3].", "--input", words=("float", "uint8")),
    ] = InputFormat.FLOAT
    dtype: Annotated[
        Dtype, Opt("Type of weights and arithmetic.", words=DTYPES, elsewhere=EIGHT_BITS)
    ] = Dtype.FP32
    batch: Annotated[
        BatchRange, Opt("Images at a time: a fixed number, or a range and what it is tuned for.")
    ] = BatchRange()
    image_size: Annotated[
        ImageSize | None,
        Opt(
            "Interpolate the position embedding to this size, in pixels. Default: the checkpoint's."
        ),
    ] = None
    target: Annotated[Target, Opt(_target_help(), words=TARGETS)] = Target.TENSORRT
    preprocess: Annotated[
        str,
        options.preprocess(
            "How its pictures are made; auto: as the checkpoint's own file says, else hf.",
            auto=True,
        ),
    ] = "auto"
    exif: options.Exif = None
    simplify: Annotated[bool, Opt("Keep the graph as it was traced and fused.")] = True
    images: options.Images = None
    islands: options.Islands = "measured"
    check: options.Check = True
    force: options.Force = False
    classifier: LinearClassifier | None = None
    pictures: tuple[Path, ...] = ()
    command: str = ""

    @property
    def choices(self) -> Choices:
        """Choices for a checkpoint that does not make them itself, or holds several."""
        return Choices(self.variant, self.weights, self.labels)

    def require_consistent(self) -> None:
        """Refuse 8 bits, which take ranges, bf16 before its opset, and an input only read."""
        if self.input_format is InputFormat.HALF:
            raise SpecError("OnnxJob.input_format is float16; expected float or uint8")
        if self.dtype.is_quantised:
            raise SpecError(
                f"OnnxJob.dtype is {self.dtype}; a CalibrateJob quantises an fp32 graph"
            )
        if Head.ATTENTION in self.heads and self.target is Target.ONNXRUNTIME:
            raise SpecError(
                f"head attention reads queries and keys, which {self.target}'s packed attention "
                "computes inside; take --target tensorrt, which onnxruntime runs too"
            )
        if self.dtype is Dtype.BF16 and self.target.opset < FIRST_BF16:
            raise SpecError(
                f"bf16 needs opset {FIRST_BF16} and {self.target} is opset {self.target.opset}, "
                "whose convolution has no bf16; take fp16, or another target"
            )

    def validate_paths(self) -> Path:
        """Refuse what cannot be done whatever the checkpoint holds.

        Returns:
            The path of the file to write.
        """
        output = self.output or self._default_output()
        kind_of(self.checkpoint, self.variant)
        require_choice(self.preprocess)
        outputs = [output, manifest_path(output)]
        require_writable(outputs, force=self.force, sources=self._sources())
        return output

    def _sources(self) -> list[Path]:
        return [Path(self.checkpoint), *files_of(self.checkpoint)]

    def _default_output(self) -> Path:
        """Name the file after the checkpoint: ``vit-msn-small.onnx`` in the current folder."""
        source = self.checkpoint.rstrip("/").split("@")[0]
        name = source.split(":")[1] if source.startswith(("random:", MEMORY)) else Path(source).name
        while name.endswith(WEIGHTS):  # .pth.tar
            name = name.rpartition(".")[0]
        suffix = "" if self.dtype is Dtype.FP32 else f".{self.dtype}"
        return Path(f"{name or 'model'}{suffix}.onnx")


@dataclass(frozen=True, slots=True)
class TrtJob(Job):
    """Options of ``msn-export trt``; ``precision`` None is as the graph is typed.

    ``bf16_attention`` names nodes to begin with; those that need it are found. ``stages`` shows the
    residual stream as outputs: for drift, not for production.
    """

    model: Path
    output: Annotated[
        Path | None,
        Opt(
            "The .engine file to write (or .plan, .trt). Default: named after MODEL.",
            OUTPUT,
            read=options.ending(*ENGINES),
            panel=options.WRITTEN,
        ),
    ] = None
    precision: Annotated[
        Dtype | None,
        Opt(
            each={
                "fp32": "Arithmetic in fp32. Default of the three: as the graph is typed.",
                "fp16": "Arithmetic in fp16.",
                "bf16": "Arithmetic in bf16, from SM 8.0 on.",
            }
        ),
    ] = None
    backend: Annotated[
        str,
        Opt(
            "The compiler; auto takes TensorRT where it and a GPU are there, else TensorRT-RTX.",
            words=("auto", "tensorrt", "tensorrt-rtx"),
        ),
    ] = "auto"
    capabilities: Annotated[
        tuple[ComputeCapability, ...],
        Opt(
            "GPU generation to compile for, as in 8.9; repeatable (tensorrt-rtx).",
            "--compute-capability",
        ),
    ] = ()
    profiles: Annotated[
        tuple[BatchRange, ...],
        Opt("Repeatable: one profile each. Default: the graph's.", "--batch"),
    ] = ()
    workspace: Annotated[
        Count | None,
        Opt(
            "Scratch memory a kernel may use. Default: the compiler's.",
            read=parse_bytes,
            form=_MEMORY,
            kept=True,
        ),
    ] = None
    optimization_level: Annotated[
        Annotated[int, Within(0, 5)] | None,
        Opt("How long kernels are searched, 0 to 5. Default: the compiler's, 3.", kept=True),
    ] = None
    timing_cache: Annotated[
        Path | None, Opt("Timings of kernels, kept for the next build. Default: the user's own.")
    ] = None
    version_compatible: Annotated[bool, Opt("Loads in the lean runtime of others.", kept=True)] = (
        False
    )
    hardware_compatible: Annotated[
        bool, Opt("For any GPU from Ampere on (tensorrt).", kept=True)
    ] = False
    tf32: Annotated[
        bool, Opt("Let fp32 products round to TF32, 10 bits of mantissa.", kept=True)
    ] = False
    timeout: Annotated[
        Annotated[float, Within(1)] | None,
        Opt(
            "Seconds the compiler may take; all of it for a graph of another tool, default 600.",
            metavar="SECONDS",
        ),
    ] = None
    memory_limit: Annotated[
        Count | None,
        Opt(
            "Resident memory the compiler may take. Default: no limit.",
            read=parse_bytes,
            form=_MEMORY,
        ),
    ] = None
    allow_unfused: Annotated[bool, Opt("Accept attention that is not fused.", kept=True)] = False
    allow_fp32: Annotated[
        bool,
        Opt("Accept fp32 products in a typed graph that its manifest does not declare.", kept=True),
    ] = False
    log: Annotated[
        Path | None, Opt("Write everything TensorRT says here.", panel=options.WRITTEN)
    ] = None
    preprocess: options.Preprocess = None
    exif: options.Exif = None
    images: options.Images = None
    islands: options.Islands = "measured"
    check: options.Check = True
    force: options.Force = False
    bf16_attention: tuple[str, ...] = ()
    stages: bool = False
    command: str = ""


@dataclass(frozen=True, slots=True)
class ValidateJob(Job):
    """Options of ``msn-export validate``.

    ``limit`` None is all pictures. ``exif`` is for both sides. ``gate`` None is that of the coarser
    dtype; ``numbers`` replace some of the gate's.
    """

    reference: str | Path
    candidate: str | Path
    images: options.Images = None
    limit: Annotated[
        Count | None,
        Opt(
            "Pictures that are run.",
            read=options.number_or_all,
            form="N|all",
            panel=options.CHECK,
        ),
    ] = 64  # enough for a first percentile, seconds of a ViT-S on two cores
    labelled: options.LabelledPictures = None
    accuracy_drop: options.AccuracyDrop = 0.0
    batch: Annotated[
        BatchRange | None, Opt("Batch sizes to run. Default: the candidate's own.")
    ] = None
    preprocess: Annotated[
        str | None,
        options.preprocess(
            "How the candidate is fed in production. Default: as its manifest says."
        ),
    ] = None
    exif: options.Exif = None
    variant: options.Variant = None
    weights: options.Weights = None
    labels: options.Labels = None
    gate: Annotated[
        Dtype | None,
        Opt("Whose gate to judge by. Default: the coarser side's dtype.", panel="The gate"),
    ] = None
    numbers: Annotated[
        Mapping[str, Annotated[float, Within(0)]], Opt(each=GATE_NUMBERS, panel="The gate")
    ] = field(default_factory=dict)
    numbers_only: Annotated[
        bool,
        Opt("Judge by outputs alone, not by epsilons and activations the graphs name."),
    ] = False


@dataclass(frozen=True, slots=True)
class DriftJob(Job):
    """Options of ``msn-export drift``; ``seed`` draws the second batch size."""

    reference: str | Path
    candidate: str | Path
    images: options.Images = None
    # the stages of a ViT-S are 4 MB a picture, and one look needs no percentile
    limit: Annotated[Count, Opt("Pictures.")] = 16
    batch: Annotated[Count, Opt("Pictures at a time.")] = 4
    preprocess: Annotated[
        str | None,
        options.preprocess("What makes the pixels both are given. Default: the reference's own."),
    ] = None
    exif: options.Exif = None
    variant: options.Variant = None
    weights: options.Weights = None
    labels: options.Labels = None
    tolerance: Annotated[
        Annotated[float, Within(0)] | None,
        Opt("Relative error from which a block has parted. Default: measured."),
    ] = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ReportJob(Job):
    """Options of ``msn-export report``; the first artifact is the others' reference."""

    artifacts: tuple[str, ...]
    output: Annotated[
        Path, Opt("The page to write.", OUTPUT, read=options.PAGE, panel=options.WRITTEN)
    ] = Path("report.html")
    markdown: Annotated[
        Path | None,
        Opt("Write a model card here too.", read=options.ending(".md"), panel=options.WRITTEN),
    ] = None
    images: Annotated[
        Path | None, Opt("Pictures to run on; without, nothing runs.", exists=True)
    ] = None
    preprocess: options.Preprocess = None
    exif: options.Exif = None
    limit: Annotated[int, Within(3), Opt("Pictures.")] = 64
    labelled: options.LabelledPictures = None
    accuracy_drop: options.AccuracyDrop = 0.0
    bench: Annotated[Path | None, Opt("What 'msn-export bench --json' wrote.")] = None
    variant: options.Variant = None
    weights: options.Weights = None
    labels: options.Labels = None
    title: Annotated[str | None, Opt("Default: the checkpoint's name.")] = None
    force: options.Force = False
    command: str = ""


Against = Literal["eager", "sdpa", "compile", "onnxruntime"]
AGAINST: tuple[Against, ...] = get_args(Against)


# other names of what a graph can be compared with
_RUNTIMES = {"ort": "onnxruntime", "torch": "sdpa", "pytorch": "sdpa"}


def _against(text: str) -> tuple[str, ...]:
    names = options.names(text)
    unknown = [name for name in names if name not in (*AGAINST, "none")]
    if unknown:
        accepted = [*AGAINST, "none"]
        close = difflib.get_close_matches(unknown[0].lower(), accepted, 1)
        nearest = _RUNTIMES.get(unknown[0].lower(), close[0] if close else "")
        offer = f"; did you mean {nearest}?" if nearest else ""
        raise SpecError(f"{unknown[0]!r} is none of {', '.join(accepted)}{offer}")
    return tuple(dict.fromkeys(name for name in names if name != "none"))


@dataclass(frozen=True, slots=True)
class BenchJob(Job):
    """Options of ``msn-export bench``."""

    artifacts: tuple[Path, ...]
    against: Annotated[
        tuple[Against, ...],
        Opt(
            "What to compare with, the first being the measure; or none. Default: sdpa.",
            read=_against,
            form="eager,sdpa,compile,onnxruntime",
        ),
    ] = ("sdpa",)
    batches: Annotated[tuple[Count, ...], Opt("Repeatable. Default: 1, 8.", "--batch")] = (1, 8)
    checkpoint: Annotated[
        str | None,
        Opt("Of the PyTorch model. Default: what the manifest names.", metavar="CHECKPOINT"),
    ] = None
    variant: options.Variant = None
    weights: options.Weights = None
    rounds: Annotated[Count, Opt("Rounds in which each contender takes its turn.")] = 10
    seconds: Annotated[
        float,
        Within(0, above=True),
        Opt(
            "Seconds for each contender at each batch. Slow calls take longer: about 2 x rounds x "
            "call.",
            metavar="SECONDS",
        ),
    ] = 10.0
    threads: Annotated[Count | None, Opt("Threads of each contender. Default: physical cores.")] = (
        None
    )
    dtype: Annotated[
        Dtype | None,
        Opt("Type of PyTorch's model. Default: fp32; on a GPU, as ARTIFACT.", words=DTYPES),
    ] = None
    preset: Annotated[
        str | None,
        Opt("paper: against eager, sdpa at batches 1, 2, 4, 8.", words=("paper",)),
    ] = None
    images: Annotated[Path | None, Opt("Pictures to run; without, seeded noise.", exists=True)] = (
        None
    )
    preprocess: options.Preprocess = None
    exif: options.Exif = None
    image_size: options.OpenSize = None
    resident: Annotated[bool, Opt("GPU: data stays there, copies are not counted.")] = False
    cuda_graphs: Annotated[bool, Opt("Engines: launch kernel by kernel.")] = True
    report: Annotated[
        Path | None, Opt("Write a page with plots here.", read=options.PAGE, panel=options.WRITTEN)
    ] = None
    providers: options.Providers = ()
    precision: options.Precision = None
    device: options.Device = None
    trust: options.Trust = False
    force: options.Force = False
    command: str = ""

    def require_consistent(self) -> None:
        if not self.artifacts or not self.batches:
            raise SpecError("a BenchJob takes at least one artifact and one batch size")


@dataclass(frozen=True, slots=True)
class SearchJob(Job):
    """Arguments of ``msn-export search``; ``model`` None is the index's own, where it was."""

    index: Path
    queries: tuple[Path, ...]
    k: Annotated[Count, Opt("Nearest pictures of each.", "-k")] = 10
    model: Annotated[
        Path | None,
        Opt("The model that the index was made with. Default: where it was.", exists=True),
    ] = None
    output: Annotated[
        Path | None,
        Opt("Write a page of thumbnails here, an .html.", options.OUTPUT, panel=options.WRITTEN),
    ] = None
    providers: options.Providers = ()
    device: options.Device = None
    trust: options.Trust = False
    force: options.Force = False
    command: str = ""

    def require_consistent(self) -> None:
        if not self.queries:
            raise SpecError("a SearchJob takes at least one picture")


@dataclass(frozen=True, slots=True)
class EvaluateJob(Job):
    """Arguments of ``msn-export evaluate``; ``limit`` None is all pictures."""

    model: str | Path
    labelled: Path
    knn: Annotated[
        Count | None,
        Opt("Let this many neighbours vote. Default: 20 for a model without logits.", metavar="K"),
    ] = None
    train: Annotated[
        Path | None,
        Opt("Labelled pictures whose neighbours vote. Default: the others.", exists=True),
    ] = None
    limit: Annotated[
        Count | None,
        Opt("Pictures that are run. Default: all.", read=options.number_or_all, form="N|all"),
    ] = None
    output_name: Annotated[
        str | None,
        Opt(
            "Output whose neighbours vote. Default: embedding, or what comes nearest.",
            metavar="NAME",
        ),
    ] = None
    batch: Annotated[
        Count | None, Opt("Pictures at a time. Default: what the model is tuned for.")
    ] = None
    preprocess: options.Preprocess = None
    exif: options.Exif = None
    image_size: options.OpenSize = None
    variant: options.Variant = None
    weights: options.Weights = None
    labels: options.Labels = None
    report: Annotated[
        Path | None,
        Opt(
            "Write a page with the confusion matrix and wrong pictures here.",
            read=options.PAGE,
            panel=options.WRITTEN,
        ),
    ] = None
    providers: options.Providers = ()
    precision: options.Precision = None
    device: options.Device = None
    trust: options.Trust = False
    force: options.Force = False
    command: str = ""

    @property
    def choices(self) -> Choices:
        return Choices(self.variant, self.weights, self.labels)


@dataclass(frozen=True, slots=True)
class TritonJob(Job):
    """Options of ``msn-export triton``."""

    artifacts: tuple[Path, ...]
    output: Path
    name: Annotated[
        str | None,
        Opt("The model's name. Default: the artifact's, without its ending.", metavar="NAME"),
    ] = None
    version: Annotated[Count, Opt("Number of the model's version.", "--model-version")] = 1
    release: Annotated[
        str | None, Opt("Triton's release. Default: one that fits.", metavar="YY.MM")
    ] = None
    max_batch: Annotated[
        Annotated[int, Within(1, 4096)] | None,
        Opt("Largest batch it forms. Default: the largest profile's."),
    ] = None
    instances: Annotated[int, Within(1, 64), Opt("Copies of the model on each device.")] = 1
    queue_delay: Annotated[
        int,
        Within(0, 1_000_000),
        Opt("Microseconds a request may wait for others.", metavar="MICROSECONDS"),
    ] = 500
    ensemble: Annotated[bool, Opt("Also take bytes, and normalise them in Triton.")] = False
    warmup: Annotated[bool, Opt("Run a picture through each instance first.")] = False
    response_cache: Annotated[bool, Opt("Answer repeated requests from a cache.")] = False
    cuda_graphs: Annotated[bool, Opt("Engines: a GPU variant that captures graphs.")] = False
    images: Annotated[
        Path | None, Opt("Pictures to warm up with; without, noise.", exists=True)
    ] = None
    preprocess: options.Preprocess = None
    exif: options.Exif = None
    force: options.Force = False

    def require_consistent(self) -> None:
        if not self.artifacts:
            raise SpecError("a TritonJob takes at least one artifact")
