"""A benchmark as one page: no network, light and dark, printable, its own data inside."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from msn_export.bench.plots import plots
from msn_export.bench.said import said
from msn_export.records import to_plain

if TYPE_CHECKING:
    from pathlib import Path

    from msn_export.bench.records import Bench


def write_page(bench: Bench, path: Path) -> None:
    """Write the page.

    Raises:
        OSError: the file system refused.
    """
    environment = Environment(
        loader=PackageLoader("msn_export.bench", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    artifacts = [one.name for one in bench.timed if one.file is not None]
    fastest = {
        batch: min(one.median_ms for one in bench.timings if one.batch == batch)
        for batch in bench.batches
    }
    # "</script>" inside a name would end the element
    data = json.dumps(to_plain(bench), allow_nan=False).replace("<", "\\u003c")
    page = environment.get_template("page.html.j2").render(
        bench=bench,
        title=f"Benchmark of {', '.join(artifacts)}",
        said=said(bench),
        fastest=fastest,
        plots=plots(bench),
        data=Markup(data),  # noqa: S704  JSON with every "<" escaped
    )
    path.write_text(page, encoding="utf-8")
