"""A small seeded input and what the reference makes of it, to test an artifact with elsewhere.

The input is a recipe, not data: bytes of NumPy's PCG64, whose stream NumPy keeps from version to
version (what ``Generator`` draws from it, it does not: numpy.org/neps/nep-0019).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msn_export import images
from msn_export.errors import ManifestError
from msn_export.manifest import GoldenRecord
from msn_export.preprocessing import Preprocessing
from msn_export.spec import InputFormat

GENERATOR = "numpy.random.PCG64.random_raw, little endian"
SEED = 2022  # the year of the paper
MARGIN = 1.5  # msn_export.metrics.tolerances.MARGIN, which is above this module
COUNT = 2  # images: enough to tell a batch from one image


def record(
    run: Callable[[NDArray[Any]], Mapping[str, NDArray[Any]]],
    reference: str,
    preprocessing: Preprocessing,
    input_format: InputFormat,
    count: int = COUNT,
) -> GoldenRecord:
    """Run the reference on the golden input and keep the first vector of its first output.

    ``count`` is the number of images, where memory does not afford two.
    """
    size = preprocessing.size
    shape = (min(count, COUNT), size.height, size.width, preprocessing.channels)
    outputs = run(images.model_input(draw(SEED, shape), preprocessing, input_format))
    name = next(iter(outputs))
    values = vectors(outputs[name])
    return GoldenRecord(
        generator=GENERATOR,
        seed=SEED,
        shape=shape,
        output=name,
        dim=values.shape[1],
        values=base64.b64encode(values.astype("<f4").tobytes()).decode("ascii"),
        reference=reference,
    )


def with_limit(
    golden: GoldenRecord,
    run: Callable[[NDArray[Any]], Mapping[str, NDArray[Any]]],
    preprocessing: Preprocessing,
    input_format: InputFormat,
    least: float,
) -> GoldenRecord:
    """Add what a machine's relative error may be: 1.5 times what the artifact's own is here.

    The limit is not below ``least``, which was allowed on pictures. Nothing bounds it above: noise
    is no picture, and what a precision costs on it may be four times as much.
    """
    have = vectors(np.asarray(run(input_of(golden, preprocessing, input_format))[golden.output]))
    want = values_of(golden).astype(np.float64)
    error = float(np.linalg.norm(want - have) / np.linalg.norm(want))
    return replace(golden, limit=float(np.maximum(MARGIN * error, least)))


def draw(seed: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Draw pixels [b, h, w, c]."""
    size = int(np.prod(shape))
    words = np.random.PCG64(seed).random_raw((size + 7) // 8)
    return np.asarray(words, "<u8").view(np.uint8)[:size].reshape(shape)


def vectors(output: NDArray[Any]) -> NDArray[np.float32]:
    """Take one vector an image: of tokens [b, n, dim] the first, which is [CLS]."""
    rows = output[:, 0] if output.ndim == 3 else output.reshape(len(output), -1)
    return np.ascontiguousarray(rows, np.float32)


def input_of(
    golden: GoldenRecord, preprocessing: Preprocessing, input_format: InputFormat
) -> NDArray[Any]:
    size = preprocessing.size
    one = (size.height, size.width, preprocessing.channels)
    fits = len(golden.shape) == 4 and 1 <= golden.shape[0] <= COUNT and golden.shape[1:] == one
    if golden.generator != GENERATOR or not fits or golden.seed < 0:
        raise ManifestError(
            f"the manifest's golden input ({golden.generator}, {list(golden.shape)}) is none this "
            "version can draw; upgrade msn-export or export the artifact again"
        )
    return images.model_input(draw(golden.seed, golden.shape), preprocessing, input_format)


def values_of(golden: GoldenRecord) -> NDArray[np.float32]:
    try:
        values = np.frombuffer(base64.b64decode(golden.values, validate=True), "<f4")
        return values.reshape(golden.shape[0], golden.dim).astype(np.float32)
    except (binascii.Error, ValueError, IndexError) as error:
        raise ManifestError(
            f"the manifest's golden values cannot be read ({error}); export the artifact again"
        ) from error
