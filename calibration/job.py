"""What ``msn-export calibrate`` was asked for."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from msn_export.artifact import GraphFile
from msn_export.calibration.observers import Observer
from msn_export.calibration.products import Role
from msn_export.calibration.qdq import FORMATS, Scheme
from msn_export.errors import SpecError
from msn_export.metrics.tolerances import Gate, quality_gate
from msn_export.preprocessing import Exif
from msn_export.schema import Count, Index, Job, Within
from msn_export.spec import ComputeCapability, Dtype, Target

AUTO = "auto"
OFF = "off"


@dataclass(frozen=True, slots=True)
class CalibrateJob(Job):
    """Options as the command line names them.

    ``dtype`` is int8 or fp8, ``base`` the type of the rest: fp32 beside int8 is for onnxruntime;
    None chooses by what the graph was exported for, and so does ``target`` None.
    ``smooth`` is ``auto``, ``off``, a strength from 0 to 1, or None: not said, which is ``auto``,
    or what ``ranges`` say. ``capability`` is the GPU generation that the verdict compiles for; None
    is this machine's.
    """

    model: Path
    dtype: Dtype
    images: Path
    output: Path | None = None
    preprocess: str | None = None
    exif: Exif | None = None
    base: Dtype | None = None
    target: Target | None = None
    limit: Count = 512
    seed: Index = 0
    observer: Observer = Observer.MSE
    ranges: Path | None = None
    smooth: Literal["auto", "off"] | Annotated[float, Within(0, 1)] | None = None
    quantize_attention: bool = False
    quantize_patch: bool = False
    quantize_head: bool = False
    bias_correction: bool = False
    gate_cosine: Annotated[float, Within(0, 1)] | None = None
    compile: bool = True
    capability: ComputeCapability | None = None
    force: bool = False
    command: str = ""

    def require_consistent(self) -> None:
        """Refuse a format that is none of 8 bits, and a base that is one."""
        for name, dtype, quantised in (("dtype", self.dtype, True), ("base", self.base, False)):
            if dtype is not None and dtype.is_quantised is not quantised:
                wanted = " or ".join(one for one in Dtype if one.is_quantised is quantised)
                raise SpecError(f"CalibrateJob.{name} is {dtype}; expected {wanted}")

    @property
    def gate(self) -> Gate:
        """What the quantised graph must reach: that of its format, or what was asked for."""
        return quality_gate(self.dtype, self.gate_cosine)

    @property
    def scheme(self) -> Scheme:
        """The 8-bit format, the type of the rest, and what the graph is for."""
        return Scheme(FORMATS[self.dtype], self.rest, runs_on=self.target)

    @property
    def rest(self) -> Dtype:
        """The type of all that is not 8-bit, once it is decided."""
        assert self.base is not None, "run_calibrate decides it"
        return self.base

    @property
    def extra(self) -> tuple[Role, ...]:
        """What is quantised besides the blocks' projections."""
        asked = ((Role.PATCH, self.quantize_patch), (Role.HEAD, self.quantize_head))
        return tuple(role for role, wanted in asked if wanted)


def settled(job: CalibrateJob, source: GraphFile) -> CalibrateJob:
    """Choose the type of the rest, and what the result is for, by what the graph is.

    A graph of opset 17 stays one: its Q/DQ take fp32 scales only, so the rest is fp32, which trt
    types itself. Another tool's of an older opset does too, unless a half precision is asked for.

    Raises:
        SpecError: opset 17 has no such format or no such type of scales.
    """
    known = source.manifest.target if source.manifest is not None else None
    target = job.target or next((one for one in Target if one == known), None)
    if target is Target.TENSORRT_8:
        _require_opset_17(job)
    elif target is None and source.opset < _HALF_SCALES and job.dtype is Dtype.INT8:
        target = Target.TENSORRT_8 if job.base in {None, Dtype.FP32} else None
    on_cpu = target is Target.ONNXRUNTIME and job.dtype is Dtype.INT8
    base = job.base
    if base is None:
        base = Dtype.FP32 if on_cpu or target is Target.TENSORRT_8 else Dtype.FP16
    return replace(job, base=base, target=target if target is Target.TENSORRT_8 else None)


_HALF_SCALES = 19  # onnx.ai operators, QuantizeLinear: the first opset with scales in fp16, and fp8


def _require_opset_17(job: CalibrateJob) -> None:
    if job.dtype is Dtype.FP8:
        raise SpecError(
            f"{job.model} is for {Target.TENSORRT_8}, opset 17, which has no fp8; quantise it to "
            "int8, or export it with --target tensorrt"
        )
    if job.base not in {None, Dtype.FP32}:
        raise SpecError(
            f"{job.model} is for {Target.TENSORRT_8}, opset 17, whose Q/DQ take fp32 scales only: "
            f"--base {job.base} cannot be written; leave it out (trt types the rest itself), or "
            "export the graph with --target tensorrt"
        )
