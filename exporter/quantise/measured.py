"""What a quantised graph and its twin compile into, and how long each takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msn_export.calibration.pictures import Split
from msn_export.files import apart
from msn_export.graph.quantised import quantised_products
from msn_export.progress import Progress
from msn_export.quantise.compiled import Twin, compile_both, engine_path
from msn_export.quantise.job import CalibrateJob
from msn_export.quantise.latency import time_engines, time_graphs
from msn_export.quantise.ranged import Ranged
from msn_export.quantise.verdict import Candidate
from msn_export.source import Source
from msn_export.spec import Dtype


@dataclass(frozen=True, slots=True)
class Calibrated:
    """All that came of a calibration, the quantised graph and its twin in the base type."""

    source: Source
    dealt: Split
    ranged: Ranged
    chosen: Candidate
    twin: Candidate


def measure(
    done: Calibrated, job: CalibrateJob, stage: Path, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Give what both graphs compile into and how long they take, or the reasons why not."""
    if not job.compile:
        reason = {"reason": "not asked for (--no-compile)"}
        return reason, reason
    if job.rest is Dtype.FP32:
        with progress.step("time both in onnxruntime"):
            paths = {str(job.rest): done.twin.path, str(job.dtype): done.chosen.path}
            latency = time_graphs(paths, _batch(done), str(job.rest))
        return {"reason": f"{job.dtype} beside fp32 is for onnxruntime"}, latency
    stage = apart(stage)
    with progress.step("compile both and count kernels"):
        compiled = _compile(done, job, stage)
    with progress.step("time both, where a GPU is"):
        return compiled, _time(done, job, compiled, stage)


def _compile(done: Calibrated, job: CalibrateJob, stage: Path) -> dict[str, Any]:
    products = quantised_products(done.chosen.model)
    twins = {
        str(job.rest): Twin(done.twin.path, job.rest),
        str(job.dtype): Twin(done.chosen.path, job.dtype, products),
    }
    return compile_both(twins, done.source.batch, stage, job.capability)


def _time(
    done: Calibrated, job: CalibrateJob, compiled: dict[str, Any], stage: Path
) -> dict[str, Any]:
    if "reason" in compiled:
        return compiled
    engines = {str(dtype): engine_path(stage, str(dtype)) for dtype in (job.rest, job.dtype)}
    return time_engines(engines, _batch(done), str(job.rest))


def _batch(done: Calibrated) -> NDArray[Any]:
    """Make a batch of the usual size of what was calibrated on."""
    probe = done.ranged.probe.images
    return probe[np.arange(done.source.batch.opt) % len(probe)]
