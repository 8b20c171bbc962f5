"""``msn-export embed``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from msn_export.cli.options import FILE, IMAGES, JobCommand, json_option

if TYPE_CHECKING:
    from msn_export.cli.console import Console
    from msn_export.embed.job import Embedded


class PicturesParam(click.ParamType[Any]):
    """A folder that exists, or the URI of a bucket."""

    name = "folder or URI"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Leave a URI as it is: as a path it would lose a slash."""
        if isinstance(value, str) and "://" in value:
            return value
        return IMAGES.convert(value, param, ctx)


@click.command(cls=JobCommand, job="msn_export.embed.job:EmbedJob")
@click.argument("model", type=FILE)
@click.argument("images", type=PicturesParam())
@json_option
def embed(as_json: bool, **options: Any) -> None:
    """Run the pictures of the folder IMAGES through MODEL, an .onnx or .engine file.

    With --ray, IMAGES may be s3://BUCKET/FOLDER or gs://BUCKET/FOLDER.

    Rows are in the order of the sorted paths. A picture that cannot be read is a row with an error.
    """
    from msn_export.cli.console import Console
    from msn_export.commands.embed import EmbedJob, run_embed

    console = Console(as_json=as_json)
    with console.progress() as progress:
        embedded = run_embed(EmbedJob(**options), progress)
    _show(console, embedded)


def _show(console: Console, embedded: Embedded) -> None:
    if console.as_json:
        console.print_json(embedded)
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(embedded.output), title_justify="left", show_header=False)
    shape = ", ".join(str(size) for size in embedded.shape)
    rows = [
        ("rows", f"{embedded.output_name} [{shape}] float32"),
        *((("scores", str(embedded.scores)),) if embedded.scores else ()),
        ("broken", f"{embedded.broken} of {embedded.images} pictures"),
        *(("", text) for text in embedded.errors),
        *(("skipped", f"{count} {reason}") for reason, count in embedded.skipped.items()),
        ("turned", _turned(embedded)),
        ("files", ", ".join(embedded.files)),
        ("runner", f"{embedded.runner}, batch {embedded.batch}"),
        *((("cluster", embedded.cluster),) if embedded.cluster else ()),
        ("preprocessing", str(embedded.preprocessing)),
        ("selftest", embedded.selftest),
        *(("note", note) for note in embedded.notes),
        ("took", _took(embedded)),
    ]
    for name, text in rows:
        table.add_row(name, escape(text))
    console.print(table)


def _turned(embedded: Embedded) -> str:
    if embedded.exif == "ignore":
        return "none: EXIF orientation is ignored"
    return f"{embedded.turned} of {embedded.images} pictures by their EXIF orientation"


def _took(embedded: Embedded) -> str:
    resumed = f", resumed at row {embedded.resumed_at}" if embedded.resumed_at else ""
    return (
        f"{embedded.seconds:.1f} s{resumed}, {embedded.images_per_second:.1f} images/s, "
        f"{embedded.workers} decoding; peak memory {embedded.peak_rss_bytes / 1e9:.2f} GB"
    )
