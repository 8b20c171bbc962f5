"""Pictures and rows as the records that Ray Data moves: plain columns, whatever a batch's size."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from msn_export import errors as failures
from msn_export.embed.rows import BEST, Rows
from msn_export.errors import ClusterError, MsnExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

Record: TypeAlias = "dict[str, Any]"


def pixels_to(
    start: int, pixels: NDArray[np.uint8], errors: Mapping[int, str], turned: int
) -> Record:
    """Write a batch of pictures [b, h, w, c] and why some are black."""
    return {
        "start": start,
        "shape": json.dumps(pixels.shape),
        "pixels": pixels.tobytes(),
        "errors": json.dumps(errors),
        "turned": turned,
    }


def pixels_from(record: Record) -> tuple[int, NDArray[np.uint8], dict[int, str], int]:
    """Read what ``pixels_to`` wrote."""
    pixels = np.frombuffer(record["pixels"], np.uint8).reshape(json.loads(record["shape"]))
    # copied: a runner may refuse read-only memory
    return int(record["start"]), pixels.copy(), _errors(record), int(record["turned"])


def rows_to(start: int, rows: Rows) -> Record:
    """Write a batch of rows."""
    return {
        "start": start,
        "shape": json.dumps(rows.vectors.shape),
        "vectors": rows.vectors.tobytes(),
        "best": b"" if rows.best is None else rows.best.tobytes(),
        "errors": json.dumps(rows.errors),
        "turned": rows.turned,
        "failure": "",
    }


def failure_to(error: MsnExportError) -> Record:
    """Write why there are no rows.

    As a record it comes after the rows that were made before it. Raised, it would overtake them:
    Ray Data drops what is on its way, and a resumed run would make it again.
    """
    nothing = Rows(np.zeros((0, 0), np.float32))
    return rows_to(0, nothing) | {"failure": json.dumps([type(error).__name__, str(error)])}


def rows_from(record: Record) -> tuple[int, Rows]:
    """Read what ``rows_to`` wrote.

    Raises:
        MsnExportError: ``failure_to`` wrote it; of the same type, with the same message.
    """
    if record["failure"]:
        name, text = json.loads(record["failure"])
        kind = getattr(failures, name, None)
        if isinstance(kind, type) and issubclass(kind, MsnExportError):
            raise kind(text)
        raise ClusterError(text)
    vectors = np.frombuffer(record["vectors"], np.float32).reshape(json.loads(record["shape"]))
    best = np.frombuffer(record["best"], BEST) if record["best"] else None
    rows = Rows(vectors, best, _errors(record), int(record["turned"]))
    return int(record["start"]), rows


def _errors(record: Record) -> dict[int, str]:
    return {int(index): text for index, text in json.loads(record["errors"]).items()}
