"""Whether two sets of embeddings put the same image next to each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export.errors import ToleranceError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def neighbour_agreement(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    """Give the share of images whose nearest other image, by cosine, is the same in both.

    Args:
        reference: embeddings [b, ...], each flattened to one vector.
        candidate: those of another artifact for the same images.

    Returns:
        A share from 0 to 1; an image whose candidate embedding is not finite never agrees. NaN
        where there is no other image to be next to.

    Raises:
        ToleranceError: the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise ToleranceError(
            f"embeddings have shape {list(candidate.shape)} and their reference "
            f"{list(reference.shape)}; they must be the same"
        )
    if len(reference) < 2:
        return float("nan")
    nearest = _nearest(reference)
    known = np.isfinite(candidate.reshape(len(candidate), -1)).all(axis=1)
    return float(np.mean((nearest == _nearest(candidate)) & known))


def _nearest(embeddings: NDArray[Any]) -> NDArray[np.intp]:
    """Name each image's nearest other image; the first of equals."""
    flat = embeddings.reshape(len(embeddings), -1).astype(np.float64)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    unit = np.divide(flat, norms, out=np.zeros_like(flat), where=norms > 0)
    similarity = np.nan_to_num(unit @ unit.T, nan=-np.inf)
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity.argmax(axis=1))
