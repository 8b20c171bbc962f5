"""A fitted classifier, read back from its graph: its checkpoint does not have it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from msn_export import manifest as manifests
from msn_export.errors import GraphError
from msn_export.graph import io
from msn_export.manifest import Manifest, sha256_of
from msn_export.models.config import LinearClassifier, Pooling

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

POOLING: Mapping[str, Pooling] = {"msn": "features", "embedding": "cls"}  # by kind of features


def fitted_classifier(path: Path, manifest: Manifest) -> LinearClassifier:
    """Find the fp32 weights that a classifier was fitted with, by their hash.

    They are in the graph that ``msn-export fit`` wrote: the artifact itself, or the graph beside it
    that it was made from.

    Args:
        path: the artifact.
        manifest: its own, whose ``fit`` has the hash.

    Raises:
        GraphError: they are in neither.
    """
    record = manifest.fit
    assert record is not None  # asked of fitted ones alone
    for file in _graphs(path, manifest):
        for weight in _matrices(file, record.classes):
            if hashlib.sha256(weight.tobytes()).hexdigest() == record.weights:
                pooling = POOLING[record.features]
                return LinearClassifier(weight, manifest.labels, pooling, record.blocks)
    raise GraphError(
        f"{path} has a classifier that was fitted on {record.labelled}, which the checkpoint does "
        "not have, and the fp32 graph that msn-export fit wrote is not beside it; put it there, or "
        "compare with that graph"
    )


def _graphs(path: Path, manifest: Manifest) -> Iterator[Path]:
    """Give the artifact if it is a graph, then those beside it that it was made from, in order."""
    seen = {path}
    while True:
        if path.suffix == ".onnx":
            yield path
        source = manifest.source
        beside = path.parent / Path(source.file).name if source is not None else path
        if source is None or beside in seen or not beside.is_file():
            return
        found = manifests.read(beside)
        if found is None or sha256_of(beside) != source.sha256:
            return
        path, manifest = beside, found
        seen.add(path)


def _matrices(path: Path, classes: int) -> Iterator[NDArray[np.float32]]:
    """Give the graph's fp32 matrices of ``classes`` rows, or columns, as rows."""
    for value in io.load(path).graph.initializers.values():
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2 or classes not in tensor.shape.numpy():
            continue
        array = tensor.numpy()
        if array.dtype == np.float32:
            for matrix in (array, array.T):
                if len(matrix) == classes:
                    yield np.array(matrix, order="C")  # torch takes none that is read-only
