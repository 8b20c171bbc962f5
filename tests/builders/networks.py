"""A network small enough to compute by hand, exact in every precision that can run it.

Inputs are 0 to 3 and weights -1, 0 or 1 over twelve values: every sum is an integer of at most 36,
which bfloat16 and TF32 hold exactly. So a GPU must give the very numbers NumPy gives.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from msn_export.graph import io
from msn_export.runtime.dlpack import OF_ONNX
from tests.builders.graphs import parse


@dataclass(frozen=True)
class Network:
    """Flattens each image and multiplies it with one matrix an output.

    ``outputs`` are (name, dtype, width). A row of three floats is 12 bytes: not aligned.
    """

    profiles: tuple[tuple[int, int, int], ...] = ((1, 4, 8),)
    outputs: tuple[tuple[str, str, int], ...] = (("embedding", "float", 64), ("odd", "float", 3))
    input: str = "pixel_values"
    dtype: str = "float"
    sizes: tuple[int, ...] = (3, 2, 2)
    is_static: bool = False

    def dtype_of(self, name: str) -> str:
        return next((kind for one, kind, _ in self.outputs if one == name), self.dtype)

    def sizes_of(self, name: str) -> tuple[int, ...]:
        return next(((width,) for one, _, width in self.outputs if one == name), self.sizes)

    def to_json(self) -> dict[str, Any]:
        return vars(self)

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Self:
        deep = {
            "profiles": tuple(map(tuple, plain["profiles"])),
            "outputs": tuple(map(tuple, plain["outputs"])),
            "sizes": tuple(plain["sizes"]),
        }
        return cls(**{**plain, **deep})

    def images(self, count: int, seed: int = 0) -> np.ndarray[Any, Any]:
        """Draw images [count, ...]."""
        drawn = np.random.default_rng(seed).integers(0, 4, (count, *self.sizes))
        return drawn.astype(OF_ONNX[self.dtype].storage)

    def graph(self, path: Path) -> Path:
        """Write it as ONNX, for the compiler of a real TensorRT."""
        low, _, high = self.profiles[0]
        batch = str(low) if self.is_static and low == high else "b"
        values = int(np.prod(self.sizes))
        outputs = ", ".join(f"{k}[{batch},{w}] {n}" for n, k, w in self.outputs)
        text = f"g ({self.dtype}[{batch},{','.join(map(str, self.sizes))}] {self.input}) "
        text += f"=> ({outputs}) <"
        text += ", ".join(
            f"float[{values},{w}] w_{n} = {{{', '.join(map(str, _weights(n, values, w).flat))}}}"
            for n, _, w in self.outputs
        )
        text += f"> {{ x = Cast <to = 1> ({self.input})  f = Flatten (x)"
        for name, kind, _ in self.outputs:
            text += f"  m_{name} = MatMul (f, w_{name})"
            text += f"  {name} = Cast <to = {OF_ONNX[kind].number}> (m_{name})"
        model = parse(text + " }", opset=17, ir_version=8)
        io.save(model, path)
        return path


def compute(network: Network, images: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """Compute the outputs; bfloat16 as its bytes."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    outputs = {}
    for name, kind, width in network.outputs:
        values = flat @ _weights(name, flat.shape[1], width).astype(np.float32)
        outputs[name] = (
            (values.view(np.uint32) >> 16).astype(np.uint16)
            if kind == "bfloat16"
            else values.astype(OF_ONNX[kind].storage)
        )
    return outputs


@cache
def _weights(name: str, rows: int, columns: int) -> np.ndarray[Any, Any]:
    seed = sum(name.encode())
    return np.random.default_rng(seed).integers(-1, 2, (rows, columns)).astype(np.float64)
