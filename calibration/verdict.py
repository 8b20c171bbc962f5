"""Cost and benefit of quantising a graph, on images it was not calibrated on."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.artifact import GraphFile
from msn_export.benchmark.results import busy, milliseconds
from msn_export.benchmark.session import time_engines, time_graphs
from msn_export.calibration.images import FEW, Split
from msn_export.calibration.job import CalibrateJob
from msn_export.calibration.search import EVERYTHING, CollectedRanges, Exclusion
from msn_export.engine.build import BuildResult, build_engine
from msn_export.engine.census import ALLOWED, not_multiplied_in
from msn_export.engine.options import (
    Backend,
    BuildSpec,
    BuildStep,
    check_options,
    find_backend,
    require_capable,
)
from msn_export.errors import BuildError, MissingPackageError
from msn_export.files import apart
from msn_export.graph.precision import quantised_products
from msn_export.host import NoDriver, find_driver, physical_cores
from msn_export.metrics.evaluate import Evaluation
from msn_export.progress import Progress
from msn_export.spec import BatchRange, ComputeCapability, Dtype, Head

# Saving less than this of the baseline's bytes is not worth another artifact.
WORTHWHILE = 0.10


@dataclass(frozen=True, slots=True)
class Candidate:
    path: Path
    model: ir.Model
    evaluation: Evaluation
    exclusion: Exclusion = EVERYTHING


def neighbours_of(found: Evaluation) -> float | None:
    """Share of images whose nearest neighbour is the same, of the worst embedding."""
    shares = [one.neighbours for name, one in found.outputs.items() if name != Head.LOGITS.output]
    return min((share for share in shares if share is not None), default=None)


@dataclass(frozen=True, slots=True)
class CostBenefit:
    """Bytes and time of the baseline in ``base``, and of the graph in ``form`` after it.

    Sizes are bytes of the files and, where they were compiled, of the engines. ``latency`` is in
    milliseconds a batch, or the reason why nothing was timed; ``spread`` describes how far that
    can be relied on, and ``noisy`` says that it cannot: then the times decide nothing. ``faults``
    are what the compiled engine should be and is not.
    """

    base: str
    form: str
    file: tuple[int, int]
    engine: tuple[int, int] | None
    latency: tuple[float, float] | str
    faults: tuple[str, ...] = ()
    spread: str = ""
    noisy: bool = False

    @property
    def size_share(self) -> float:
        baseline, quantised = self.engine or self.file
        return quantised / baseline

    @property
    def worthwhile(self) -> bool:
        """Bytes are gained, and no time is lost where that was measured on an idle machine.

        A kernel that was taken apart, or multiplies in another type, loses time on any GPU.
        """
        faster = self.noisy or isinstance(self.latency, str) or self.latency[1] < self.latency[0]
        return self.size_share <= 1 - WORTHWHILE and faster and not self.faults


def summary(
    benefit: CostBenefit,
    quantised: Evaluation,
    baseline: Evaluation,
    *,
    kept: int,
    depth: int,
    calibrated: int,
) -> str:
    """Summarise what quantising saved and cost; ``calibrated`` counts images."""
    what = "engine" if benefit.engine else "file"
    share = benefit.size_share
    change = f"{1 - share:.0%} smaller" if share <= 1 else f"{share - 1:.0%} larger"
    saved = f"the {benefit.form} {what} is {change} than the {benefit.base} one"
    cost = "; ".join(
        f"{what} {_figure(getattr(quantised.check, name), form)} "
        f"({benefit.base}: {_figure(getattr(baseline.check, name), form)})"
        for what, name, form in (
            ("relative error", "relative", ".2%"),
            ("p1 cosine", "cosine_p1", ".5f"),
        )
    )
    shares = [
        f"{share:.0%} of {named} agree"
        for share, named in (
            (neighbours_of(quantised), "neighbours"),
            (quantised.check.classes, "classes"),
        )
        if share is not None
    ]
    if quantised.accuracy is not None:
        found, beside = quantised.accuracy, baseline.accuracy
        also = "" if beside is None else f"{benefit.base}: {beside.candidate.top1:.1%}, "
        shares.append(
            f"accuracy {found.candidate.top1:.1%} ({also}fp32: {found.reference.top1:.1%}; "
            f"{found.conclusion})"
        )
    if kept:
        shares.append(f"{kept} of {depth} blocks kept in {benefit.base}")
    if calibrated < FEW:
        shares.append(f"only {calibrated} images were calibrated on")
    detail = "; ".join([cost, *shares, *benefit.faults, _times(benefit)])
    if not benefit.worthwhile:
        return f"keep {benefit.base}: {saved}; {detail}"
    return f"{saved}; {detail}"


def _times(benefit: CostBenefit) -> str:
    if isinstance(benefit.latency, str):
        return f"time not measured: {benefit.latency}"
    before, after = benefit.latency
    spread = f"; {benefit.spread}" if benefit.spread else ""
    times = f"{milliseconds(after)} ms a batch ({benefit.base}: {milliseconds(before)})"
    return f"{times}{spread}"


def _figure(value: float | None, form: str) -> str:
    return "none" if value is None else f"{value:{form}}"


# The first generation with both int8 and fp8 matrix products: compiled for where no GPU is and
# none is named.
_CAPABILITY = ComputeCapability(8, 9)


def require_target(capability: ComputeCapability, dtypes: Sequence[Dtype]) -> None:
    """Refuse, before any work is done, a GPU generation that nothing compiles for here."""
    check_options(
        BuildSpec(Path(), (BatchRange(),), (capability,)), find_backend("auto"), find_driver()
    )
    require_capable({dtype.upper() for dtype in dtypes}, (capability,))


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Results of a calibration: the quantised graph, and its baseline in the base type.

    ``notes`` are those on labelled pictures. ``load`` is the load average before any work began.
    """

    source: GraphFile
    images: Split
    collected: CollectedRanges
    chosen: Candidate
    baseline: Candidate
    notes: tuple[str, ...] = ()
    load: float = 0.0


