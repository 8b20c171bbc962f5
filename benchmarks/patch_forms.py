"""Compile ViT-S's patch embedding in several forms, and bound what each moves and computes.

    python benchmarks/patch_forms.py [--cuda CUDA]

Images of 224 pixels become [b, 196, 384] in fp16; TensorRT-RTX for SM 8.9, compiled and not run. A
convolution of three channels is padded to four, by a kernel that the compiler generates. With the
packages that benchmarks/generated_kernels.py names, the width of the first kernel's stores is counted
too. A form that moves less here is worth a change of the graph if the whole engine moves less.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import tensorrt_rtx as trt
from block_forms import compiled
from generated_kernels import CAPABILITY, Nvrtc, found, read, sources
from onnx_ir.passes.common import RemoveUnusedNodesPass
from roofline import CARDS, bound, kernels_of, run

from msn_export.graph import io
from msn_export.graph.builder import GraphBuilder, array_of, operand
from msn_export.spec import ComputeCapability

RESULTS = Path(__file__).parent / "results" / "patch_forms.json"
BATCH, SIDE, PATCH, DIM = 8, 224, 16, 384
GRID = SIDE // PATCH

Weight = np.ndarray[Any, Any]
Form = Callable[[GraphBuilder, ir.Value, Weight], ir.Value]  # weight [dim, 3, patch, patch]


def cast(builder: GraphBuilder, x: ir.Value) -> ir.Value:
    """Cast to fp16."""
    return builder.op("Cast", [x], {"to": int(ir.DataType.FLOAT16)})


def convolve(builder: GraphBuilder, x: ir.Value, weight: Weight) -> ir.Value:
    """[b, c, h, w] -> [b, patches, dim]."""
    sides = {"kernel_shape": [PATCH, PATCH], "strides": [PATCH, PATCH]}
    result = builder.op("Conv", [x, builder.constant(weight, "weight")], sides)
    rows = builder.reshape(result, DIM, GRID * GRID)
    return builder.op("Transpose", [rows], {"perm": [0, 2, 1]})


def as_exported(builder: GraphBuilder, x: ir.Value, weight: Weight) -> ir.Value:
    """Cast, transpose, convolve: bytes [b, h, w, 3]."""
    return convolve(
        builder, builder.op("Transpose", [cast(builder, x)], {"perm": [0, 3, 1, 2]}), weight
    )


def padded(builder: GraphBuilder, x: ir.Value, weight: Weight) -> ir.Value:
    """Pad the channels to four in the graph."""
    pads, zero = builder.constant([0] * 7 + [1], "pads"), builder.constant(np.float16(0), "zero")
    four = builder.op("Pad", [cast(builder, x), pads, zero])
    channels = builder.op("Transpose", [four], {"perm": [0, 3, 1, 2]})
    return convolve(builder, channels, np.pad(weight, ((0, 0), (0, 1), (0, 0), (0, 0))))


def product(builder: GraphBuilder, x: ir.Value, weight: Weight) -> ir.Value:
    """Make a row of each patch, and multiply."""
    parts = builder.reshape(cast(builder, x), GRID, PATCH, GRID, PATCH * 3)
    patches = builder.op("Transpose", [parts], {"perm": [0, 1, 3, 2, 4]})
    rows = builder.reshape(patches, GRID * GRID, PATCH * PATCH * 3)
    columns = weight.transpose(2, 3, 1, 0).reshape(-1, DIM)
    return builder.op("MatMul", [rows, builder.constant(columns, "weight")])


def float_as_exported(builder: GraphBuilder, x: ir.Value, weight: Weight) -> ir.Value:
    """Cast and convolve: floats [b, 3, h, w]."""
    return convolve(builder, cast(builder, x), weight)


def float_product(builder: GraphBuilder, x: ir.Value, weight: Weight) -> ir.Value:
    """Make a row of each patch of floats, and multiply."""
    parts = builder.reshape(cast(builder, x), 3, GRID, PATCH, GRID, PATCH)
    patches = builder.op("Transpose", [parts], {"perm": [0, 2, 4, 1, 3, 5]})
    rows = builder.reshape(patches, GRID * GRID, 3 * PATCH * PATCH)
    columns = weight.transpose(1, 2, 3, 0).reshape(-1, DIM)
    return builder.op("MatMul", [rows, builder.constant(columns, "weight")])


FORMS: dict[str, Form] = {
    "uint8, convolution (as exported)": as_exported,
    "uint8, channels padded in the graph": padded,
    "uint8, rows of patches and a product": product,
    "float, convolution (as exported)": float_as_exported,
    "float, rows of patches and a product": float_product,
}


def graph(form: str) -> ir.Model:
    """Write a form."""
    is_bytes = form.startswith("uint8")
    shape = [BATCH, SIDE, SIDE, 3] if is_bytes else [BATCH, 3, SIDE, SIDE]
    kind = ir.TensorType(ir.DataType.UINT8 if is_bytes else ir.DataType.FLOAT)
    x = ir.Value(name="images", type=kind, shape=ir.Shape(shape))
    made = ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="patches")
    weight = np.random.default_rng(0).standard_normal((DIM, 3, PATCH, PATCH)) * 0.02
    y = FORMS[form](GraphBuilder(made), x, weight.astype(np.float16))
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT16), ir.Shape([BATCH, GRID * GRID, DIM])
    made.outputs.append(y)
    model = ir.Model(made, ir_version=11)
    io.infer_shapes(model)
    return model


def engines(folder: Path) -> dict[str, Any]:
    """Compile the whole of vit-msn-small as it is exported, and with the product in its place."""
    path = folder / "model.onnx"
    export = ["onnx", "random:vit-msn-small:0", "--input", "uint8", "--dtype", "fp16", "--batch"]
    run(*export, str(BATCH), "--islands", "none", "--no-check", "-o", str(path))
    bounds = {}
    for name in ("convolution", "product"):
        model = io.load(path)
        io.infer_shapes(model)
        if name == "product":
            as_product(model)
        engine, messages = compiled(model, ComputeCapability.parse(CAPABILITY))
        if engine is None:
            raise SystemExit(f"the engine with the {name} was not built: {messages[-1]}")
        kernels = kernels_of(messages)
        bounds[name] = {
            "kernels": len(kernels),
            "us": {card.name: bound(kernels, card)["us"] for card in CARDS},
        }
    return bounds


def as_product(model: ir.Model) -> None:
    """Put the product in place of an exported graph's convolution."""
    nodes = {node.name: node for node in model.graph}
    convolution = nodes["patch.Conv"]
    images, weight, bias = model.graph.inputs[0], *(operand(convolution, i) for i in (1, 2))
    builder = GraphBuilder(model.graph, next(iter(model.graph)))
    rows = product(builder, images, array_of(weight))
    biased = builder.op("Add", [rows, bias])
    nodes["patch.Transpose"].outputs[0].replace_all_uses_with(biased)
    RemoveUnusedNodesPass()(model)
    io.infer_shapes(model)


def main() -> None:
    """Compile the forms, print a row each and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuda", type=Path, help="packages of benchmarks/generated_kernels.py")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    for form in FORMS:
        engine, messages = compiled(graph(form), ComputeCapability.parse(CAPABILITY))
        if engine is None:
            raise SystemExit(f"{form} was not built: {messages[-1]}")
        kernels = kernels_of(messages)
        row: dict[str, Any] = {
            "form": form,
            "kernels": len(kernels),
            "bytes": sum(one.bytes for one in kernels),
            "operations": sum(one.operations for one in kernels),
        }
        if options.cuda is not None:
            with tempfile.NamedTemporaryFile() as file:
                Path(file.name).write_bytes(engine)
                _, source = next(sources(Path(file.name)))
            code = Nvrtc(options.cuda, CAPABILITY).cubin(source)
            if not isinstance(code, str):
                row["stores"] = read(code, found(options.cuda, "nvdisasm"))["stores"]
        rows.append(row)
        print(row, flush=True)
    with tempfile.TemporaryDirectory() as name:
        whole = engines(Path(name))
    print(whole)
    told = {
        "compiler": f"tensorrt-rtx {trt.__version__}",
        "batch": BATCH,
        "forms": rows,
        "engines": whole,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
