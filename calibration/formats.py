"""The two 8-bit number formats, and the scales that carry floats to them and back.

Both are symmetric with zero point 0, which is all that TensorRT takes:
``x`` becomes ``round(x / scale)``, saturated at the format's largest value.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.errors import GraphError
from msn_export.spec import Dtype


@dataclass(frozen=True, slots=True)
class Format:
    """An 8-bit format: its ONNX type, and ``largest``, the value a range's end is mapped to."""

    dtype: Dtype
    onnx: ir.DataType
    largest: float

    def encode(self, scaled: NDArray[Any]) -> NDArray[Any]:
        """Round and saturate values that were divided by their scale."""
        clipped: NDArray[Any] = np.clip(scaled, -self.largest, self.largest)
        if self.dtype is Dtype.INT8:
            clipped = np.rint(clipped)
        return clipped.astype(self.onnx.numpy())

    def carry(self, x: NDArray[Any], scale: NDArray[Any] | float) -> NDArray[np.float32]:
        """Quantise and dequantise, as a Q/DQ pair does."""
        return self.encode(x / scale).astype(np.float32) * np.asarray(scale, np.float32)


# int8 without -128, so that it is symmetric: TensorRT, "Working with Quantized Types".
INT8 = Format(Dtype.INT8, ir.DataType.INT8, 127.0)
# E4M3 as ONNX's FLOAT8E4M3FN: largest finite value 1.75 * 2**8 (arXiv 2209.05433, table 1).
FP8 = Format(Dtype.FP8, ir.DataType.FLOAT8E4M3FN, 448.0)
FORMATS = {Dtype.INT8: INT8, Dtype.FP8: FP8}

_TYPES: dict[Dtype, Any] = {
    Dtype.FP32: np.float32,
    Dtype.FP16: np.float16,
    Dtype.BF16: ml_dtypes.bfloat16,
}


def scales(thresholds: NDArray[Any] | float, form: Format, base: Dtype) -> NDArray[np.float32]:
    """Give the scale that maps each threshold to the format's largest value, as float32.

    Every scale is a number that ``base`` holds exactly, for the graph is typed afterwards and what
    was rounded with one scale must be multiplied with the same; rounding goes up, so that nothing
    more is cut off. A threshold of zero (a channel that is zero for every image) has scale 1.

    Raises:
        GraphError: a scale is larger than ``base`` can hold.
    """
    exact = np.asarray(thresholds, np.float64) / form.largest
    kind = _TYPES[base]
    with np.errstate(over="ignore"):
        rounded = exact.astype(kind)
        up = np.nextafter(rounded, np.asarray(np.inf, kind))
    held = np.where(rounded.astype(np.float64) < exact, up, rounded).astype(np.float32)
    if not np.isfinite(held).all():
        raise GraphError(
            f"a range of {np.max(thresholds):.3g} needs a scale of {np.max(exact):.3g}, which "
            f"{base} does not hold; calibrate with --base bf16"
        )
    return np.where(exact > 0, held, np.float32(1.0)).astype(np.float32)
