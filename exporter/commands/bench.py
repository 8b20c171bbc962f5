"""The steps of ``msn-export bench``: open contenders, compare outputs, run rounds, sum up."""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from msn_export import __version__
from msn_export.benchmark.contenders import (
    INPUTS,
    TORCH,
    ContenderSpec,
    Placement,
    artifacts,
    source_graphs,
    torch_dtype,
    torch_entry,
)
from msn_export.benchmark.results import (
    Bench,
    Contender,
    Rounds,
    Timing,
    busy,
    figures,
    noise_of,
    ratio_of,
    rotated,
)
from msn_export.benchmark.session import BenchSession, OpenContender, find_reference
from msn_export.commands.jobs import BenchJob
from msn_export.errors import BenchError, MissingPackageError, SpecError
from msn_export.files import move, placing, require_writable, staging
from msn_export.host import (
    NoDriver,
    available_memory,
    device_bytes,
    find_driver,
    physical_cores,
    this_machine,
)
from msn_export.manifest import manifest_path, versions_of
from msn_export.metrics.evaluate import draw
from msn_export.models.checkpoint import Choices
from msn_export.progress import SILENT
from msn_export.spec import InputFormat

if TYPE_CHECKING:
    from msn_export.benchmark.session import BenchReference
    from msn_export.feed import Feed
    from msn_export.metrics.evaluate import Sample
    from msn_export.progress import Progress
    from msn_export.spec import Dtype


__all__ = ["BenchJob", "run_bench"]  # the two that docs/python.md speaks of

PACKAGES = (
    "torch",
    "onnxruntime-gpu",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
)
_GPU = re.compile("cuda|tensorrt", re.IGNORECASE)  # in the name of an execution provider


def run_bench(job: BenchJob, progress: Progress = SILENT) -> Bench:
    """Time artifacts and what they are compared with, interleaved.

    Raises:
        BenchError: an artifact cannot be opened or fails; one of ``against`` is left out instead,
            with the reason in its record.
        SpecError: artifacts take images of different sizes.
        OutputError: the report cannot be written.
        MissingPackageError: the report needs a package that is not there.
    """
    if job.report is not None:
        read = [*job.artifacts, *map(manifest_path, job.artifacts)]
        require_writable([job.report], force=job.force, sources=read)
        _require_page()
    load = round(os.getloadavg()[0], 2)
    where = _where(job)
    with tempfile.TemporaryDirectory(prefix="msn-export-bench-") as folder, ExitStack() as stack:
        choices = Choices(job.variant, job.weights)
        offline = job.checkpoint is None
        session = BenchSession(where, Path(folder), stack, offline=offline, choices=choices)
        for entry in artifacts(job.artifacts, where):
            with progress.step(f"open {entry.name}"):
                session.opened.append(session.start(entry))
        feed = session.agree(job.image_size, job.preprocess, job.exif)
        _require_room(job, feed)
        with progress.step("read images"):
            sample = draw(job.images, feed.preprocessing)
            session.notes += sample.notes
            session.set_images(feed, sample.pixels)
        with progress.step("run the fp32 reference"):
            reference = find_reference(session, job.checkpoint)
        _enter(job, session, progress)
        timings: list[Timing] = []
        for batch in job.batches:
            found = _time_batch(job, session, reference, batch, progress)
            loaded = busy(load, physical_cores())
            timings += [replace(one, noisy=one.noisy or loaded) for one in found]
    bench = _summary(job, session, sample, reference, timings, load)
    if job.report is not None:
        _write_page(bench, job.report, progress, force=job.force)
    return bench


def _require_room(job: BenchJob, feed: Feed) -> None:
    """Refuse batches whose inputs alone do not fit into memory, before anything runs."""
    size, batch = feed.preprocessing.size, max(job.batches)
    number = 1 if feed.input_format is InputFormat.UINT8 else 4  # bytes
    contenders = len(job.artifacts) + len(job.against)
    needed = INPUTS * contenders * batch * 3 * size.height * size.width * number
    free = available_memory()
    if needed > free:
        raise SpecError(
            f"--batch {batch}: the inputs alone take {needed / 2**30:.1f} GiB ({INPUTS} batches "
            f"for each of {contenders} contenders), and {free / 2**30:.1f} GiB are free; choose a "
            "smaller --batch"
        )


def _where(job: BenchJob) -> Placement:
    """Choose one place for all: the GPU asked for, else the first there is, else the CPU."""
    device = job.device
    on_cpu = job.providers and not any(_GPU.search(name) for name in job.providers)
    if device is None and not on_cpu and not isinstance(find_driver(), NoDriver):
        device = 0
    if job.resident and device is None:
        raise SpecError("--resident leaves data on a GPU, and this run is on the CPU")
    threads = job.threads or physical_cores()
    return Placement(
        threads, device, job.providers, job.trust, job.resident, job.cuda_graphs, job.precision
    )


