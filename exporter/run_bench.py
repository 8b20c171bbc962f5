"""The story of ``msn-export bench``: open contenders, compare outputs, run rounds, sum up."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export import __version__
from msn_export.bench.device import device_bytes
from msn_export.bench.entries import (
    TORCH,
    Entry,
    Origin,
    Where,
    artifacts,
    origin_of,
    source_graphs,
    torch_entry,
)
from msn_export.bench.figures import Rounds, figures, ratio_of, rotated
from msn_export.bench.process import Process
from msn_export.bench.records import Agreed, Bench, Contender, Timing
from msn_export.check.compare import Comparison, worst_of
from msn_export.check.sample import Sample, draw
from msn_export.errors import BenchError, MissingPackageError, SpecError, ToleranceError
from msn_export.feed import Feed, feed_of
from msn_export.files import require_writable, staging
from msn_export.machine import physical_cores, this_machine
from msn_export.manifest import versions_of
from msn_export.records import from_plain, to_plain
from msn_export.spec import BatchRange, Dtype, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from msn_export.progress import Progress

PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx", "numpy")
_REFERENCE_BATCH = 4  # images the reference takes at a time: not what is timed
_BUSY = 0.5  # load average, per core, from which a timing is not to be trusted


@dataclass(frozen=True, slots=True)
class BenchJob:
    """What ``msn-export bench`` was asked for; ``seconds`` is for each contender at each batch."""

    artifacts: tuple[Path, ...]
    against: tuple[str, ...] = ("sdpa",)
    batches: tuple[int, ...] = (1, 8)
    checkpoint: str | None = None
    rounds: int = 10
    seconds: float = 10.0
    threads: int | None = None
    images: Path | None = None
    dtype: Dtype | None = None
    device: int | None = None
    providers: tuple[str, ...] = ()
    trust: bool = False
    resident: bool = False
    report: Path | None = None
    force: bool = False
    preset: str | None = None
    command: str = ""


@dataclass(slots=True)
class Opened:
    """A contender that is open in its process."""

    entry: Entry
    process: Process
    told: dict[str, Any]
    record: Contender


@dataclass(slots=True)
class Arena:
    """Everything a run holds: the contenders, the pictures, and what outputs are compared with."""

    where: Where
    folder: Path
    stack: ExitStack
    offline: bool
    opened: list[Opened] = field(default_factory=list)
    absent: list[Contender] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def start(self, entry: Entry) -> Opened:
        """Open an entry in a process of its own.

        Raises:
            BenchError: it cannot be opened.
        """
        log = self.folder / f"{len(list(self.folder.iterdir()))}.log"
        process = Process(entry.name, log, self.where.threads, offline=self.offline)
        self.stack.enter_context(process)
        told = process.ask("open", **entry.opening)
        return Opened(entry, process, told, self._record(entry, told))

    def _record(self, entry: Entry, told: dict[str, Any]) -> Contender:
        specs = from_plain(tuple[TensorSpec, ...], told.get("inputs", []), "inputs")
        takes = "; ".join(f"{spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in specs)
        on_gpu = self.where.device is not None
        return Contender(
            name=entry.name,
            kind=entry.kind,
            runs=told["runs"],
            file=str(entry.file) if entry.file is not None else None,
            sha256=entry.sha256,
            dtype=entry.dtype,
            takes=takes or f"{entry.dtype} planes",
            threads=self.where.threads,
            transfers=not self.where.resident if on_gpu else None,
            cuda_graph=told.get("cuda_graph"),
            open_seconds=round(told["seconds"], 3),
        )


def run_bench(job: BenchJob, progress: Progress) -> Bench:
    """Time artifacts and what they are compared with, interleaved.

    Raises:
        BenchError: an artifact cannot be opened or fails; one of ``against`` is left out instead,
            with the reason in its record.
        SpecError: artifacts take images of different sizes.
    """
    if job.report is not None:
        require_writable([job.report], force=job.force)
        _require_page()
    load = os.getloadavg()[0]
    device = job.device
    if device is None and any(path.suffix != ".onnx" for path in job.artifacts):
        device = 0
    if job.resident and device is None:
        raise SpecError("--resident leaves data on a GPU, and this run is on the CPU; add --device")
    threads = job.threads or physical_cores()
    where = Where(threads, device, job.providers, job.trust, job.resident)
    with tempfile.TemporaryDirectory(prefix="msn-export-bench-") as folder, ExitStack() as stack:
        arena = Arena(where, Path(folder), stack, offline=job.checkpoint is None)
        for entry in artifacts(job.artifacts, where):
            with progress.step(f"open {entry.name}"):
                arena.opened.append(arena.start(entry))
        feed = _feed(arena)
        with progress.step("read images"):
            sample = draw(job.images, feed.preprocessing)
        reference = _references(job, arena, feed, sample, progress)
        _enter(job, arena, feed, progress)
        timings = []
        for batch in job.batches:
            timings += _time_batch(job, arena, reference, batch, progress)
    bench = _summary(job, arena, sample, reference, tuple(timings), load)
    if job.report is not None:
        from msn_export.bench.page import write_page

        with progress.step(f"write {job.report}"), staging(job.report.parent) as stage:
            write_page(bench, stage / "page.html")
            (stage / "page.html").replace(job.report)
    return bench


def _require_page() -> None:
    try:
        import msn_export.bench.page  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            f"--report needs the package {error.name}; pip install 'msn-export[report]'"
        ) from error


def _feed(arena: Arena) -> Feed:
    """Find the one preprocessing that all artifacts share.

    Raises:
        SpecError: they take images of different sizes.
    """
    feeds = {}
    for one in arena.opened:
        specs = from_plain(tuple[TensorSpec, ...], one.told["inputs"], "inputs")
        feeds[one.entry.name] = feed_of(one.entry.name, specs, one.entry.manifest)
    sizes = {str(feed.preprocessing.size) for feed in feeds.values()}
    if len(sizes) > 1:
        raise SpecError(
            f"artifacts take images of {' and '.join(sorted(sizes))}; bench those of one size"
        )
    known = [feeds[one.entry.name] for one in arena.opened if one.entry.manifest is not None]
    chosen = (known or list(feeds.values()))[0]
    if chosen.note is not None:
        arena.notes.append(chosen.note)
    return chosen


@dataclass(frozen=True, slots=True)
class Reference:
    """The outputs that others are compared with, or why there are none."""

    name: str
    outputs: dict[str, NDArray[Any]]
    checkpoint: str | None = None  # sha256 of its weights, where known


def _references(
    job: BenchJob, arena: Arena, feed: Feed, sample: Sample, progress: Progress
) -> Reference:
    """Run the fp32 reference once; its process is gone before anything is timed."""
    pixels = arena.folder / "pixels.npy"
    np.save(pixels, sample.pixels)
    for one in arena.opened:
        _give_pictures(arena, one, feed)
    with progress.step("run the fp32 reference"), ExitStack() as stack:
        try:
            origin = _origin(job, arena, feed)
            cpu = Where(arena.where.threads)
            entry = torch_entry("sdpa", origin, cpu, Dtype.FP32)
            apart = Arena(cpu, arena.folder, stack, arena.offline)
            one = apart.start(entry)
            _give_pictures(arena, one, feed)
            outputs = _outputs(arena, one, _REFERENCE_BATCH)[0]
        except BenchError as error:
            return _first_fp32(arena, str(error))
    return Reference(f"{origin.checkpoint}, {one.record.runs}, fp32", outputs, origin.sha256)


def _first_fp32(arena: Arena, reason: str) -> Reference:
    """Fall back on the first fp32 graph where PyTorch or its checkpoint is not here."""
    for one in arena.opened:
        if one.entry.dtype == Dtype.FP32 and one.entry.kind == "onnx":
            known = one.entry.manifest
            checkpoint = known.checkpoint if known is not None else None
            outputs = _outputs(arena, one, _REFERENCE_BATCH)[0]
            name = f"{one.entry.name} (no PyTorch reference: {reason})"
            return Reference(name, outputs, checkpoint.sha256 if checkpoint else None)
    return Reference(f"none: {reason}", {})


def _origin(job: BenchJob, arena: Arena, feed: Feed) -> Origin:
    names: dict[str, None] = {}
    for one in arena.opened:
        names |= dict.fromkeys(spec["name"] for spec in one.told["outputs"])
    entries = [one.entry for one in arena.opened]
    return origin_of(entries, job.checkpoint, tuple(names), feed.preprocessing.size)


def _give_pictures(arena: Arena, one: Opened, feed: Feed) -> None:
    one.process.ask(
        "take",
        pixels=str(arena.folder / "pixels.npy"),
        preprocessing=to_plain(feed.preprocessing),
    )


def _outputs(arena: Arena, one: Opened, batch: int) -> tuple[dict[str, NDArray[Any]], float]:
    """Begin a batch size; give the outputs for every picture, and the seconds it took."""
    path = arena.folder / "outputs.npz"
    told = one.process.ask("begin", batch=batch, outputs=str(path))
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}, float(told["seconds"])


def _enter(job: BenchJob, arena: Arena, feed: Feed, progress: Progress) -> None:
    """Open what the artifacts are compared with, before them in the order of the table."""
    first = arena.opened[0].entry
    on_cpu = arena.where.device is None
    dtype = job.dtype or (Dtype.FP32 if on_cpu or first.dtype is None else Dtype(first.dtype))
    others: list[Opened] = []
    for kind in job.against:
        with progress.step(f"open {kind}"):
            try:
                entries = [one.entry for one in arena.opened]
                if kind in TORCH:
                    found = [torch_entry(kind, _origin(job, arena, feed), arena.where, dtype)]
                else:
                    found = list(source_graphs(entries, arena.where))
                for entry in found:
                    one = arena.start(entry)
                    _give_pictures(arena, one, feed)
                    if kind == "compile":  # what it cannot compile fails at its first call
                        _outputs(arena, one, job.batches[0])
                    others.append(one)
            except BenchError as error:
                reason = str(error).removeprefix(f"{kind}: ")
                arena.absent.append(Contender(kind, kind, skipped=reason))
    arena.opened[:0] = others


def _time_batch(
    job: BenchJob, arena: Arena, reference: Reference, batch: int, progress: Progress
) -> list[Timing]:
    """Time all contenders at one batch size."""
    agreed: dict[str, tuple[Agreed | None, str | None]] = {}
    warm: dict[str, float] = {}
    with progress.step(f"batch {batch}: compare outputs"):
        for one in arena.opened:
            outputs, warm[one.entry.name] = _outputs(arena, one, batch)
            agreed[one.entry.name] = _compare(one.entry, outputs, reference)
            _note_pieces(arena, one, batch)
    rounds: dict[str, Rounds] = {one.entry.name: [] for one in arena.opened}
    by_name = {one.entry.name: one for one in arena.opened}
    with progress.step(f"batch {batch}: time"):
        for turn in range(job.rounds):
            for position, name in enumerate(rotated(list(by_name), turn)):
                told = by_name[name].process.ask("time", seconds=job.seconds / job.rounds)
                rounds[name].append(told["nanoseconds"])
                done = turn * len(by_name) + position + 1
                progress.advance(done, job.rounds * len(by_name), f"round {turn + 1}, {name}")
    baseline = rounds[arena.opened[0].entry.name]
    timings = []
    for name, one in by_name.items():
        peak = one.process.ask("weigh")["peak_rss_bytes"]
        agreement, why = agreed[name]
        timings.append(
            Timing(
                contender=name,
                batch=batch,
                **figures(rounds[name], batch),
                ratio=ratio_of(rounds[name], baseline),
                warm_up_seconds=round(warm[name], 3),
                peak_rss_bytes=peak,
                device_bytes=device_bytes(one.process.id)
                if arena.where.device is not None
                else None,
                agreement=agreement,
                not_compared=why,
            )
        )
    return timings


def _note_pieces(arena: Arena, one: Opened, batch: int) -> None:
    """Note a batch that an artifact does not take at once."""
    if "batch" not in one.told:
        return
    takes = BatchRange.parse(one.told["batch"])
    if not takes.min <= batch <= takes.max:
        arena.notes.append(
            f"{one.entry.name} takes batches of {takes.min} to {takes.max}: {batch} is run in "
            "pieces or padded"
        )


def _compare(
    entry: Entry, outputs: dict[str, NDArray[Any]], reference: Reference
) -> tuple[Agreed | None, str | None]:
    """Compare every output the reference has too; or say why none was."""
    known = entry.manifest.checkpoint if entry.manifest is not None else None
    if None not in {known, reference.checkpoint} and known.sha256 != reference.checkpoint:  # type: ignore[union-attr]
        return None, "made from another checkpoint than the reference"
    shared = [name for name in reference.outputs if name in outputs]
    if not shared:
        return None, f"no output in common with the reference ({reference.name})"
    found = []
    for name in shared:
        comparison = Comparison()
        try:
            comparison.add(reference.outputs[name], outputs[name])
        except ToleranceError as error:
            return None, f"{name}: {error}"
        found.append(comparison.agreement())
    worst = worst_of(found)
    return (
        Agreed(
            images=worst.images,
            max_abs=worst.max_abs,
            mean_abs=worst.mean_abs,
            cosine_min=worst.cosine_min,
            cosine_p1=worst.cosine_p1,
            cosine_median=worst.cosine_median,
        ),
        None,
    )


def _summary(
    job: BenchJob,
    arena: Arena,
    sample: Sample,
    reference: Reference,
    timings: tuple[Timing, ...],
    load: float,
) -> Bench:
    machine = this_machine()
    if load > _BUSY * machine.cores:
        arena.notes.append(
            f"other processes were using the machine (load average {load:.1f} on {machine.cores} "
            "cores when the run began): compare ratios, not milliseconds"
        )
    return Bench(
        product=f"msn-export {__version__}",
        command=job.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine,
        versions=versions_of(*PACKAGES),
        batches=job.batches,
        rounds=job.rounds,
        seconds=job.seconds,
        threads=arena.where.threads,
        pictures=len(sample),
        pictures_from=sample.source,
        preprocessing=sample.preprocessing.name,
        baseline=arena.opened[0].entry.name,
        reference=reference.name,
        load=round(load, 2),
        contenders=(*(one.record for one in arena.opened), *arena.absent),
        timings=timings,
        notes=tuple(dict.fromkeys(arena.notes)),
        preset=job.preset,
    )