def measure(
    done: Calibrated, job: CalibrateJob, stage: Path, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    if not job.compile:
        reason = {"reason": "not asked for (--no-compile)"}
        return reason, reason
    if job.rest is Dtype.FP32:
        with progress.step("time both in onnxruntime"):
            paths = {str(job.rest): done.baseline.path, str(job.dtype): done.chosen.path}
            latency = time_graphs(paths, _batch(done), str(job.rest))
        return {"reason": f"{job.dtype} beside fp32 is for onnxruntime"}, _loaded(done, latency)
    stage = apart(stage)
    with progress.step("compile both and count kernels"):
        compiled = _compile(done, job, stage)
    if "reason" in compiled:
        return compiled, compiled
    with progress.step("time both, where a GPU is"):
        engines = {name: stage / f"{name}.engine" for name in (str(job.rest), str(job.dtype))}
        return compiled, _loaded(done, time_engines(engines, _batch(done), str(job.rest)))


def _loaded(done: Calibrated, latency: dict[str, Any]) -> dict[str, Any]:
    """Add the load of other processes, and mark times that it makes unusable."""
    if "reason" in latency:
        return latency
    noisy = latency.get("noisy") or busy(done.load, physical_cores())
    return {**latency, "load": done.load, "noisy": noisy}


def _compile(done: Calibrated, job: CalibrateJob, stage: Path) -> dict[str, Any]:
    """Compile both graphs into ``stage`` and count their kernels.

    For the GPU generation asked for, else this machine's, so that the engines can be timed. By
    name: kernels, fused attention, products by dtype, how many multiply in 8 bits, and the
    engine's bytes; and ``compiler``. Or ``reason``, where nothing compiles here.
    """
    try:
        backend = find_backend("auto")
        compiled: dict[str, Any] = {"compiler": f"{backend}"}
        capabilities: tuple[ComputeCapability, ...] = ()
        if backend.row.targets_capabilities:
            driver = find_driver()
            own = _CAPABILITY if isinstance(driver, NoDriver) else driver.devices[0].capability
            capabilities = (job.capability or own,)
            compiled["compiler"] += f" for SM {capabilities[0]}"
        sides = {job.rest: done.baseline, job.dtype: done.chosen}
        specs = [
            BuildSpec(graph.path, (done.source.batch,), capabilities, precision=dtype)
            for dtype, graph in sides.items()
        ]
        found = _build_together(specs, backend, stage)
        for (dtype, graph), built in zip(sides.items(), found, strict=True):
            products = quantised_products(graph.model)
            census = built.census
            wrong = not_multiplied_in(census, ALLOWED[dtype][0], products)
            compiled[str(dtype)] = {
                "kernels": len(census.kernels),
                "fused_attention": len(census.fused_attention),
                "gemm_dtypes": census.gemm_dtypes,
                "products": len(products),
                "multiplied": len(products) - len(wrong),
                "bytes": built.bytes,
            }
    except (BuildError, MissingPackageError) as error:
        return {"reason": f"not compiled: {error}"}
    return compiled


def _build_together(specs: Sequence[BuildSpec], backend: Backend, stage: Path) -> list[BuildResult]:
    """Build engines at the same time, each in its process: the compiler has one thread.

    One after the other where the compiler times kernels on the GPU. Where one fails or this is
    interrupted, the compilers of the others end too.
    """
    ended = Event()

    def build(spec: BuildSpec) -> BuildResult:
        return build_engine(spec, backend, stage / f"{spec.precision}.engine", progress=go_on)

    def go_on(_step: BuildStep) -> None:
        if ended.is_set():
            raise BuildError("another build failed")

    with ThreadPoolExecutor(len(specs) if backend.row.targets_capabilities else 1) as pool:
        try:
            return list(pool.map(build, specs))
        except BaseException:
            ended.set()
            raise


def _batch(done: Calibrated) -> NDArray[Any]:
    probe = done.collected.probe.images
    return probe[np.arange(done.source.batch.opt) % len(probe)]
