"""What ``msn-export trt`` was asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msn_export.job import Count, Job, Within
from msn_export.preprocessing import Exif
from msn_export.spec import BatchRange, ComputeCapability, Dtype


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
