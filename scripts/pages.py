"""The parts of pages that scripts write, between marks."""

import re
from pathlib import Path


def replace_part(page: Path, name: str, part: str) -> None:
    """Replace what a page has between the marks of a name."""
    text = page.read_text(encoding="utf-8")
    pattern = rf"(<!-- measured: {name} -->\n).*?(\n<!-- /measured -->)"
    changed, times = re.subn(pattern, lambda m: m[1] + part + m[2], text, flags=re.DOTALL)
    if times != 1:
        raise SystemExit(f"{page} has {times} places for the table {name!r}; expected one")
    page.write_text(changed, encoding="utf-8")
