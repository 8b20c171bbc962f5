"""Distributions that look installed: a folder to put on the path, as pip would have left it."""

from collections.abc import Mapping
from pathlib import Path


def install(
    site: Path,
    name: str,
    version: str,
    files: Mapping[str, str] | None = None,
    requires: tuple[str, ...] = (),
) -> None:
    """Write a distribution's files and its metadata."""
    for path, content in (files or {}).items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(content)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in files or {}))
