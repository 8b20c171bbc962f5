"""Bound the time of each kernel of an engine by a card's data sheet: no card is needed.

    python benchmarks/roofline.py [--variant vit-msn-base] [--batch 8] [--images PICTURES]

Compiles a shape with TensorRT-RTX for SM 8.9 at one batch size, in fp16 and, with pictures to calibrate
on, in int8. The compiler's log has the sizes of all that a kernel reads and writes. A kernel takes at
least the longer of two times: its multiplications and additions at the card's highest rate for their
type, and its bytes at the card's memory bandwidth, each tensor once. Only products, convolutions and
attention have operations here; those of other kernels are far below their bytes. Activations may stay
in the L2 cache, so the second bound takes weights, images and outputs alone.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

from msn_export.engine.kernels import (
    ITEM_BYTES,
    Kernel,
    gemm_dtype,
    is_convolution,
    is_fused_attention,
    is_gemm,
    is_layout_only,
    read_log,
)

RESULTS = Path(__file__).parent / "results" / "roofline.json"
CAPABILITY = "8.9"
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([\d,]*)\].*?Datatype: (\w+)")
_PARTS = re.compile(r", Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs: \[(.*?)\], TacticName: ")


@dataclass(frozen=True)
class Card:
    """A data sheet: bytes a second, and dense tensor-core operations a second by type.

    Of floats with sums in fp32; ``half_sums`` is the rate of fp16 with sums in fp16, which fused
    attention may have.
    """

    name: str
    bandwidth: float
    rates: dict[str, float]
    half_sums: float
    source: str


CARDS = (
    Card(
        "L4",
        300e9,
        {"Half": 121e12, "BFloat16": 121e12, "Int8": 242.5e12, "FP8": 242.5e12, "Float": 30.3e12},
        121e12,
        "NVIDIA L4 Tensor Core GPU datasheet; half of the rates it gives with sparsity",
    ),
    Card(
        "GeForce RTX 4090",
        1008e9,
        {
            "Half": 165.2e12,
            "BFloat16": 165.2e12,
            "Int8": 660.6e12,
            "FP8": 330.3e12,
            "Float": 82.6e12,
        },
        330.3e12,
        "NVIDIA Ada GPU Architecture whitepaper, appendix A",
    ),
)


@dataclass(frozen=True)
class Sized:
    """A kernel with the tensors that its record names: sizes and type of each."""

    kernel: Kernel
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    constants: tuple[tuple[tuple[int, ...], str], ...]
    outputs: tuple[tuple[tuple[int, ...], str], ...]

    @property
    def role(self) -> str:
        """Group it: what the table has a row for."""
        if is_fused_attention(self.kernel):
            return "attention"
        if is_gemm(self.kernel) or is_convolution(self.kernel):
            return "products"
        if is_layout_only(self.kernel):
            return "layout only"
        return "norms" if "Mean" in self.kernel.name else "other"

    @property
    def bytes(self) -> float:
        """Read and write each tensor once."""
        return sum(map(_bytes, (*self.inputs, *self.constants, *self.outputs)))

    @property
    def operations(self) -> float:
        """Multiplications and additions of a product, a convolution or attention."""
        if not self.outputs or self.role not in {"attention", "products"}:
            return 0.0
        result = max(math.prod(shape) for shape, _ in self.outputs)
        if self.role == "attention":  # [b * h, n, d]: scores and their product with the values
            *_, size = min((shape for shape, _ in self.outputs), key=math.prod)
            heads = self.outputs[0][0][0]
            keys = max(math.prod(shape) for shape, _ in self.inputs) // (heads * size)
            return 4.0 * result * keys
        weights = [shape for shape, _ in self.constants if sum(size > 1 for size in shape) > 1]
        if not weights:
            raise SystemExit(f"{self.kernel.name} has no weight; what does it multiply?")
        weight = max(weights, key=math.prod)
        columns = weight[0] if is_convolution(self.kernel) else weight[-1]
        return 2.0 * result * math.prod(weight) / columns

    @property
    def dtype(self) -> str:
        """Name the type that it multiplies in."""
        return self.kernel.inputs[0] if self.role == "attention" else gemm_dtype(self.kernel)


def _bytes(tensor: tuple[tuple[int, ...], str]) -> float:
    shape, dtype = tensor
    return math.prod(shape) * ITEM_BYTES.get(dtype, 4.0)


def kernels_of(messages: Sequence[str]) -> tuple[Sized, ...]:
    """Read the kernels of a builder's log with the sizes of their tensors."""
    lines = [line for message in messages for line in message.splitlines()]
    records = [line for line in lines if line.startswith("Name: ") and ", LayerType: " in line]
    found = []
    for record, kernel in zip(records, read_log(records), strict=True):
        parts = _PARTS.search(record)
        if parts is None:
            raise SystemExit(f"a record that is not understood: {record[:200]}")
        found.append(Sized(kernel, *(tuple(_tensors(part)) for part in parts.groups())))
    return tuple(found)


