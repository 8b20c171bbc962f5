"""The steps of ``msn-export embed``: list pictures, open the model, run, keep, finish."""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from msn_export import __version__
from msn_export.cluster.cluster import LOCAL, RayExecutor, address_of, connected
from msn_export.cluster.storage import list_sources
from msn_export.embedding import outputs
from msn_export.embedding.index import ENDING, require_usearch, write_index
from msn_export.embedding.inference import LocalExecutor, Reading, reading_of, require_selftest
from msn_export.embedding.job import Embedded, EmbedJob, list_pictures
from msn_export.embedding.outputs import START_OVER, Journal
from msn_export.errors import ClusterError, ImageError, MsnExportError, SpecError
from msn_export.feed import Feed, feed_of
from msn_export.files import no_room_reported, placing, require_writable, staging
from msn_export.host import peak_rss
from msn_export.manifest import sha256_of
from msn_export.progress import SILENT
from msn_export.runtime import open_runner
from msn_export.runtime.opening import OPENVINO
from msn_export.schema import to_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from msn_export.embedding.job import Listing
    from msn_export.progress import Progress

Executor: TypeAlias = LocalExecutor | RayExecutor
__all__ = ["EmbedJob", "run_embed"]  # the two that docs/python.md speaks of


@contextmanager
def open_here(
    job: EmbedJob, progress: Progress, listing: Listing | None = None
) -> Iterator[Executor]:
    """Open the model on this machine; ``listing`` are pictures instead of the job's folder."""
    if not isinstance(job.images, Path):
        raise SpecError(
            f"{job.images} is read on a Ray cluster alone; add --ray local, or copy it to a folder"
        )
    if job.actors is not None:
        raise SpecError("--actors is of a Ray cluster; add --ray, or leave it out")
    if job.threads is not None and job.model.suffix != ".onnx":
        raise SpecError(f"--threads is for graphs on a CPU, and {job.model} is an engine")
    if listing is None:
        with progress.step("list pictures"):
            listing = list_pictures(job.images)
    with progress.step("open the model"):
        runner = open_runner(
            job.model,
            device=job.device,
            providers=job.providers or None,
            trust=job.trust,
            threads=job.threads,
            precision=job.precision,
            hint="throughput" if OPENVINO in job.providers else None,
            eager_kernels=True,  # a row does not depend on which kernels were ready
        )
    with runner:
        with progress.step("selftest"):
            selftest = require_selftest(runner, check=job.check)
        yield LocalExecutor(listing, runner, selftest, job.workers)


@contextmanager
def open_on_cluster(job: EmbedJob, progress: Progress) -> Iterator[Executor]:
    """Join or start a cluster, and have one of its workers open the model."""
    address = address_of(job.ray or "")
    with progress.step("list pictures"):
        pictures, store = list_sources(job.images)
    with ExitStack() as stack:
        with progress.step(f"start Ray on {address}" if address == LOCAL else f"join {address}"):
            nodes = stack.enter_context(connected(address))
        with progress.step("open the model on a worker"):
            executor = RayExecutor(job, pictures, store, nodes)
        yield executor


_WINDOW = 60.0  # seconds a rate looks back: long enough for slow batches, short enough to be true


