"""What ``msn-export calibrate`` was asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msn_export import manifest
from msn_export.calibration.formats import FORMATS
from msn_export.calibration.observers import Observer
from msn_export.calibration.projections import Role
from msn_export.calibration.qdq import Scheme
from msn_export.check.gate import Gate, quality_gate
from msn_export.errors import SpecError
from msn_export.job import Count, Index, Job, Within
from msn_export.preprocessing import Exif
from msn_export.spec import ComputeCapability, Dtype, Target

AUTO = "auto"
OFF = "off"


def base_for(model: Path, dtype: Dtype) -> Dtype:
    """Choose the type of the rest by what the graph was exported for.

    Raises:
        ManifestError: the graph's manifest is malformed.
    """
    known = manifest.read(model) if dtype is Dtype.INT8 else None
    on_cpu = known is not None and known.target == Target.ONNXRUNTIME
    return Dtype.FP32 if on_cpu else Dtype.FP16


@dataclass(frozen=True, slots=True)
class CalibrateJob(Job):
    """Options as the command line names them.

    ``dtype`` is int8 or fp8, ``base`` the type of the rest: fp32 beside int8 is for onnxruntime;
    None chooses by what the graph was exported for.
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
        """The 8-bit format and the type of the rest."""
        return Scheme(FORMATS[self.dtype], self.rest)

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
