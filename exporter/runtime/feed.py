"""Images as they are given, checked against what the artifact takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import InputError
from msn_export.runtime.elements import OF_NUMPY, OF_ONNX, Element
from msn_export.spec import TensorSpec


def require_fit(shape: Sequence[int], element: Element, spec: TensorSpec) -> None:
    """Require a batch's dtype and shape to be the artifact's.

    The number of images is free, and so is a size that a graph of another tool leaves open.

    Raises:
        InputError: they are not.
    """
    wanted = OF_ONNX[spec.dtype]
    if element is not wanted:
        raise InputError(
            f"images are {element}; input {spec.name!r} takes {wanted}{_remedy(element, wanted)}"
        )
    sizes = zip(shape[1:], spec.shape[1:], strict=False)
    fits = all(isinstance(wants, str) or size == wants for size, wants in sizes)
    if not fits or len(shape) != len(spec.shape):
        expected = ", ".join(str(size) for size in ("b", *spec.shape[1:]))
        hint = "; give one image as images[None]" if tuple(shape) == spec.shape[1:] else ""
        raise InputError(
            f"images have shape {list(shape)}; input {spec.name!r} takes [{expected}]{hint}"
        )


def element_of(array: NDArray[Any]) -> Element:
    """Find the dtype of a NumPy array.

    Raises:
        InputError: no artifact takes it.
    """
    element = OF_NUMPY.get(array.dtype)
    if element is None:
        raise InputError(f"images are {array.dtype}; expected a plain float, integer or bool")
    return element


def pad(images: NDArray[Any], size: int) -> NDArray[Any]:
    """Fill a batch up to ``size`` with zeros."""
    if len(images) == size:
        return images
    padded = np.zeros((size, *images.shape[1:]), images.dtype)
    padded[: len(images)] = images
    return padded


def _remedy(element: Element, wanted: Element) -> str:
    if wanted.numpy is None:
        return "; NumPy has no bfloat16, give a torch tensor"
    if element.numpy == "uint8":
        return "; runner.preprocess() gives what it takes, normalised"
    return ""
