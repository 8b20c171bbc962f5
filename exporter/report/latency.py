"""Read a benchmark's JSON for the report: what ``msn-export bench --json`` wrote, or any table."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from msn_export.errors import SpecError
from msn_export.report.facts import Latency

LIMIT = 16 * 2**20  # bytes; a benchmark is kilobytes
_TITLES = {
    "contender": "what",
    "median_ms": "median ms",
    "p90_ms": "p90 ms",
    "p99_ms": "p99 ms",
    "images_per_second": "images/s",
    "ratio.median": "time / baseline",
    "agreement.cosine_min": "cosine min",
}


def read_latency(path: Path, hashes: Mapping[str, Collection[str]]) -> Latency:
    """Read a benchmark; of a file we do not know, its first list of records.

    Args:
        path: the benchmark.
        hashes: the sha256 of each artifact of the report, by file name.

    Raises:
        SpecError: it is not JSON, has no table in it, or timed another file of the same name.
    """
    try:
        if path.stat().st_size > LIMIT:
            raise SpecError(f"--bench {path} is larger than a benchmark can be")
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(
            f"--bench {path} cannot be read as JSON ({error}); write it with "
            "'msn-export bench … --json > FILE.json'"
        ) from error
    _require_same_files(plain, path, hashes)
    rows = [_flat(row) for row in _rows(plain)]
    if not rows:
        raise SpecError(f"--bench {path} has no timings in it; expected what 'bench --json' prints")
    known = [name for name in ("contender", "batch", *list(_TITLES)[1:]) if name in rows[0]]
    columns = known if "median_ms" in known else list(rows[0])
    return Latency(
        title=_title(plain, path),
        columns=tuple(_TITLES.get(name, name) for name in columns),
        rows=tuple(tuple(_shown(row.get(name)) for name in columns) for row in rows),
        bars=tuple(_bar(row) for row in rows if isinstance(row.get("median_ms"), int | float)),
        notes=_notes(plain),
    )


def _require_same_files(plain: Any, path: Path, hashes: Mapping[str, Collection[str]]) -> None:
    contenders = plain.get("contenders") if isinstance(plain, Mapping) else None
    for one in contenders if isinstance(contenders, list) else []:
        file, timed = (one.get("file"), one.get("sha256")) if isinstance(one, Mapping) else (0, 0)
        if not isinstance(file, str) or not isinstance(timed, str):
            continue  # not an artifact of ours: PyTorch, or a benchmark by another tool
        here = hashes.get(Path(file).name)
        if here is not None and timed not in here:
            raise SpecError(
                f"--bench {path} timed another {Path(file).name} (sha256 {timed[:12]}…, this one "
                f"has {min(here)[:12]}…); run msn-export bench again"
            )


def _is_record(plain: Any) -> bool:
    return isinstance(plain, Mapping)


def _rows(plain: Any) -> list[Mapping[str, Any]]:
    """Find the table: ``timings``, or the first list of records there is."""
    lists: list[Any] = [plain]
    if isinstance(plain, Mapping):
        lists = [plain.get("timings"), *plain.values()]
    for found in lists:
        if isinstance(found, list) and found and all(isinstance(row, Mapping) for row in found):
            return found
    return []


def _notes(plain: Any) -> tuple[str, ...]:
    notes = plain.get("notes") if isinstance(plain, Mapping) else None
    return tuple(str(note) for note in notes) if isinstance(notes, list) else ()


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give a record's numbers and texts; those of a record inside it as ``outer.inner``."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping) and not prefix:
            flat |= _flat(value, f"{name}.")
        elif isinstance(value, str | int | float) or value is None:
            flat[f"{prefix}{name}"] = value
    return flat


def _bar(row: Mapping[str, Any]) -> tuple[str, float]:
    what = str(row.get("contender", row.get("name", "?")))
    batch = f", batch {row['batch']}" if "batch" in row else ""
    return f"{what}{batch}", float(row["median_ms"])


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _title(plain: Any, path: Path) -> str:
    if not _is_record(plain):
        return path.name
    machine = plain.get("machine")
    parts = [machine.get(name) for name in ("cpu", "gpu")] if isinstance(machine, Mapping) else []
    where = ", ".join(str(part) for part in parts if part)
    against = f"times over {plain['baseline']}" if plain.get("baseline") else ""
    return "; ".join(filter(None, (where, against, str(plain.get("created") or "")))) or path.name
