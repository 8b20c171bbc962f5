"""Images as they are given, checked against what the artifact takes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msn_export.errors import InputError
from msn_export.runtime.elements import OF_NUMPY, OF_ONNX, Element
from msn_export.spec import TensorSpec


def require_fit(shape: Sequence[int], element: Element, spec: TensorSpec) -> None:
    """Require a batch's dtype and shape to be the artifact's; the number of images is free.

    So is each size that the artifact gives as a name: a graph of another tool may leave more open.

    Raises:
        InputError: they are not.
    """
    wanted = OF_ONNX[spec.dtype]
    if element is not wanted:
        raise InputError(
            f"images are {element}; input {spec.name!r} takes {wanted}{_remedy(element, wanted)}"
        )
    fits = len(shape) == len(spec.shape) and all(
        isinstance(want, str) or want == size
        for size, want in zip(shape[1:], spec.shape[1:], strict=True)
    )
    if not fits:
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
