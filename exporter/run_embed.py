"""The story of ``msn-export embed``: list pictures, open the model, run, keep, finish."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from msn_export import __version__
from msn_export.embed import outputs
from msn_export.embed.batches import Reading, reading_of
from msn_export.embed.job import Embedded, EmbedJob
from msn_export.embed.parts import Parts
from msn_export.embed.rate import Rate
from msn_export.embed_place import here, on_cluster
from msn_export.errors import ClusterError, ImageError, MsnExportError, SpecError
from msn_export.feed import Feed, feed_of
from msn_export.files import no_room_reported, placing, require_writable, staging
from msn_export.process import peak_rss
from msn_export.progress import SILENT
from msn_export.records import to_plain
from msn_export.sidecar import sha256_of

if TYPE_CHECKING:
    from msn_export.embed_place import Place
    from msn_export.progress import Progress

__all__ = ["EmbedJob", "run_embed"]  # the two that docs/python.md speaks of


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
    site = here if job.ray is None else on_cluster
    with site(job, progress) as place, no_room_reported(job.output.parent):
        run = _Run(job, place)
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
    images = len(place.pictures)
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
        skipped=dict(place.pictures.skipped),
        errors=tuple(text for _, text in sorted(parts.errors.items())[:10]),
        resumed_at=resumed_at,
        runner=place.model.name,
        cluster=place.cluster,
        batch=run.batch,
        workers=place.workers,
        preprocessing=run.feed.preprocessing,
        selftest=place.selftest,
        notes=run.feed.notes,
        seconds=round(seconds, 3),
        images_per_second=round((images - resumed_at) / seconds, 2),
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


def _how_to_go_on(parts: Parts) -> str:
    if not parts.done:
        return ""
    return (
        f"interrupted; {parts.done} of {parts.total} rows are kept in {parts.folder}, the same "
        "command with --resume goes on from there"
    )


class _Run:
    """One run over one folder: what is read, how, and where it goes."""

    def __init__(self, job: EmbedJob, place: Place) -> None:
        self.job, self.place, self.model = job, place, place.model
        self.feed: Feed = feed_of(
            job.model.name,
            self.model.inputs,
            self.model.manifest,
            preprocess=job.preprocess,
            exif=job.exif,
            size=job.image_size or job.model,
        )
        known = self.model.manifest
        self.labels = known.labels if known is not None else ()
        self.reading: Reading = reading_of(
            job.model.name,
            self.model.outputs,
            job.output_name,
            known.scores if known is not None else None,
        )
        self.batch = job.batch or self.model.batch.opt

    def begin(self) -> Parts:
        """Begin the output's parts, or go on with those that are there."""
        output = self.job.output
        return Parts.begin(
            output.with_name(output.name + ".parts"),
            len(self.place.pictures),
            self.origin(),
            resume=self.job.resume,
            force=self.job.force,
        )

    def origin(self) -> dict[str, Any]:
        """All that a row's numbers follow from."""
        known, pictures = self.model.manifest, self.place.pictures
        return {
            "model": known.sha256 if known is not None else sha256_of(self.job.model),
            "output_name": self.reading.vector,
            "preprocessing": to_plain(self.feed.preprocessing),
            "listing": f"{len(pictures)} pictures, sha256 {pictures.sha256}",
            "batch": self.batch,
            "runner": self.model.name,
        }

    def fill(self, parts: Parts, progress: Progress) -> None:
        """Make the rows that are not done yet."""
        rate = Rate(parts.total, parts.done)
        done, missing = parts.done, list(parts.missing(self.batch))
        made = self.place.rows(self.feed, self.reading, self.batch, missing)
        with progress.step("embed"):
            for start, rows in made:
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

    def finish(self, parts: Parts) -> tuple[int, ...]:
        """Turn whole parts into the output; give its shape."""
        if len(parts.errors) == parts.total:
            parts.remove()
            raise ImageError(
                f"none of the {parts.total} pictures of {self.place.pictures.folder} gave a row; "
                f"the first: {parts.errors[0]}"
            )
        shape = (parts.total, *parts.vectors.read(0, 1).shape[1:])
        about = {
            "product": f"msn-export {__version__}",
            "file": self.job.model.name,
            **self.origin(),
            "shape": shape,
            "scores": self.reading.scores,
            "broken": len(parts.errors),
            "turned": parts.turned,
            "skipped": dict(self.place.pictures.skipped),
            "notes": self.feed.notes,
        }
        npy = self.job.output.suffix == ".npy"
        write = outputs.write_npy if npy else outputs.write_parquet
        with staging(self.job.output.parent) as stage:
            made = write(parts, self.place.pictures, self.labels, about, stage)
            with placing(outputs.files_of(self.job.output), force=self.job.force):
                outputs.place(made, self.job.output)
        parts.remove()
        return shape
