"""Turn what a report shows into one HTML page, or into Markdown for a model card."""

from __future__ import annotations

import re

from jinja2 import Environment, PackageLoader, StrictUndefined

from msn_export.benchmark.results import footnotes
from msn_export.errors import IN_A_TEXT
from msn_export.graph.summary import PARTS
from msn_export.metrics.tolerances import HEADROOM
from msn_export.reporting import plots
from msn_export.reporting.describe import accuracy_rows, file_rows, fused, short, significant
from msn_export.reporting.describe_fit import fit_rows
from msn_export.reporting.gather import (
    Page,
    multiplied,
    spelled,
    strips,
    timed_on,
    timing_columns,
    timing_rows,
)
from msn_export.reporting.hub_card import front_matter, hub_id
from msn_export.reporting.plots import Plot


def html(page: Page) -> str:
    """Render the page with its plots: one file that loads nothing."""
    template = environment(autoescape=True).get_template("report.html.j2")
    return template.render(page=page, plots=_plots(page)).lstrip().translate(IN_A_TEXT)


def markdown(page: Page) -> str:
    """Render the same figures as Markdown, without plots and pictures: a model card.

    It begins with the YAML that the hub reads, where a manifest says what the model is.
    """
    text = environment(autoescape=False).get_template("model_card.md.j2").render(page=page)
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return f"{_front_matter(page)}{text}".translate(IN_A_TEXT)


def _front_matter(page: Page) -> str:
    manifests = [one.manifest for one in page.artifacts if one.manifest is not None]
    if not manifests:
        return ""
    kinds = {manifest.kind for manifest in manifests}
    tags = [tag for kind, tag in (("onnx", "onnx"), ("engine", "tensorrt")) if kind in kinds]
    return f"{front_matter(manifests[0], page.title, hub_id(manifests[0]), tags)}\n\n"


def environment(*, autoescape: bool) -> Environment:
    """Open the templates; a figure that is not there is an error."""
    opened = Environment(
        loader=PackageLoader("msn_export.reporting", "."),
        autoescape=autoescape,  # noqa: S701  Markdown has its own escapes: _cell
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    opened.filters |= {
        "cell": _cell, "line": _line, "short": short,
        "significant": significant, "spelled": spelled,
    }  # fmt: skip
    opened.globals |= {
        "accuracy_rows": accuracy_rows, "file_rows": file_rows, "fit_rows": fit_rows,
        "footnotes": footnotes, "fused": fused, "multiplied": multiplied, "strips": strips,
        "timed_on": timed_on, "timing_columns": timing_columns, "timing_rows": timing_rows,
        "PARTS": PARTS, "HEADROOM": HEADROOM,
    }  # fmt: skip
    return opened


def _plots(page: Page) -> dict[str, Plot]:
    """Draw what there are figures of."""
    drawn: dict[str, Plot | None] = {}
    sized = [artifact for artifact in page.artifacts if artifact.is_file]
    if sized:
        drawn["sizes"] = plots.sizes(sized)
    shown = [
        found
        for found in page.agreements
        if any(image.cosine is not None for image in found.check.per_image)
    ]
    if shown:
        drawn["cosines"] = plots.histogram(shown)
    if page.drifts:
        drawn["drift"] = plots.drift(page.drifts)
        drawn["headroom"] = plots.headroom(page.drifts[0])
    for artifact in page.artifacts:
        if artifact.census is not None:
            drawn[f"kinds {artifact.name}"] = plots.kinds(artifact)
            drawn[f"blocks {artifact.name}"] = plots.per_block(artifact)
    fitted = next((artifact for artifact in page.artifacts if artifact.is_fitted), None)
    if fitted is not None:
        drawn["confusion"] = plots.confused(fitted)
    if page.latency is not None:
        drawn["times"] = plots.times(page.latency)
    return {name: plot for name, plot in drawn.items() if plot is not None}


def _cell(text: str) -> str:
    """Keep a file's name or a note from being Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", _line(text))


def _line(text: str) -> str:
    return " ".join(str(text).split())
