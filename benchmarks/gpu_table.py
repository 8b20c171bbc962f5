"""The rows of a GPU benchmark as JSON and as a Markdown table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD = """| model | batch | | ms | images/s | of SDPA's time | of the ceiling | worst cosine | max_abs |
|---|---|---|---|---|---|---|---|---|
"""


def line(row: dict[str, Any]) -> str:
    """Give a row of the Markdown table."""
    start = f"| {row['model']} | {row['batch']} | {row['contender']} |"
    if "reason" in row:
        return f"{start} not run: {row['reason'].replace('|', '/')} | | | | | |"
    low, high = row["ratio_quartiles"]
    return (
        f"{start} {row['ms']:.3f} | {row['images_s']:.0f} | {row['ratio']:.2f} "
        f"({low:.2f} to {high:.2f}) | {row['of_ceiling']:.0%} | {row['cosine_min']:.6f} | "
        f"{row['max_abs']:.1e} |"
    )


def write(output: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write what was measured so far, as ``output`` and as Markdown beside it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(about | {"rows": rows}, indent=2) + "\n")
    output.with_suffix(".md").write_text(HEAD + "\n".join(map(line, rows)) + "\n")
