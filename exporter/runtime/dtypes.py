"""One row a dtype: what ONNX, NumPy, DLPack and TensorRT call it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TensorType:
    """A dtype of an input or output.

    ``onnx`` is the name manifests use (ONNX's, in lower case) and ``number`` its number in
    onnx.TensorProto.DataType; ``code`` and ``bits`` are DLPack's; ``numpy`` is None for bfloat16,
    which NumPy cannot name: its bytes travel as uint16.
    """

    onnx: str
    number: int
    code: int
    bits: int
    numpy: str | None
    tensorrt: str | None

    def __str__(self) -> str:
        return self.numpy or self.onnx

    @property
    def bytes(self) -> int:
        """Size of one value."""
        return self.bits // 8

    @property
    def storage(self) -> np.dtype[np.generic]:
        """The NumPy dtype whose arrays hold the bytes."""
        return np.dtype(self.numpy or "uint16")


ELEMENTS = (
    TensorType("float", 1, 2, 32, "float32", "FLOAT"),
    TensorType("float16", 10, 2, 16, "float16", "HALF"),
    TensorType("bfloat16", 16, 4, 16, None, "BF16"),
    TensorType("double", 11, 2, 64, "float64", None),
    TensorType("uint8", 2, 1, 8, "uint8", "UINT8"),
    TensorType("int8", 3, 0, 8, "int8", "INT8"),
    TensorType("int32", 6, 0, 32, "int32", "INT32"),
    TensorType("int64", 7, 0, 64, "int64", "INT64"),
    TensorType("bool", 9, 6, 8, "bool", "BOOL"),
)
OF_ONNX = {element.onnx: element for element in ELEMENTS}
OF_NUMPY = {element.storage: element for element in ELEMENTS if element.numpy}
OF_DLPACK = {(element.code, element.bits): element for element in ELEMENTS}
OF_TENSORRT = {element.tensorrt: element for element in ELEMENTS if element.tensorrt}


def widen(bfloat16: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Give bfloat16 values, as their bytes, as float32: exact, it has the same exponent."""
    return (bfloat16.astype(np.uint32) << np.uint32(16)).view(np.float32)
