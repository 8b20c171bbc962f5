"""The contents of a report: each artifact, each comparison, and the page around them."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from msn_export import images
from msn_export.artifact import Artifact
from msn_export.benchmark.results import Bench
from msn_export.compare.drift import Drift
from msn_export.compare.inspection import Inspection, inspect_artifact
from msn_export.compare.sides import Validation
from msn_export.engine.census import Census
from msn_export.engine.kernels import (
    Kernel,
    gemm_dtype,
    is_convolution,
    is_fused_attention,
    is_gemm,
    is_layout_only,
)
from msn_export.errors import GraphError, ImageError
from msn_export.graph.summary import BlockPrecision, precision_map
from msn_export.manifest import CheckRecord, ImageRecord, Manifest
from msn_export.metrics.evaluate import Evaluation
from msn_export.metrics.metrics import embedding_of, nearest
from msn_export.metrics.tolerances import GATES
from msn_export.preprocessing import Preprocessing
from msn_export.reporting.describe import counted_by, gate_words, short, significant
from msn_export.schema import Result, from_plain

State = Literal["passed", "partial", "failed"]
VerdictWord = Literal[
    "passed", "failed", "compiled, not run", "not checked", "not believed", "stale", "reference"
]
WORST = 3  # images shown of each comparison
SIDE = 144  # pixels: shown at half of that, sharp on dense screens, some 6 kB each


@dataclass(frozen=True, slots=True)
class ReportedArtifact:
    """One artifact: what is in its file, and what its manifest says where that is believed.

    ``distrusted`` says why it is not, ``grid`` what the parts of a graph's blocks compute in;
    ``census`` are an engine's kernels.
    """

    inspection: Inspection
    verdict: VerdictWord
    manifest: Manifest | None = None
    grid: tuple[BlockPrecision, ...] = ()
    census: Census | None = None
    distrusted: str | None = None

    @property
    def name(self) -> str:
        """The file's name, or the checkpoint's."""
        return self.inspection.file

    @property
    def is_file(self) -> bool:
        """True of an exported file; a checkpoint is compared with, and not taken apart."""
        return self.inspection.kind != "checkpoint"

    @property
    def is_fitted(self) -> bool:
        """True if its classifier was fitted by this product."""
        return self.manifest is not None and self.manifest.fit is not None

    @property
    def executed(self) -> str:
        """The word for an engine that ran, or the reason why it did not."""
        engine = self.manifest.engine if self.manifest is not None else None
        assert engine is not None  # asked of engines alone
        return "executed" if engine.executed else engine.reason


@dataclass(frozen=True, slots=True)
class PageImage:
    """A picture as a data URI."""

    name: str
    uri: str


@dataclass(frozen=True, slots=True)
class Worst:
    """One of the images that agree least.

    ``pictures`` are the image, its nearest neighbour in the reference and that in the candidate.
    """

    record: ImageRecord
    pictures: tuple[PageImage, PageImage, PageImage]

    @property
    def same(self) -> bool:
        return self.pictures[1].name == self.pictures[2].name


@dataclass(frozen=True, slots=True)
class ReportedAgreement:
    """A comparison that ran for this report, or without ``validation`` what a manifest has.

    ``worst`` are the images that agree least of the first ``looked_at``.
    """

    candidate: str
    reference: str
    check: CheckRecord
    gate: str
    validation: Validation | None = None
    worst: tuple[Worst, ...] = ()
    looked_at: int = 0

    @property
    def passed(self) -> bool:
        return self.check.passed if self.validation is None else self.validation.passed


@dataclass(frozen=True, slots=True, repr=False)
class Page(Result):
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
    artifacts: tuple[ReportedArtifact, ...]
    agreements: tuple[ReportedAgreement, ...]
    drifts: tuple[Drift, ...]
    latency: Bench | None
    notes: tuple[str, ...]


def report_checkpoint(name: str) -> ReportedArtifact:
    return ReportedArtifact(
        Inspection(name, "checkpoint", 0, "", "", "PyTorch", precision="fp32"), "reference"
    )


def report_file(artifact: Artifact, live: bool | None) -> ReportedArtifact:
    """Read an exported file; ``live`` is the verdict of a comparison that ran just now."""
    manifest = artifact.manifest
    grid: tuple[BlockPrecision, ...] = ()
    if artifact.kind == "onnx":
        with suppress(GraphError):
            grid = precision_map(artifact.stream)
    recorded = manifest.engine.census if manifest is not None and manifest.engine else None
    return ReportedArtifact(
        inspect_artifact(artifact),
        "not believed" if artifact.distrusted else _verdict(manifest, live),
        manifest,
        grid,
        from_plain(Census, recorded[0], "census")
        if isinstance(recorded, list) and recorded
        else None,
        artifact.distrusted,
    )


def _verdict(manifest: Manifest | None, live: bool | None) -> VerdictWord:
    check = manifest.check if manifest is not None else None
    passed = live if live is not None else check.passed if check is not None else None
    if passed is False:
        return "failed"
    if manifest is not None and manifest.engine is not None and live is None:
        return "passed" if manifest.engine.executed and passed else "compiled, not run"
    return "not checked" if passed is None else "passed"


def live_agreement(validation: Validation, ran: Evaluation) -> ReportedAgreement:
    """Show a comparison that ran for the report."""
    return ReportedAgreement(
        short(validation.candidate.name),
        short(validation.reference.name),
        validation.check,
        f"{validation.gate_name}: "
        + gate_words(validation.check, validation.gate.numbers, validation.gate.reason),
        validation,
        _worst(ran),
        len(ran.reference.sample),
    )


def _worst(ran: Evaluation) -> tuple[Worst, ...]:
    """Show the images that agree least with the neighbours that either side finds for them.

    Of a large set the first part, whose pixels are still in memory.
    """
    sample = ran.reference.sample
    if len(sample) < 3:
        return ()
    name = next(iter(ran.vectors))
    theirs = nearest(embedding_of(ran.reference.outputs[name]))
    mine = nearest(ran.vectors[name][: len(sample)])
    records = ran.per_image[: len(sample)]
    cosines = [-2.0 if i.cosine is None else i.cosine for i in records]
    order = np.argsort(np.nan_to_num(cosines, nan=-2.0), kind="stable")[:WORST]

    def shown(index: int) -> PageImage:
        return PageImage(sample.names[index], thumbnail(sample.pixels[index]))

    return tuple(
        Worst(records[i], (shown(i), shown(theirs[i]), shown(mine[i]))) for i in order.tolist()
    )


def thumbnail(pixels: NDArray[np.uint8]) -> str:
    """Make a small JPEG of decoded pixels [h, w, c] as a data URI."""
    from PIL import Image

    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])
    picture.thumbnail((SIDE, SIDE))
    packed = io.BytesIO()
    picture.save(packed, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(packed.getvalue()).decode()}"


def picture_thumbnail(path: Path, preprocessing: Preprocessing) -> str:
    """Show a picture as a model sees it; nothing where it cannot be read any more."""
    try:
        return thumbnail(images.read(path, preprocessing))
    except ImageError:
        return ""


def recorded_agreement(name: str, manifest: Manifest) -> ReportedAgreement:
    """Show the comparison that a manifest holds: what ran when the artifact was made."""
    check = manifest.check
    assert check is not None
    gate = gate_words(check, GATES[manifest.dtype].numbers)
    if manifest.engine is not None and not manifest.engine.executed:
        name = f"typed graph of {name}"  # no engine agrees with anything before it ran
    return ReportedAgreement(
        name, _reference(manifest, check.reference), check, f"{manifest.dtype}: {gate}"
    )


def _reference(manifest: Manifest, named: str) -> str:
    """Name what a manifest's check compared with: a checkpoint's graph, or a graph's engine."""
    if manifest.kind == "onnx" and manifest.checkpoint is not None:
        return f"{manifest.checkpoint.source} in PyTorch"
    return short(named.split(" in ", maxsplit=1)[0])


