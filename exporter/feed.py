"""What an open artifact takes: bytes or normalised planes, and how a picture becomes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from msn_export import images
from msn_export.errors import GraphError, SpecError
from msn_export.processor_config import choose
from msn_export.spec import ImageSize, InputFormat

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from msn_export.manifest import Manifest
    from msn_export.preprocessing import Exif, Preprocessing
    from msn_export.spec import TensorSpec

_DTYPES = {"float": np.float32, "float16": np.float16, "uint8": np.uint8}  # as ONNX spells them


@dataclass(frozen=True, slots=True)
class Feed:
    """How an artifact is fed; ``fixed`` is a size that the artifact itself leaves open."""

    kind: InputFormat
    dtype: str
    preprocessing: Preprocessing
    fixed: ImageSize | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What users must know of it."""
        size = f"its image size was dynamic, and is {self.fixed} as its position embedding has it"
        return (*self.preprocessing.notes, *([] if self.fixed is None else [size]))

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Turn decoded pictures [b, h, w, c] into the artifact's input."""
        if self.kind is InputFormat.UINT8:
            return pixels
        return images.normalize(pixels, self.preprocessing).astype(_DTYPES[self.dtype], copy=False)


def feed_of(
    name: str,
    inputs: Sequence[TensorSpec],
    manifest: Manifest | None,
    *,
    preprocess: str | None = None,
    exif: Exif | None = None,
    size: ImageSize | Path | None = None,
) -> Feed:
    """Find out how an artifact is fed.

    Args:
        name: of the artifact, for messages.
        inputs: what its runner says it takes.
        manifest: where its preprocessing stands; without one, ``hf`` is assumed and noted.
        preprocess: a preset or JSON file that is to be used instead.
        exif: instead of what the manifest says.
        size: of a graph that leaves height and width open, or its file: its position embedding
            may tell.

    Raises:
        GraphError: it does not take one image input.
        SpecError: height and width are open and no ``size`` says them, or another than they are;
            or ``preprocess`` is unknown.
    """
    if len(inputs) != 1:
        names = ", ".join(repr(spec.name) for spec in inputs) or "nothing"
        raise GraphError(f"{name} takes {names}; expected one image input")
    spec = inputs[0]
    described = f"{name}: input {spec.name!r} is {spec.dtype}{list(spec.shape)}"
    if spec.dtype not in _DTYPES or len(spec.shape) != 4:
        raise GraphError(f"{described}; expected float [b, c, h, w] or uint8 [b, h, w, c] images")
    kind = InputFormat.UINT8 if spec.dtype == "uint8" else InputFormat.FLOAT
    _, *rest = spec.shape
    channels, *sides = (rest[2], *rest[:2]) if kind is InputFormat.UINT8 else rest
    known = manifest.preprocessing if manifest is not None else None
    given = size if isinstance(size, ImageSize) else known.size if known else None
    fixed = None
    if given is None and isinstance(size, Path) and not _are_fixed(sides):
        given = fixed = _size_in(size)
    found = _size(described, sides, given)
    count = channels if isinstance(channels, int) else 3
    inside = kind is InputFormat.UINT8
    made = choose(known, found, count, preprocess=preprocess, exif=exif, inside=inside)
    return Feed(kind, spec.dtype, made, fixed)


def _size_in(file: Path) -> ImageSize | None:
    """Read the image size off a graph's position embedding, where onnx is installed."""
    if file.suffix != ".onnx":
        return None
    try:
        from msn_export.graph import io
        from msn_export.graph.shapes import fix_image_size
    except ImportError:
        return None
    return fix_image_size(io.load(file))


def _are_fixed(sides: Sequence[int | str]) -> bool:
    return all(isinstance(side, int) for side in sides)


def _size(described: str, sides: Sequence[int | str], given: ImageSize | None) -> ImageSize:
    height, width = sides
    if isinstance(height, int) and isinstance(width, int):
        fixed = ImageSize(height, width)
        if given is not None and given != fixed:
            raise SpecError(f"{described}; images of {given} do not fit")
        return fixed
    if given is None:
        raise SpecError(f"{described}; it leaves height and width open, --image-size says them")
    return given
