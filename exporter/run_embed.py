"""The story of ``msn-export embed``: list pictures, decode ahead, run, keep, finish."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from msn_export import __version__
from msn_export.embed import outputs
from msn_export.embed.batches import Reading, batches, reading_of
from msn_export.embed.decode import decode, read
from msn_export.embed.job import Embedded, EmbedJob
from msn_export.embed.listing import Listing, list_pictures
from msn_export.embed.parts import Parts
from msn_export.embed.rate import Rate
from msn_export.errors import ImageError, MsnExportError, SpecError, ToleranceError
from msn_export.feed import Feed, feed_of
from msn_export.files import no_room_reported, require_writable, sha256_of, staging
from msn_export.machine import usable_cores
from msn_export.process import peak_rss
from msn_export.records import to_plain
from msn_export.runtime import open_runner

if TYPE_CHECKING:
    from msn_export.progress import Progress
    from msn_export.runtime import Runner


def run_embed(job: EmbedJob, progress: Progress) -> Embedded:
    """Run a folder of pictures through an artifact.

    Returns:
        What was written and how it went.

    Raises:
        MsnExportError: it could not be done; finished parts stay where ``resume`` finds them.
        KeyboardInterrupt: the same, with how to go on.
    """
    started = time.monotonic()
    require_output(job)
    with progress.step("list pictures"):
        listing = list_pictures(job.images)
    with progress.step("open the model"):
        runner = open_runner(
            job.model, device=job.device, providers=job.providers or None, trust=job.trust
        )
    with runner, no_room_reported(job.output.parent):
        with progress.step("selftest"):
            tested = _selftest(job, runner)
        run = _Run(job, listing, runner)
        parts = run.begin()
        with closing(parts):
            resumed_at = parts.done
            try:
                run.fill(parts, progress)
                with progress.step("finish the output"):
                    shape = run.finish(parts)
            except KeyboardInterrupt as stop:
                parts.end_part()
                raise KeyboardInterrupt(_how_to_go_on(parts)) from stop
            except MsnExportError:
                parts.end_part()  # hours of rows are not lost with a device
                raise
    seconds = time.monotonic() - started
    return Embedded(
        output=str(job.output),
        files=tuple(str(path) for path in outputs.files_of(job.output)),
        shape=shape,
        output_name=run.reading.vector,
        images=len(listing),
        broken=len(parts.errors),
        errors=tuple(text for _, text in sorted(parts.errors.items())[:10]),
        resumed_at=resumed_at,
        runner=runner.name,
        batch=run.batch,
        workers=run.workers,
        preprocessing=to_plain(run.feed.preprocessing),
        selftest=tested,
        notes=(run.feed.note,) if run.feed.note else (),
        seconds=round(seconds, 3),
        images_per_second=round((len(listing) - resumed_at) / seconds, 2),
        peak_rss_bytes=peak_rss(),
    )


def require_output(job: EmbedJob) -> None:
    """Refuse, before any work is done, an output that could not be written.

    Raises:
        SpecError: its ending names no format.
        OutputError: it exists, or its folder cannot be written.
        MissingPackageError: its format needs a package that is not there.
    """
    if job.output.suffix not in outputs.ENDINGS:
        raise SpecError(f"output {job.output} ends in neither {' nor '.join(outputs.ENDINGS)}")
    require_writable(outputs.files_of(job.output), force=job.force)
    if job.output.suffix == ".parquet":
        outputs.require_parquet()


def _selftest(job: EmbedJob, runner: Runner) -> str:
    """Run the manifest's golden input, before a night is spent on a model that is wrong here.

    Raises:
        ToleranceError: this machine does not reproduce it.
    """
    if not job.check:
        return "none (--no-check)"
    if runner.manifest is None or runner.manifest.golden is None:
        return "none: no golden input came with the model"
    found = runner.selftest()
    if not found.passed:
        raise ToleranceError(
            f"{found}: this machine does not compute what the model was checked for; export it "
            "here, or run it all the same with --no-check"
        )
    return str(found)


def _how_to_go_on(parts: Parts) -> str:
    if not parts.done:
        return ""
    return (
        f"interrupted; {parts.done} of {parts.total} rows are kept in {parts.folder}, the same "
        "command with --resume goes on from there"
    )


class _Run:
    """One run over one folder: what is read, how, and where it goes."""

    def __init__(self, job: EmbedJob, listing: Listing, runner: Runner) -> None:
        self.job, self.listing, self.runner = job, listing, runner
        self.feed: Feed = feed_of(
            job.model.name,
            runner.inputs,
            runner.manifest,
            preprocess=job.preprocess,
            size=job.image_size,
        )
        self.reading: Reading = reading_of(job.model.name, runner.outputs, job.output_name)
        self.labels = runner.manifest.labels if runner.manifest is not None else ()
        self.batch = job.batch or runner.batch.opt
        # one a core: decoders that are ahead of the model wait, and leave the core to it
        self.workers = job.workers or min(16, len(usable_cores()))

    def begin(self) -> Parts:
        """Begin the output's parts, or go on with those that are there."""
        output = self.job.output
        return Parts.begin(
            output.with_name(output.name + ".parts"),
            len(self.listing),
            self.origin(),
            resume=self.job.resume,
            force=self.job.force,
        )

    def origin(self) -> dict[str, Any]:
        """All that a row's numbers follow from."""
        known = self.runner.manifest
        return {
            "model": known.sha256 if known is not None else sha256_of(self.job.model),
            "output_name": self.reading.vector,
            "preprocessing": to_plain(self.feed.preprocessing),
            "listing": f"{len(self.listing)} pictures, sha256 {self.listing.sha256}",
            "batch": self.batch,
            "runner": self.runner.name,
        }

    def fill(self, parts: Parts, progress: Progress) -> None:
        """Make the rows that are not done yet."""
        size = self.feed.preprocessing.size
        rate = Rate(parts.total, parts.done)
        decoded = decode(
            self.listing.paths[parts.done :],
            partial(read, preprocessing=self.feed.preprocessing),
            workers=self.workers,
            ahead=2 * self.batch + self.workers,
        )
        done = parts.done
        with progress.step("embed"), closing(decoded):
            for rows in batches(
                decoded,
                size,
                self.feed.preprocessing.channels,
                self.batch,
                lambda pixels: self.runner(self.feed(pixels)),
                self.reading,
            ):
                outputs.require_fit(self.job.output, rows.vectors.shape[1:])
                parts.add(rows)
                done += len(rows.vectors)
                progress.advance(done, parts.total, f"{rate.at(done)}, {parts.broken} broken")
        parts.end_part()

    def finish(self, parts: Parts) -> tuple[int, ...]:
        """Turn whole parts into the output; give its shape."""
        if len(parts.errors) == parts.total:
            parts.remove()
            raise ImageError(
                f"none of the {parts.total} pictures of {self.listing.folder} gave a row; the "
                f"first: {parts.errors[0]}"
            )
        shape = (parts.total, *parts.vectors.read(0, 1).shape[1:])
        about = {
            "product": f"msn-export {__version__}",
            "file": self.job.model.name,
            **self.origin(),
            "shape": shape,
            "broken": len(parts.errors),
        }
        npy = self.job.output.suffix == ".npy"
        write = outputs.write_npy if npy else outputs.write_parquet
        with staging(self.job.output.parent) as stage:
            made = write(parts, self.listing, self.labels, about, stage)
            outputs.place(made, self.job.output)
        parts.remove()
        return shape
