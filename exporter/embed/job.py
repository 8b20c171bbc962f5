"""What an embedding run is asked for, and what it tells when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from msn_export.job import Count, Index, Job, Within
from msn_export.preprocessing import Exif, Preprocessing
from msn_export.spec import ImageSize, Scores


@dataclass(frozen=True, slots=True)
class EmbedJob(Job):
    """What ``msn-export embed`` was asked for; None leaves a choice to the model or the machine.

    ``images`` is a folder, or the URI of a bucket. ``threads`` are those an .onnx file computes
    with on a CPU: no number in the rows depends on how many (tests/test_run_embed.py). ``ray`` None
    runs on this machine; else it is a cluster's address, ``local``, or empty for the cluster that
    the command was submitted to.
    """

    model: Path
    images: Path | str
    output: Path
    batch: Count | None = None
    workers: Annotated[int, Within(1, 256)] | None = None
    threads: Count | None = None
    output_name: str | None = None
    providers: tuple[str, ...] = ()
    device: Index | None = None
    trust: bool = False
    preprocess: str | None = None
    exif: Exif | None = None
    image_size: ImageSize | None = None
    check: bool = True
    resume: bool = False
    force: bool = False
    ray: str | None = None
    actors: Count | None = None


@dataclass(frozen=True, slots=True)
class Embedded:
    """What was written.

    ``turned`` counts the pictures that their EXIF orientation turned, ``skipped`` by reason what
    the folder holds besides pictures that can be read. ``scores`` says what a classifier's logits
    became. ``images_per_second`` is of the rows that this run made.
    """

    output: str
    files: tuple[str, ...]
    shape: tuple[int, ...]
    output_name: str
    scores: Scores | None
    images: int
    broken: int
    exif: Exif
    turned: int
    skipped: dict[str, int]
    errors: tuple[str, ...]
    resumed_at: int
    runner: str
    cluster: str | None
    batch: int
    workers: int
    preprocessing: Preprocessing
    selftest: str
    notes: tuple[str, ...]
    seconds: float
    images_per_second: float
    peak_rss_bytes: int
