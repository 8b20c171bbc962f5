"""The page of commands is the help that they print."""

import commands


def test_the_page_is_current() -> None:
    written = commands.PAGE.read_text(encoding="utf-8")
    assert written == commands.page(), "python scripts/commands.py writes it again"
