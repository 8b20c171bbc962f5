"""Turn what a report shows into one HTML page, or into Markdown for a model card."""

from __future__ import annotations

import re
from dataclasses import replace

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from msn_export.report import plots
from msn_export.report.facts import Page


def html(page: Page) -> str:
    """Render the page with its plots: one file that loads nothing."""
    drawn = {name: Markup(svg) for name, svg in _plots(page).items()}  # noqa: S704  ours
    template = _environment(autoescape=True).get_template("report.html.j2")
    return template.render(page=replace(page, plots=drawn)).lstrip()


def markdown(page: Page) -> str:
    """Render the same figures as Markdown, without plots and pictures."""
    text = _environment(autoescape=False).get_template("model_card.md.j2").render(page=page)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _environment(*, autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("msn_export.report", "."),
        autoescape=autoescape,  # noqa: S701  Markdown has its own escapes: _cell
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    environment.filters["line"] = _line
    return environment


def _plots(page: Page) -> dict[str, str]:
    drawn = {}
    sized = [artifact for artifact in page.artifacts if artifact.bytes is not None]
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
        if artifact.engine is not None:
            drawn[f"kinds {artifact.name}"] = plots.kinds(artifact)
            drawn[f"blocks {artifact.name}"] = plots.per_block(artifact)
    if page.latency is not None and page.latency.bars:
        drawn["latency"] = plots.latency(page.latency)
    return drawn


def _cell(text: str) -> str:
    """Keep a file's name or a note from being Markdown."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", _line(text))


def _line(text: str) -> str:
    return " ".join(str(text).split())
