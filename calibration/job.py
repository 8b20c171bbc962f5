"""Options of ``msn-export calibrate``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from msn_export import options
from msn_export.errors import SpecError
from msn_export.options import DTYPES, Opt
from msn_export.schema import Count, Index, Job, Within
from msn_export.spec import ComputeCapability, Dtype, Observer, Target

if TYPE_CHECKING:
    from msn_export.artifact import GraphFile
    from msn_export.calibration.qdq import Role, Scheme
    from msn_export.metrics.tolerances import Gate

AUTO = "auto"
OFF = "off"


def _strength(text: str) -> str | float:
    if text in {AUTO, OFF}:
        return text
    strength = float(text)
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {text} is not from 0 to 1")
    return strength


@dataclass(frozen=True, slots=True)
class CalibrateJob(Job):
    """Options as the command line names them.

    ``dtype`` is int8 or fp8, ``base`` the type of the rest: fp32 beside int8 is for onnxruntime;
    None chooses by what the graph was exported for, and so does ``target`` None. ``smooth`` None
    is ``auto``, or what ``ranges`` say.
    """

    model: Path
    dtype: Annotated[
        Dtype,
        Opt(
            each={
                "int8": "8-bit integers, 127 even steps.",
                "fp8": "8-bit floats (E4M3), for SM 8.9 and later.",
            }
        ),
    ]
    images: Annotated[Path, Opt("Pictures like those to come.", exists=True)]
    output: options.Output = None
    labelled: options.LabelledPictures = None
    accuracy_drop: options.AccuracyDrop = 0.0
    preprocess: options.Preprocess = None
    exif: options.Exif = None
    limit: Annotated[
        Count, Opt("Images to calibrate on at most; one in four is held out besides.")
    ] = 512
    seed: Annotated[Index, Opt("Which images.")] = 0
    observer: Annotated[Observer, Opt("How a range is chosen from what was seen.")] = Observer.MSE
    ranges: Annotated[
        Path | None, Opt("Ranges taken before, a .ranges.json, instead of taking them again.")
    ] = None
    smooth: Annotated[
        Literal["auto", "off"] | Annotated[float, Within(0, 1)] | None,
        Opt(
            "Move channel outliers into the weights; default auto, by the error of each product.",
            read=_strength,
            form="auto|0..1|off",
        ),
    ] = None
    quantize_attention: Annotated[bool, Opt("Attention's own products too.")] = False
    quantize_patch: Annotated[bool, Opt("The patch convolution too.")] = False
    quantize_head: Annotated[bool, Opt("The classifier too.")] = False
    bias_correction: Annotated[bool, Opt("Take the mean error out of the biases.")] = False
    base: Annotated[
        Dtype | None,
        Opt(
            "The type of all that is not 8-bit; auto: fp32 for int8 graphs of --target onnxruntime"
            " and portable, else fp16.",
            words=DTYPES,
            none="auto",
        ),
    ] = None
    gate_cosine: Annotated[
        Annotated[float, Within(0, 1)] | None,
        Opt(
            "First-percentile cosine with the fp32 graph on held-out images; blocks stay until"
            " then. Default: the gate of the format, docs/tolerances.md."
        ),
    ] = None
    capability: Annotated[
        ComputeCapability | None,
        Opt(
            "GPU generation to compile for, to count kernels. Default: this machine's, else 8.9.",
            "--compute-capability",
        ),
    ] = None
    compile: Annotated[bool, Opt("Do not compile it to count kernels; time nothing.")] = True
    force: options.Force = False
    target: Target | None = None
    command: str = ""

    def require_consistent(self) -> None:
        for name, dtype, quantised in (("dtype", self.dtype, True), ("base", self.base, False)):
            if dtype is not None and dtype.is_quantised is not quantised:
                wanted = " or ".join(one for one in Dtype if one.is_quantised is quantised)
                raise SpecError(f"CalibrateJob.{name} is {dtype}; expected {wanted}")

    @property
    def gate(self) -> Gate:
        from msn_export.metrics.tolerances import quality_gate

        return quality_gate(self.dtype, self.gate_cosine)

    @property
    def scheme(self) -> Scheme:
        from msn_export.calibration.qdq import FORMATS, Scheme

        return Scheme(FORMATS[self.dtype], self.rest, runs_on=self.target)

    @property
    def rest(self) -> Dtype:
        """The type of all that is not 8-bit, once it is decided."""
        assert self.base is not None, "run_calibrate decides it"
        return self.base

    @property
    def extra(self) -> tuple[Role, ...]:
        from msn_export.calibration.qdq import Role

        asked = ((Role.PATCH, self.quantize_patch), (Role.HEAD, self.quantize_head))
        return tuple(role for role, wanted in asked if wanted)


def settled(job: CalibrateJob, source: GraphFile) -> CalibrateJob:
    """Choose the type of the rest, and what the result is for, by what the graph is.

    A graph of opset 17 stays one: its Q/DQ take fp32 scales only, so the rest is fp32, which trt
    types itself. Another tool's of an older opset does too, unless a half precision is asked for.
    """
    stated = source.stated
    target = job.target or (Target.of(stated.target) if stated is not None else None)
    if target is Target.PORTABLE:
        _require_opset_17(job)
    elif target is None and source.opset < _HALF_SCALES and job.dtype is Dtype.INT8:
        target = Target.PORTABLE if job.base in {None, Dtype.FP32} else None
    on_cpu = target is Target.ONNXRUNTIME and job.dtype is Dtype.INT8
    base = job.base
    if base is None:
        base = Dtype.FP32 if on_cpu or target is Target.PORTABLE else Dtype.FP16
    return replace(job, base=base, target=target if target is Target.PORTABLE else None)


_HALF_SCALES = 19  # onnx.ai operators, QuantizeLinear: the first opset with scales in fp16, and fp8


def _require_opset_17(job: CalibrateJob) -> None:
    if job.dtype is Dtype.FP8:
        raise SpecError(
            f"{job.model} is for {Target.PORTABLE}, opset 17, which has no fp8; quantise it to "
            "int8, or export it with --target tensorrt"
        )
    if job.base not in {None, Dtype.FP32}:
        raise SpecError(
            f"{job.model} is for {Target.PORTABLE}, opset 17, whose Q/DQ take fp32 scales only: "
            f"--base {job.base} cannot be written; leave it out (trt types the rest itself), or "
            "export the graph with --target tensorrt"
        )
