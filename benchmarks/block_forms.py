"""Count the kernels of three ViT-S blocks in each form of attention's projections, for a new compiler.

    python benchmarks/block_forms.py [FORM...] [--capability 8.9]

The forms of benchmarks/forms.py are those that the product writes; these were written by hand, to see
whether the compiler has a form without kernels that only move data. fp16, TensorRT-RTX, compiled on
the CPU and not run; fixed batch of 1, and 1 to 32. The results are a table of docs/engines.md, which
scripts/engines.py writes.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tensorrt_rtx as trt

from msn_export.engine.kernels import is_fused_attention, is_layout_only, read_log
from msn_export.graph import io
from msn_export.graph.builder import GraphBuilder
from msn_export.spec import ComputeCapability

RESULTS = Path(__file__).parent / "results" / "block_forms.json"
BLOCKS, DIM, HEADS, TOKENS = 3, 384, 6, 197
SIZE = DIM // HEADS
BATCHES = {"1": (1, 1, 1), "1:8:32": (1, 8, 32)}

# b batch, n tokens, h heads, d head size


class Blocks:
    """Blocks under construction; ``sequence_major`` ones take [n, b, h * d] instead of [b, n, h * d]."""

    def __init__(self, form: str, batch: str) -> None:
        self.sequence_major = form.startswith("sequence-major")
        size = 1 if batch == "1" else ir.SymbolicDim("b")
        shape = [TOKENS, size, DIM] if self.sequence_major else [size, TOKENS, DIM]
        kind = ir.TensorType(ir.DataType.FLOAT16)
        x = ir.Value(name="x", type=kind, shape=ir.Shape(shape))
        graph = ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="blocks")
        self.builder = GraphBuilder(graph)
        self._draw = np.random.default_rng(0)
        for block in range(BLOCKS):
            x = self._block(x, f"blocks.{block}", FORMS[form])
        x.shape, x.type = ir.Shape(shape), kind
        graph.outputs.append(x)
        self.model = ir.Model(graph, ir_version=11)
        io.infer_shapes(self.model)

    def op(self, name: str, inputs: Sequence[ir.Value], **attributes: Any) -> ir.Value:
        """Add a node."""
        return self.builder.op(name, inputs, attributes)

    def split(self, x: ir.Value, axis: int) -> Sequence[ir.Value]:
        """Split a value into queries, keys and values."""
        return self.builder.ops("Split", [x], {"axis": axis, "num_outputs": 3}, outputs=3)

    def linear(self, x: ir.Value, name: str, *shape: int) -> ir.Value:
        """Multiply by a drawn weight [.., in, out] and add a bias."""
        product = self.op("MatMul", [x, self.weight(f"{name}.weight", *shape)])
        bias = self.weight(f"{name}.bias", *shape[:-2], *([1] if len(shape) > 2 else []), shape[-1])
        return self.op("Add", [product, bias])

    def weight(self, name: str, *shape: int) -> ir.Value:
        """Draw a weight."""
        drawn = (self._draw.standard_normal(shape) * 0.02).astype(np.float16)
        return self.builder.constant(drawn, name)

    def reshape(self, x: ir.Value, *behind: int) -> ir.Value:
        """Split the last axis of [b, n, c] or [n, b, c]."""
        ahead = (TOKENS, -1) if self.sequence_major else (-1, TOKENS)
        shape = [*ahead, *behind]
        named = "shape." + "x".join(str(size) for size in shape)
        return self.op("Reshape", [x, self.builder.constant(shape, named)])

    def heads_first(self, x: ir.Value) -> ir.Value:
        """[b, n, h, d] or [n, b, h, d] -> [b, h, n, d]."""
        return self.op("Transpose", [x], perm=[1, 2, 0, 3] if self.sequence_major else [0, 2, 1, 3])

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """Normalise the last axis."""
        affine = [self.weight(f"{name}.{part}", DIM) for part in ("weight", "bias")]
        return self.op("LayerNormalization", [x, *affine], axis=-1, epsilon=1e-6)

    def _block(self, x: ir.Value, name: str, form: "Form") -> ir.Value:
        self.builder.scope = name
        attended = form(self, self.norm(x, f"{name}.norm1"), name)  # [b, h, n, d]
        perm = [2, 0, 1, 3] if self.sequence_major else [0, 2, 1, 3]
        joined = self.reshape(self.op("Transpose", [attended], perm=perm), DIM)
        x = self.op("Add", [x, self.linear(joined, f"{name}.out", DIM, DIM)])
        hidden = self.linear(self.norm(x, f"{name}.norm2"), f"{name}.fc1", DIM, 4 * DIM)
        hidden = self.op("Gelu", [hidden], approximate="none")
        return self.op("Add", [x, self.linear(hidden, f"{name}.fc2", 4 * DIM, DIM)])


Form = Callable[[Blocks, ir.Value, str], ir.Value]


def packed(blocks: Blocks, x: ir.Value, name: str, **scale: float) -> ir.Value:
    """One projection to [3, h, d], split behind one transposition."""
    parts = blocks.reshape(blocks.linear(x, f"{name}.qkv", DIM, 3 * DIM), 3 * HEADS, SIZE)
    return blocks.op("Attention", blocks.split(blocks.heads_first(parts), 1), **scale)


def scaled(blocks: Blocks, x: ir.Value, name: str) -> ir.Value:
    """One projection; the scale of the scores is in its weights."""
    return packed(blocks, x, name, scale=1.0)


def interleaved(blocks: Blocks, x: ir.Value, name: str) -> ir.Value:
    """One projection to [h, 3, d]."""
    parts = blocks.reshape(blocks.linear(x, f"{name}.qkv", DIM, 3 * DIM), HEADS, 3 * SIZE)
    apart = [blocks.heads_first(part) for part in blocks.split(parts, 3)]
    return blocks.op("Attention", apart)


def separate(blocks: Blocks, x: ir.Value, name: str) -> ir.Value:
    """Three projections."""
    apart = [
        blocks.heads_first(
            blocks.reshape(blocks.linear(x, f"{name}.{part}", DIM, DIM), HEADS, SIZE)
        )
        for part in "qkv"
    ]
    return blocks.op("Attention", apart)


def batched(blocks: Blocks, x: ir.Value, name: str) -> ir.Value:
    """A projection for each head, which writes [b, 3 * h, n, d] itself."""
    one = blocks.op("Unsqueeze", [x, blocks.builder.constant([1], "axis")])
    parts = blocks.linear(one, f"{name}.qkv", 3 * HEADS, DIM, SIZE)
    return blocks.op("Attention", blocks.split(parts, 1))


FORMS: dict[str, Form] = {
    "packed": packed,
    "packed, scale in the weights": scaled,
    "heads interleaved": interleaved,
    "three projections": separate,
    "a projection for each head": batched,
    "sequence-major, packed": packed,
    "sequence-major, heads interleaved": interleaved,
    "sequence-major, three projections": separate,
}


class Log(trt.ILogger):  # type: ignore[misc]  # the bindings have no types
    """All that the builder logs; kernels are among it."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.messages: list[str] = []

    def log(self, _severity: object, message: str) -> None:
        """Keep a message."""
        self.messages.append(message)


