"""The page of a search: each picture that was asked for, and its nearest ones, as thumbnails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from msn_export.reporting.confusion import visible
from msn_export.reporting.render import environment

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class ShownPicture:
    """A picture as a data URI, empty where it cannot be read, and lines below it."""

    thumbnail: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ShownQuery:
    """A picture that was asked for, and its neighbours, the nearest first."""

    picture: ShownPicture
    neighbours: tuple[ShownPicture, ...]


@dataclass(frozen=True, slots=True)
class SearchPage:
    """All that the page shows; ``facts`` are rows of a name and a text."""

    index: str
    images: int
    queries: tuple[ShownQuery, ...]
    facts: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    command: str
    written: str
    product: str


def write_page(page: SearchPage, path: Path) -> None:
    """Write the page: one file that loads nothing."""
    opened = environment(autoescape=True)
    # whoever names a class or a file may have put anything in it
    opened.finalize = lambda value: value if isinstance(value, Markup) else visible(str(value))
    text = opened.get_template("search.html.j2").render(page=page)
    path.write_text(text.lstrip(), encoding="utf-8")
