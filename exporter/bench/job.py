"""What ``msn-export bench`` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from msn_export.errors import SpecError
from msn_export.job import Count, Index, Job
from msn_export.preprocessing import Exif
from msn_export.spec import Dtype, ImageSize

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
