"""What a test reads off an HTML page without opening it."""

from html.parser import HTMLParser
from pathlib import Path


class Reader(HTMLParser):
    """Collects elements, what they would fetch, and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take an element."""
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in {"src", "srcset", "href", "xlink:href", "data", "action"} and value:
                self.fetched.append(value)


def read(path: Path) -> Reader:
    """Read a page."""
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    return reader