def compiled(
    model: ir.Model,
    capability: ComputeCapability,
    shapes: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[bytes | None, list[str]]:
    """Compile a graph: the engine, None where it was refused, and all messages.

    ``shapes`` are the least, usual and largest of each input with a dynamic axis.
    """
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(ir.to_proto(model).SerializeToString()):
        return None, [*log.messages, parser.get_error(0).desc()]
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.num_compute_capabilities = 1
    number = getattr(trt.ComputeCapability, f"SM{capability.major}{capability.minor}")
    config.set_compute_capability(number, 0)
    if shapes:
        profile = builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, *sizes)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    return (None if engine is None else bytes(engine)), log.messages


def build(form: str, batch: str, capability: ComputeCapability) -> dict[str, Any]:
    """Compile a form; its kernels, or why there are none."""
    blocks = Blocks(form, batch)
    sizes = BATCHES[batch]
    shapes = [(TOKENS, b, DIM) if blocks.sequence_major else (b, TOKENS, DIM) for b in sizes]
    engine, messages = compiled(blocks.model, capability, {"x": shapes})
    row: dict[str, Any] = {"form": form, "batch": batch}
    if engine is None:
        return row | {"refused": next((m for m in messages[::-1] if "rror" in m), messages[-1])}
    kernels = read_log(messages)
    return row | {
        "kernels": len(kernels),
        "fused": sum(map(is_fused_attention, kernels)),
        "layout_only": sum(map(is_layout_only, kernels)),
    }


def main() -> None:
    """Compile the forms, print a row each and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("forms", nargs="*", metavar="FORM", help=", ".join(FORMS))
    parser.add_argument("--capability", type=ComputeCapability.parse, default="8.9")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    if unknown := [form for form in options.forms if form not in FORMS]:
        parser.error(f"no form {unknown[0]!r}; expected one of {', '.join(FORMS)}")
    rows = []
    for form in options.forms or FORMS:
        for batch in BATCHES:
            rows.append(build(form, batch, options.capability))
            print(rows[-1], flush=True)
    told = {
        "compiler": f"tensorrt-rtx {trt.__version__}",
        "capability": str(options.capability),
        "blocks": BLOCKS,
        "forms": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