def _enter(job: BenchJob, session: BenchSession, progress: Progress) -> None:
    """Open what the artifacts are compared with; the first that opens is the baseline."""
    dtype = job.dtype or torch_dtype(session.opened[0].entry, session.placement)
    others: list[OpenContender] = []
    for kind in job.against:
        with progress.step(f"open {kind}"):
            try:
                tried = job.batches[0] if kind == "compile" else None
                for entry in _entries(kind, job, session, dtype):
                    others.append(session.start(entry, tried))
            except BenchError as error:
                reason = str(error).removeprefix(f"{kind}: ")
                session.absent.append(Contender(kind, kind, skipped=reason))
    session.opened[:0] = others


def _entries(kind: str, job: BenchJob, session: BenchSession, dtype: Dtype) -> list[ContenderSpec]:
    if kind in TORCH:
        return [torch_entry(kind, session.origin(job.checkpoint), session.placement, dtype)]
    return list(source_graphs([one.entry for one in session.opened], session.placement))


def _time_batch(
    job: BenchJob, session: BenchSession, reference: BenchReference, batch: int, progress: Progress
) -> list[Timing]:
    """Time all contenders at one batch size, after their outputs were compared at it."""
    compared = {}
    with progress.step(f"batch {batch}: compare outputs"):
        for one in session.opened:
            outputs, seconds = session.outputs(one, batch)
            compared[one.name] = (*reference.compare(one.entry, outputs), seconds)
    with progress.step(f"batch {batch}: time"):
        rounds = _run_rounds(job, session, batch, progress)
    timings = []
    for one in session.opened:
        agreement, why, seconds = compared[one.name]
        reply = one.process.ask("memory")
        one.record = replace(one.record, cuda_graphs=reply["cuda_graphs"])
        on_gpu = session.placement.device is not None
        own = rounds[one.name]
        ratio = ratio_of(own, rounds[session.opened[0].name])
        timings.append(
            Timing(
                contender=one.name,
                batch=batch,
                **figures(own, batch),
                ratio=ratio,
                warm_up_seconds=round(seconds, 3),
                peak_rss_bytes=reply["peak_rss_bytes"],
                device_bytes=device_bytes(one.process.process.pid) if on_gpu else None,
                agreement=agreement,
                not_compared=why,
                noisy=noise_of(ratio, own, alone=len(rounds) == 1),
                split=one.splits(batch),
            )
        )
    return timings


def _run_rounds(
    job: BenchJob, session: BenchSession, batch: int, progress: Progress
) -> dict[str, Rounds]:
    """Let each contender take its turn in every round, the order moving on by one."""
    by_name = {one.name: one for one in session.opened}
    rounds: dict[str, Rounds] = {name: [] for name in by_name}
    turns = [(turn, name) for turn in range(job.rounds) for name in rotated(list(by_name), turn)]
    for done, (turn, name) in enumerate(turns):
        progress.advance(done, len(turns), f"batch {batch}, round {turn + 1}, {name}")
        reply = by_name[name].process.ask("time", seconds=job.seconds / job.rounds)
        rounds[name].append(reply["nanoseconds"])
    return rounds


def _summary(
    job: BenchJob,
    session: BenchSession,
    sample: Sample,
    reference: BenchReference,
    timings: list[Timing],
    load: float,
) -> Bench:
    return Bench(
        product=f"msn-export {__version__}",
        command=job.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=this_machine(),
        versions=versions_of(*PACKAGES),
        batches=job.batches,
        rounds=job.rounds,
        seconds=job.seconds,
        threads=session.placement.threads,
        pictures=len(sample),
        pictures_from=sample.source,
        preprocessing=sample.preprocessing.name,
        baseline=session.opened[0].name,
        reference=reference.name,
        load=load,
        contenders=(*(one.record for one in session.opened), *session.absent),
        timings=tuple(timings),
        notes=tuple(dict.fromkeys(session.notes)),
        preset=job.preset,
    )


def _require_page() -> None:
    try:
        import msn_export.reporting.bench  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"--report needs the package {error.name}; pip install 'msn-export[report]'"
        ) from error


def _write_page(bench: Bench, report: Path, progress: Progress, *, force: bool) -> None:
    from msn_export.reporting.bench import write_page

    with progress.step(f"write {report}"), staging(report.parent) as stage:
        write_page(bench, stage / "page.html")
        with placing([report], force=force):
            move((stage / "page.html"), report)
