"""The input that a model takes, made of pictures.

Nothing heavy is loaded here: what runs an artifact needs neither onnx nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msn_export import images
from msn_export.errors import GraphError, SpecError
from msn_export.manifest import Manifest
from msn_export.onnx_header import UNSEALED, GraphMetadata
from msn_export.preprocessing import Exif, Preprocessing
from msn_export.processor_config import choose
from msn_export.spec import ImageSize, InputFormat, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Feed:
    """A model's input, made of pictures; ``fixed`` is a size that the model itself leaves open.

    ``unsealed``: the graph's own file says how they are made, without a manifest.
    """

    input_format: InputFormat
    preprocessing: Preprocessing
    fixed: ImageSize | None = None
    unsealed: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        size = f"its image size was dynamic, and is {self.fixed} as its position embedding has it"
        return (
            *([UNSEALED] if self.unsealed else []),
            *self.preprocessing.notes,
            *([] if self.fixed is None else [size]),
        )

    def __call__(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Turn decoded pictures [b, h, w, c] into the artifact's input."""
        return images.model_input(pixels, self.preprocessing, self.input_format)


def feed_of(
    name: str,
    inputs: Sequence[TensorSpec],
    stated: Manifest | GraphMetadata | None,
    *,
    preprocess: str | None = None,
    exif: Exif | None = None,
    size: ImageSize | Path | None = None,
) -> Feed:
    """Find out how an artifact is fed.

    Args:
        name: of the artifact, for messages.
        inputs: what its runner says it takes.
        stated: where its preprocessing stands; without one, ``hf`` is assumed and noted.
        preprocess: a preset or JSON file that is to be used instead.
        exif: instead of what that says.
        size: of a graph that leaves height and width open, or its file: its position embedding
            may tell.
    """
    if len(inputs) != 1:
        names = ", ".join(repr(spec.name) for spec in inputs) or "nothing"
        raise GraphError(f"{name} takes {names}; expected one image input")
    spec = inputs[0]
    described = f"{name}: input {spec.name!r} is {spec.dtype}{list(spec.shape)}"
    formats = {one.value for one in InputFormat}
    if spec.dtype not in formats or len(spec.shape) != 4:
        raise GraphError(f"{described}; expected float [b, c, h, w] or uint8 [b, h, w, c] images")
    taken = InputFormat(spec.dtype)
    inside = taken is InputFormat.UINT8
    _, *rest = spec.shape
    channels, *sides = (rest[2], *rest[:2]) if inside else rest
    own = stated.preprocessing if stated is not None else None
    given = size if isinstance(size, ImageSize) else own.size if own else None
    fixed = None
    if given is None and isinstance(size, Path) and not all(isinstance(s, int) for s in sides):
        given = fixed = _size_in(size)
    found = _size(described, sides, given)
    count = channels if isinstance(channels, int) else 3
    if isinstance(stated, GraphMetadata):
        stated.require_fit(found, count, name)
    chosen = choose(own, found, count, preprocess=preprocess, exif=exif, inside=inside)
    return Feed(taken, chosen, fixed, unsealed=isinstance(stated, GraphMetadata))


def _size_in(file: Path) -> ImageSize | None:
    """Read the image size off a graph's position embedding, where onnx is installed."""
    if file.suffix != ".onnx":
        return None
    try:
        from msn_export.graph import io
        from msn_export.graph.simplify import fix_image_size
    except ImportError:
        return None
    return fix_image_size(io.load(file))


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
