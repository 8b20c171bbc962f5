"""What a report shows: plain values, put together by ``msn_export.commands.report``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from msn_export.manifest import CheckRecord

State = Literal["passed", "partial", "failed"]
VerdictWord = Literal[
    "passed", "failed", "compiled, not run", "not checked", "not believed", "stale", "reference"
]


@dataclass(frozen=True, slots=True)
class Grid:
    """The dtype each part of each block computes in."""

    parts: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True, slots=True)
class Chip:
    """One kernel: what it does, what it computes in, and which ONNX nodes it is made of."""

    role: str
    dtype: str
    title: str


@dataclass(frozen=True, slots=True)
class EngineRow:
    """What a compiled engine is made of; ``strips`` are its kernels in order, block by block."""

    kernels: int
    fused: int
    blocks: int
    products: Mapping[str, int]
    kinds: Mapping[str, int]
    per_block: Mapping[str, int]
    layout_only: int
    closed: int
    weight_bytes: Mapping[str, int]
    strips: tuple[tuple[str, tuple[Chip, ...]], ...]
    built_for: str
    executed: str


@dataclass(frozen=True, slots=True)
class ArtifactRow:
    """One artifact: ``rows`` say what it is, ``islands`` what stays fp32 with its maximum.

    ``distrusted`` says why what its manifest says is not believed, where that is so.
    """

    name: str
    kind: str
    precision: str
    bytes: int | None
    weight_bytes: int | None
    sha256: str
    runs_on: str
    fused: str
    verdict: VerdictWord
    rows: tuple[tuple[str, str], ...]
    command: str = ""
    grid: Grid | None = None
    engine: EngineRow | None = None
    islands: Mapping[str, float | None] = field(default_factory=dict)
    distrusted: str | None = None


@dataclass(frozen=True, slots=True)
class PageImage:
    """A picture as a data URI."""

    name: str
    uri: str


@dataclass(frozen=True, slots=True)
class Worst:
    """One of the images that agree least, with its nearest neighbour on either side."""

    picture: PageImage
    cosine: float | None
    max_abs: float | None
    reference_neighbour: PageImage
    candidate_neighbour: PageImage

    @property
    def same(self) -> bool:
        """Whether both sides find the same neighbour."""
        return self.reference_neighbour.name == self.candidate_neighbour.name


@dataclass(frozen=True, slots=True)
class AgreementRow:
    """A comparison: ``live`` says that it ran for this report, else a manifest has it."""

    candidate: str
    reference: str
    live: bool
    passed: bool
    check: CheckRecord
    gate: str
    reasons: tuple[str, ...] = ()
    cause: str | None = None
    notes: tuple[str, ...] = ()
    worst: tuple[Worst, ...] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the residual stream, or a tensor inside a block.

    ``own`` is the relative error the stage makes by itself, and ``allowed`` what it may be; None of
    a tensor inside a block.
    """

    name: str
    cosine: float
    relative: float
    max_abs: float
    largest: float
    allowed: float | None = None
    own: float | None = None
    headroom: float | None = None
    peak_tensor: str = ""


@dataclass(frozen=True, slots=True)
class DriftRow:
    """A candidate block by block; below a headroom of ``needed`` a value is kept in fp32."""

    candidate: str
    reference: str
    sentence: str
    parted: str | None
    stages: tuple[Stage, ...]
    suspect: str | None
    inside: tuple[Stage, ...]
    needed: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Latency:
    """A benchmark's rows, its columns as the benchmark names them."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bars: tuple[tuple[str, float], ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    written: str
    product: str
    command: str
    state: State
    headline: str
    sentences: tuple[str, ...]
    origin: tuple[tuple[str, str], ...]
    artifacts: tuple[ArtifactRow, ...]
    agreements: tuple[AgreementRow, ...]
    drifts: tuple[DriftRow, ...]
    latency: Latency | None
    notes: tuple[str, ...]
    plots: Mapping[str, Any] = field(default_factory=dict)