def verdict(
    artifacts: Sequence[ReportedArtifact], agreements: Sequence[ReportedAgreement]
) -> tuple[State, str]:
    """Sum up in one line: whether all that ran agrees, what did not run or was not checked."""
    failed = [found.candidate for found in agreements if not found.passed]
    foreign = [artifact.name for artifact in artifacts if artifact.verdict == "not believed"]
    stale = [artifact.name for artifact in artifacts if artifact.verdict == "stale"]
    wrong = (
        (failed, "not what the reference is"),
        (foreign, "the manifest is not believed"),
        (stale, "made from another graph or checkpoint than the one here"),
    )
    if failed or foreign or stale:
        return "failed", "; ".join(f"{', '.join(names)}: {what}" for names, what in wrong if names)
    if not agreements:
        return "partial", "Nothing was compared"
    open_ends = []
    for state, ending in (("compiled, not run", "did not run"), ("not checked", "was not checked")):
        names = [artifact.name for artifact in artifacts if artifact.verdict == state]
        open_ends += [f"{', '.join(names)} {ending}"] if names else []
    if open_ends:
        return "partial", "; ".join(["Everything that ran agrees", *open_ends])
    return "passed", "Every artifact agrees with its reference"


def sentences(
    artifacts: Sequence[ReportedArtifact],
    agreements: Sequence[ReportedAgreement],
    drifts: Sequence[Drift],
) -> list[str]:
    """Sum up each comparison and each engine."""
    found_all = []
    for found in agreements:
        check, word = found.check, "agrees" if found.passed else "does not agree"
        cosine = "none" if check.cosine_min is None else f"{check.cosine_min:.7f}"
        parts = [
            f"{found.candidate} {word} with {found.reference} on {check.images} images: "
            f"least cosine {cosine}"
        ]
        if (live := found.validation) is not None:
            parts += filter(None, ("; ".join(live.reasons), live.cause))
        found_all.append(". ".join(parts))
    found_all += [
        f"{short(d.candidate)} parts from {short(d.reference)} at {d.parted}"
        for d in drifts
        if d.parted
    ]
    found_all += [artifact.distrusted for artifact in artifacts if artifact.distrusted]
    found_all += [
        f"{one.name}: {len(one.census.kernels)} kernels, attention fused in "
        f"{len(one.census.fused_attention)} of {one.inspection.attention_expected} blocks, "
        f"matrix products {multiplied(one.census)}; {one.executed}"
        for one in artifacts
        if one.census is not None
    ]
    return found_all