def _tensors(part: str) -> Iterator[tuple[tuple[int, ...], str]]:
    for _, sizes, dtype in _TENSOR.findall(part):
        yield tuple(int(size) for size in sizes.split(",") if size), dtype


COLUMNS = ("kernels", "us", "bound_by_bytes", "operations", "bytes")


def seconds(one: Sized, card: Card) -> float:
    """Compute at the card's highest rate for a kernel's type."""
    if not one.operations:
        return 0.0
    half = one.role == "attention" and one.dtype == "Half"
    return one.operations / (card.half_sums if half else card.rates[one.dtype])


def bound(kernels: tuple[Sized, ...], card: Card) -> dict[str, Any]:
    """Sum least times in microseconds, by role; and what bounds them."""
    roles: dict[str, dict[str, float]] = {}
    for one in kernels:
        computing = seconds(one, card)
        moving = one.bytes / card.bandwidth
        row = roles.setdefault(one.role, dict.fromkeys(COLUMNS, 0.0))
        row["kernels"] += 1
        row["us"] += 1e6 * max(computing, moving)
        row["operations"] += one.operations
        row["bytes"] += one.bytes
        row["bound_by_bytes"] += moving > computing
    work = 1e6 * sum(seconds(one, card) for one in kernels)
    weights = sum(_bytes(tensor) for one in kernels for tensor in one.constants)
    ends = [*kernels[0].inputs, *kernels[-1].outputs]
    needed = 1e6 * (weights + sum(map(_bytes, ends))) / card.bandwidth
    total = sum(row["us"] for row in roles.values())
    return {
        "card": asdict(card),
        "roles": roles,
        "us": total,
        "us_without_activations": max(work, needed),
        "layout_share": roles.get("layout only", {"us": 0.0})["us"] / total,
    }


def run(*arguments: str) -> None:
    """Run msn-export, and show what it said only if it fails."""
    command = [sys.executable, "-m", "msn_export", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def logs(variant: str, batch: int, images: Path | None, folder: Path) -> Iterator[tuple[str, Path]]:
    """Compile the shape in each precision; its log."""
    export = [
        "onnx",
        f"random:{variant}:0",
        "--input",
        "uint8",
        "--batch",
        str(batch),
        "--no-check",
    ]
    half = folder / "fp16.onnx"
    run(*export, "--dtype", "fp16", "--islands", "none", "-o", str(half))
    graphs = {"fp16": half}
    if images is not None:
        whole, graphs["int8"] = folder / "fp32.onnx", folder / "int8.onnx"
        run(*export, "-o", str(whole))
        quantise = ["calibrate", str(whole), "--int8", "--images", str(images), "--smooth", "off"]
        run(*quantise, "--no-compile", "-o", str(graphs["int8"]))
    for precision, graph in graphs.items():
        log = folder / f"{precision}.log"
        target = ["--backend", "tensorrt-rtx", "--compute-capability", CAPABILITY, "--no-check"]
        run(
            "trt", str(graph), *target, "-o", str(folder / f"{precision}.engine"), "--log", str(log)
        )
        yield precision, log


def main() -> None:
    """Compile, bound, print a line an engine and card, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", action="append", help="repeatable; default small and base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=Path, help="pictures to calibrate int8 on")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    found = []
    for variant in options.variant or ("vit-msn-small", "vit-msn-base"):
        with tempfile.TemporaryDirectory() as name:
            for precision, log in logs(variant, options.batch, options.images, Path(name)):
                kernels = kernels_of([log.read_text(errors="replace")])
                row: dict[str, Any] = {
                    "variant": variant,
                    "precision": precision,
                    "kernels": len(kernels),
                    "operations": sum(one.operations for one in kernels),
                    "bytes": sum(one.bytes for one in kernels),
                    "cards": [bound(kernels, card) for card in CARDS],
                }
                found.append(row)
                for card in row["cards"]:
                    print(
                        f"{variant} {precision}, {card['card']['name']}: {card['us']:.0f} us, "
                        f"{card['us_without_activations']:.0f} with activations in the cache, "
                        f"{card['layout_share']:.0%} of it layout alone",
                        flush=True,
                    )
    told = {
        "compiler": f"tensorrt-rtx {trt.__version__}",
        "capability": CAPABILITY,
        "batch": options.batch,
        "engines": found,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
