"""Pictures and rows as the records that Ray Data moves: plain columns, whatever a batch's size."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from msn_export.embed.rows import BEST, Rows

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

Record: TypeAlias = "dict[str, Any]"


def pixels_to(start: int, pixels: NDArray[np.uint8], errors: Mapping[int, str]) -> Record:
    """Write a batch of pictures [b, h, w, c] and why some are black."""
    return {
        "start": start,
        "shape": json.dumps(pixels.shape),
        "pixels": pixels.tobytes(),
        "errors": json.dumps(errors),
    }


def pixels_from(record: Record) -> tuple[int, NDArray[np.uint8], dict[int, str]]:
    """Read what ``pixels_to`` wrote."""
    pixels = np.frombuffer(record["pixels"], np.uint8).reshape(json.loads(record["shape"]))
    return int(record["start"]), pixels.copy(), _errors(record)  # a runner may refuse read-only


def rows_to(start: int, rows: Rows) -> Record:
    """Write a batch of rows."""
    return {
        "start": start,
        "shape": json.dumps(rows.vectors.shape),
        "vectors": rows.vectors.tobytes(),
        "best": b"" if rows.best is None else rows.best.tobytes(),
        "errors": json.dumps(rows.errors),
    }


def rows_from(record: Record) -> tuple[int, Rows]:
    """Read what ``rows_to`` wrote."""
    vectors = np.frombuffer(record["vectors"], np.float32).reshape(json.loads(record["shape"]))
    best = np.frombuffer(record["best"], BEST) if record["best"] else None
    return int(record["start"]), Rows(vectors, best, _errors(record))


def _errors(record: Record) -> dict[int, str]:
    return {int(index): text for index, text in json.loads(record["errors"]).items()}