def title_of(manifest: Manifest | None, artifacts: Sequence[ReportedArtifact]) -> str:
    """Name the report after the checkpoint, else after the first artifact."""
    if manifest is not None and manifest.checkpoint is not None:
        return manifest.checkpoint.source
    return artifacts[0].name


def subtitle_of(manifest: Manifest | None) -> str:
    """Describe the shape of ViT-MSN."""
    config = manifest.config if manifest is not None else None
    if config is None:
        return "ViT-MSN"
    return (
        f"ViT-MSN, {config.get('depth')} blocks of {config.get('dim')} with {config.get('heads')} "
        f"heads, images of {_by(config.get('image_size'))} in patches of "
        f"{_by(config.get('patch_size'))}"
    )


def _by(pair: object) -> str:
    return "x".join(map(str, pair)) if isinstance(pair, list) else str(pair)


def now() -> str:
    """Give the time, or SOURCE_DATE_EPOCH (reproducible-builds.org) where that is set."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    at = datetime.fromtimestamp(int(epoch), UTC) if epoch.isdigit() else datetime.now(UTC)
    return at.strftime("%d %B %Y, %H:%M UTC")


def role_of(kernel: Kernel) -> str:
    """Name in the field's words what a kernel does."""
    if is_fused_attention(kernel):
        return "attention"
    if is_convolution(kernel):
        return "convolution"
    if is_gemm(kernel):
        return "matrix product"
    return "layout only" if is_layout_only(kernel) else "norm and element-wise"


def roles(census: Census) -> dict[str, int]:
    """Count kernels by what they do, the most frequent first."""
    return dict(Counter(map(role_of, census.kernels)).most_common())


def multiplied(census: Census, joint: str = " in ") -> str:
    """Count matrix products by what they multiply in."""
    return counted_by({spelled(name): n for name, n in census.gemm_dtypes.items()}, joint)


def strips(census: Census) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Line the kernels up by block, in order of their execution: role, dtype and title of each."""
    lines: dict[int, list[tuple[str, str, str]]] = {}
    for kernel in census.kernels:
        role = role_of(kernel)
        computes = role in {"attention", "convolution", "matrix product"}
        dtype = gemm_dtype(kernel) if computes else (*kernel.outputs, "")[0]
        title = f"{role} in {dtype}: {', '.join(kernel.layers) or kernel.name}"
        block = -1 if kernel.block is None else kernel.block
        lines.setdefault(block, []).append((role, spelled(dtype), title))
    return [("outside" if n < 0 else f"block {n}", lines[n]) for n in sorted(lines)]


# TensorRT's spelling to the project's
_DTYPES = {
    "Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "Int8": "int8", "FP8": "fp8",
    "UInt8": "uint8",
}  # fmt: skip


def spelled(dtype: str) -> str:
    """Give the project's name of a dtype that TensorRT names."""
    return _DTYPES.get(dtype, dtype)


_COLUMNS = (
    "what", "runs in", "precision", "threads", "batch", "median ms", "p90 ms", "p99 ms", "images/s",
    "time / baseline",
)  # fmt: skip


def timing_columns(bench: Bench) -> tuple[str, ...]:
    """Name the columns of ``timing_rows``."""
    return (*_COLUMNS, "cosine min") if bench.timings[0].agreement is not None else _COLUMNS


def timing_rows(bench: Bench) -> Iterator[list[str]]:
    """Lay a benchmark out in cells; a figure that was not measured is an empty one.

    A ratio that is too noisy to be used ends in ``*``.
    """
    contenders = {one.name: one for one in bench.timed}
    for one in bench.timings:
        what = contenders[one.contender]
        # read back where the runtime says it, else the artifact's own
        precision = what.precision or what.dtype or "unknown"
        batch = f"{one.batch}, {one.split}" if one.split else str(one.batch)
        figures = (one.median_ms, one.p90_ms, one.p99_ms, one.images_per_second)
        cosine = one.agreement.cosine_min if one.agreement is not None else None
        cells = [one.contender, what.runs, precision, str(what.threads or ""), batch]
        cells += [significant(x, 4) for x in figures]
        mark = " *" if one.noisy else ""
        cells += [f"{one.ratio.median:.3f} ({one.ratio.q1:.3f} to {one.ratio.q3:.3f}){mark}"]
        cells += ["" if cosine is None else f"{cosine:.8f}"]
        yield cells[: len(timing_columns(bench))]


def timed_on(bench: Bench) -> str:
    """Describe where and when a benchmark ran, and what its ratios are to."""
    where = ", ".join((bench.machine.cpu, *bench.machine.gpus))
    return "; ".join((where, f"times over {bench.baseline}", bench.created))