class Rate:
    """The rate of the last minute, and the time that what is left will take at it."""

    def __init__(self, total: int, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.total = total
        self._clock = clock
        self._seen = deque([(clock(), done)])

    def at(self, done: int) -> str:
        """Take note of how many are done; say rate and time left."""
        now = self._clock()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW:
            self._seen.popleft()
        began, before = self._seen[0]
        rate = (done - before) / max(now - began, 1e-9)
        left = f"{_clock_time((self.total - done) / rate)} left" if rate else "time left unknown"
        return f"{done} of {self.total}, {rate:.1f}/s, {left}"


def _clock_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def run_embed(job: EmbedJob, progress: Progress = SILENT) -> Embedded:
    """Run a folder of pictures through an artifact, on this machine or on a Ray cluster.

    Returns:
        What was written and how it went.

    Raises:
        MsnExportError: it could not be done; finished parts stay where ``resume`` finds them.
        KeyboardInterrupt: the same, with how to go on.
    """
    started = time.monotonic()
    require_output(job)
    site = open_here if job.ray is None else open_on_cluster
    with site(job, progress) as executor, no_room_reported(job.output.parent):
        run = EmbedRun(job, executor)
        parts = run.begin()
        with closing(parts), kept(parts, "the same command with --resume"):
            resumed_at = parts.done
            run.fill(parts, progress)
            with progress.step("finish the output"):
                shape = run.finish(parts)
    seconds = time.monotonic() - started
    images = len(executor.pictures)
    return Embedded(
        output=str(job.output),
        files=tuple(str(path) for path in outputs.files_of(job.output)),
        shape=shape,
        output_name=run.reading.vector,
        scores=run.reading.scores,
        images=images,
        broken=len(parts.errors),
        exif=run.feed.preprocessing.exif,
        turned=parts.turned,
        skipped=dict(executor.pictures.skipped),
        errors=tuple(text for _, text in sorted(parts.errors.items())[:10]),
        resumed_at=resumed_at,
        runner=executor.model.name,
        precision=executor.model.precision,
        cluster=executor.cluster,
        batch=run.batch,
        workers=executor.workers,
        preprocessing=run.feed.preprocessing,
        selftest=executor.model.selftest,
        notes=run.feed.notes,
        seconds=round(seconds, 3),
        images_per_second=round((images - resumed_at) / seconds, 2),
        peak_rss_bytes=peak_rss(),
    )


def require_output(job: EmbedJob) -> None:
    """Refuse, before any work is done, an output that could not be written."""
    if job.output.suffix not in outputs.ENDINGS:
        raise SpecError(
            f"output {job.output} ends in none of {', '.join(outputs.ENDINGS[:-1])} and "
            f"{outputs.ENDINGS[-1]}"
        )
    require_writable(outputs.files_of(job.output), force=job.force)
    if job.output.suffix != ".npy":
        outputs.require_parquet()
    if job.output.suffix == ENDING:
        require_usearch()


@contextmanager
def kept(parts: Journal, again: str) -> Iterator[None]:
    """Keep the rows of a run that ends early; ``again`` is the command that goes on from there."""
    try:
        yield
    except KeyboardInterrupt as stop:
        parts.end_part()
        text = (
            f"interrupted; {parts.done} of {parts.total} rows are kept in {parts.folder}, {again}"
        )
        raise KeyboardInterrupt(f"{text} goes on from there" if parts.done else "") from stop
    except MsnExportError:
        parts.end_part()  # hours of rows are not lost with a device
        raise


class EmbedRun:
    """One run over one folder: what is read, how, and where it goes."""

    def __init__(self, job: EmbedJob, executor: Executor) -> None:
        self.job, self.executor, self.model = job, executor, executor.model
        self.feed: Feed = feed_of(
            job.model.name,
            self.model.inputs,
            self.model.stated,
            preprocess=job.preprocess,
            exif=job.exif,
            size=job.image_size or job.model,
        )
        self.labels = self.model.labels
        reading = reading_of(
            job.model.name,
            self.model.outputs,
            job.output_name,
            self.model.scores,
        )
        if job.top_k is not None and reading.logits is None:
            raise SpecError(
                f"--top-k keeps labels, and {job.model.name} has no logits; leave it out, or "
                "export the model with --head logits too"
            )
        self.reading: Reading = replace(reading, top=job.top_k or 1, normalize=job.normalize)
        self.batch = job.batch or self.model.batch.opt

    def begin(self, start_over: str = START_OVER) -> Journal:
        """Begin the output's parts, or go on with those that are there.

        ``start_over`` says in errors how to throw them away.
        """
        output = self.job.output
        return Journal.begin(
            output.with_name(output.name + ".parts"),
            len(self.executor.pictures),
            self.origin(),
            resume=self.job.resume,
            force=self.job.force,
            start_over=start_over,
        )

    def origin(self) -> dict[str, Any]:
        """All that a row's numbers follow from."""
        manifest, pictures = self.model.manifest, self.executor.pictures
        return {
            "model": manifest.sha256 if manifest is not None else sha256_of(self.job.model),
            "output_name": self.reading.vector,
            "normalize": self.reading.normalize,
            "top_k": self.reading.top,
            "preprocessing": to_plain(self.feed.preprocessing),
            "listing": f"{len(pictures)} pictures, sha256 {pictures.sha256}",
            "batch": self.batch,
            "runner": self.model.name,
            "hash": "sha256",
        }

    def fill(self, parts: Journal, progress: Progress) -> None:
        rate = Rate(parts.total, parts.done)
        done, missing = parts.done, list(parts.missing(self.batch))
        with progress.step("embed"):
            for start, rows in self.executor.rows(self.feed, self.reading, self.batch, missing):
                outputs.require_fit(self.job.output, rows.vectors.shape[1:])
                parts.add(start, rows)
                done += len(rows.vectors)
                progress.advance(done, parts.total, f"{rate.at(done)}, {parts.broken} broken")
        parts.end_part()
        if parts.done != parts.total:
            raise ClusterError(
                f"{parts.total - parts.done} of {parts.total} rows did not come back; the same "
                "command with --resume makes them"
            )

    def finish(self, parts: Journal) -> tuple[int, ...]:
        """Turn whole parts into the output; give its shape."""
        if len(parts.errors) == parts.total:
            parts.remove()
            raise ImageError(
                f"none of the {parts.total} pictures of {self.executor.pictures.folder} gave a "
                f"row; the first: {parts.errors[0]}"
            )
        shape = (parts.total, *parts.vectors.read(0, 1).shape[1:])
        folder = self.executor.pictures.folder
        about = {
            "product": f"msn-export {__version__}",
            "file": self.job.model.name,
            **self.origin(),
            "folder": str(folder.absolute() if isinstance(folder, Path) else folder),
            "shape": shape,
            "scores": self.reading.scores,
            "broken": len(parts.errors),
            "turned": parts.turned,
            "skipped": dict(self.executor.pictures.skipped),
            "notes": self.feed.notes,
        }
        ending = self.job.output.suffix
        write: Callable[..., tuple[Path, ...]]
        write = outputs.write_npy if ending == ".npy" else outputs.write_parquet
        if ending == ENDING:
            write = partial(write_index, model=self.job.model)
        with staging(self.job.output.parent) as stage:
            finished = write(parts, self.executor.pictures, self.labels, about, stage)
            with placing(outputs.files_of(self.job.output), force=self.job.force):
                outputs.move_in(finished, self.job.output)
        parts.remove()
        return shape
