"""Nearest neighbours: what a search over embeddings answers, and whether it answers the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.errors import ToleranceError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def embedding_of(output: NDArray[Any]) -> NDArray[Any]:
    """Make one vector an image of an output [b, ...]: of tokens [b, n, dim] the [CLS] token."""
    first: NDArray[Any] = output[:, 0] if output.ndim == 3 else output.reshape(len(output), -1)
    return first


def nearest(embeddings: NDArray[Any]) -> NDArray[np.intp]:
    """Find each image's nearest other image by cosine, from embeddings [n, dim].

    Raises:
        ToleranceError: there are fewer than two images.
    """
    if len(embeddings) < 2:
        raise ToleranceError(f"{len(embeddings)} image has no neighbour; give at least two")
    vectors = embeddings.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        parts = [
            _nearest_of(vectors, start, vectors[start : start + _ROWS])
            for start in range(0, len(vectors), _ROWS)
        ]
    return np.concatenate(parts)


_ROWS = 1024  # of n x n cosines at once: those of 10,000 images would take 800 MB


def _nearest_of(
    vectors: NDArray[np.float64], start: int, rows: NDArray[np.float64]
) -> NDArray[np.intp]:
    cosines = rows @ vectors.T
    at = np.arange(len(rows))
    cosines[at, start + at] = -np.inf
    neighbours: NDArray[np.intp] = cosines.argmax(axis=1)
    return neighbours


def class_agreement(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """Give the share of images of the same class in both logits, [n, classes] each.

    An image whose logits are not finite in the candidate has none.
    """
    same = reference.argmax(axis=1) == candidate.argmax(axis=1)
    return float((same & np.isfinite(candidate).all(axis=1)).mean())


def neighbour_agreement(reference: NDArray[Any], candidate: NDArray[Any]) -> float | None:
    """Give the share of images whose nearest neighbour is the same in both, [n, dim] each.

    None of one or two images, whose neighbours always agree. An image whose embedding is not finite
    in either agrees with nothing.

    Raises:
        ToleranceError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ToleranceError(
            f"embeddings have shapes {list(reference.shape)} and {list(candidate.shape)}; "
            "they must be the same"
        )
    if len(reference) < 3:
        return None
    same = nearest(reference) == nearest(candidate)
    finite = np.isfinite(reference).all(axis=1) & np.isfinite(candidate).all(axis=1)
    return float((same & finite).mean())
