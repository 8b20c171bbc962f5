"""Time other forms of the graph of ``--target onnxruntime`` on the CPU, in onnxruntime and OpenVINO.

    python benchmarks/cpu_forms.py [--rounds 16] [--threads 2]

vit-msn-base with [CLS] output, in fp32 and int8 (the rest fp32), and rewritten: each form gives the
same outputs but for rounding, which the cosine shows. The ratio is the median of the rounds' ratios
to the form that msn-export writes, in the same runtime. One process a contender, stopped while another
has its turn, in random order. To be run again with each new onnxruntime and OpenVINO. Writes
benchmarks/results/cpu_forms.json. ``--blocks 1`` tries the script.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from graphs import Contender, agreement, photographs, run
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers import ViTMSNConfig, ViTMSNModel

from msn_export.graph.builder import GraphBuilder, array_of, operand, producer
from msn_export.host import this_machine
from msn_export.manifest import versions_of

RESULTS = Path(__file__).parent / "results" / "cpu_forms.json"
BATCHES = (1, 8)
WRITTEN = "as written"


def separate(model: ir.Model) -> None:
    """Give queries, keys and values a product each, instead of one and a Split."""
    for split in [node for node in model.graph if node.op_type == "Split"]:
        added = producer(split.inputs[0])
        product = producer(next(value for value in added.inputs if value and value.producer()))
        bias = next(value for value in added.inputs if value and value.is_initializer())
        weight, builder, begin = operand(product, 1), GraphBuilder(model.graph, split), 0
        for part in split.outputs:
            assert part.shape is not None
            size = part.shape[-1]
            assert isinstance(size, int)
            cut = slice(begin, begin + size)
            begin += size
            columns = _columns(builder, weight, cut)
            y = builder.op("MatMul", [operand(product, 0), columns])
            named = builder.constant(array_of(bias)[cut], f"{bias.name}.{cut.start}")
            part.replace_all_uses_with(builder.op("Add", [y, named]))


def _columns(builder: GraphBuilder, weight: ir.Value, cut: slice) -> ir.Value:
    if weight.is_initializer():
        return builder.constant(array_of(weight)[:, cut], f"{weight.name}.{cut.start}")
    node = producer(weight)
    codes, steps = operand(node, 0), operand(node, 1)
    held = builder.constant(array_of(codes)[:, cut], f"{codes.name}.{cut.start}")
    step = builder.constant(array_of(steps)[cut], f"{steps.name}.{cut.start}")
    return builder.op("DequantizeLinear", [held, step], {"axis": 1})


def flat(model: ir.Model) -> None:
    """Multiply rows on two axes, as Gemm with its bias: Reshape, Gemm, Reshape."""
    for product in [node for node in model.graph if node.op_type == "MatMul"]:
        x, weight = operand(product, 0), operand(product, 1)
        if x.shape is None or len(x.shape) != 3 or not weight.is_initializer():
            continue
        added, bias = _bias(product)
        builder = GraphBuilder(model.graph, product)
        rows, back = _around(builder, x, weight)
        y = builder.op("Gemm", [builder.op("Reshape", [x, rows]), weight, bias])
        added.outputs[0].replace_all_uses_with(builder.op("Reshape", [y, back]))


def integer_bias(model: ir.Model) -> None:
    """Multiply 8-bit rows on two axes, with the bias in 32-bit integers of the products' scale."""
    for product in [node for node in model.graph if node.op_type == "MatMul"]:
        pair, held = (producer(operand(product, index)) for index in (0, 1))
        quantised, codes = producer(operand(pair, 0)), operand(held, 0)
        (x, step, zero), steps = (operand(quantised, index) for index in range(3)), operand(held, 1)
        added, bias = _bias(product)
        builder = GraphBuilder(model.graph, product)
        # onnxruntime takes a product with such a bias only where each zero point is written
        channels = len(array_of(steps))
        nothing = builder.constant(np.zeros(channels, np.int8), f"zero.{channels}")
        weight = builder.op("DequantizeLinear", [codes, steps, nothing], {"axis": 1})
        scale = (array_of(step) * array_of(steps)).astype(np.float32)
        rounded = np.rint(array_of(bias) / scale).astype(np.int32)
        whole = builder.op(
            "DequantizeLinear",
            [builder.constant(rounded, f"{bias.name}.int32"),
             builder.constant(scale, f"{bias.name}.scale"),
             builder.constant(np.zeros(channels, np.int32), f"zero.int32.{channels}")],
            {"axis": 0},
        )  # fmt: skip
        rows, back = _around(builder, x, weight, array_of(codes).shape)
        taken = builder.op("Reshape", [x, rows]) if len(x.shape or ()) == 3 else x
        taken = builder.op("QuantizeLinear", [taken, step, zero])
        taken = builder.op("DequantizeLinear", [taken, step, zero])
        y = builder.op("Add", [builder.op("MatMul", [taken, weight]), whole])
        if len(x.shape or ()) == 3:
            y = builder.op("Reshape", [y, back])
        added.outputs[0].replace_all_uses_with(y)


def _bias(product: ir.Node) -> tuple[ir.Node, ir.Value]:
    (use,) = product.outputs[0].uses()
    assert use.node.op_type == "Add"
    return use.node, operand(use.node, 1 - use.idx)


def _around(
    builder: GraphBuilder, x: ir.Value, weight: ir.Value, shape: tuple[int, ...] = ()
) -> tuple[ir.Value, ir.Value]:
    assert x.shape is not None
    taken, given = shape or array_of(weight).shape
    tokens = x.shape[1]
    rows = builder.constant([-1, taken], f"rows.{taken}")
    return rows, builder.constant([-1, tokens, given], f"back.{tokens}x{given}")


def unsigned(model: ir.Model) -> None:
    """Quantise activations to 0..255 around 128, as onnxruntime does itself on x86."""
    for node in [node for node in model.graph if node.op_type == "QuantizeLinear"]:
        zero = GraphBuilder(model.graph, node).constant(np.uint8(128), "zero.uint8")
        node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
        for reader in [node, *(use.node for use in node.outputs[0].uses())]:
            reader.replace_input_with(2, zero)


def own_attention(model: ir.Model) -> None:
    """Take onnxruntime's MultiHeadAttention for ONNX's Attention."""
    model.graph.opset_imports["com.microsoft"] = 1
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        attributes = {"num_heads": node.attributes["q_num_heads"].as_int()}
        new = ir.node("MultiHeadAttention", node.inputs[:3], attributes, domain="com.microsoft")
        new.name = new.outputs[0].name = f"{node.name}.own"
        model.graph.insert_before(node, new)
        node.outputs[0].replace_all_uses_with(new.outputs[0])


Change = Callable[[ir.Model], None]
FORMS: dict[str, dict[str, tuple[Change, ...]]] = {
    "fp32": {
        WRITTEN: (),
        "three projections": (separate,),
        "Gemm on two axes": (flat,),
        "three projections, Gemm": (separate, flat),
        "MultiHeadAttention": (own_attention,),
    },
    "int8": {
        WRITTEN: (),
        "zero point 128": (unsigned,),
        "three projections, zero point 128": (separate, unsigned),
        "two axes, integer bias": (integer_bias,),
    },
}


def build(blocks: int, folder: Path) -> dict[tuple[str, str], Path]:
    """Write every form of a model with random weights."""
    torch.manual_seed(0)
    ViTMSNModel(ViTMSNConfig(num_hidden_layers=blocks)).save_pretrained(folder / "hf")
    command = [sys.executable, "-m", "msn_export"]
    own = ["--target", "onnxruntime", "--no-check", "--head", "cls"]
    run(*command, "onnx", str(folder / "hf"), "-o", str(folder / "fp32.onnx"), *own)
    eight = ["--int8", "--no-compile", "--smooth", "off", "--images", str(folder / "photographs")]
    source = str(folder / "fp32.onnx")
    run(*command, "calibrate", source, *eight, "-o", str(folder / "int8.onnx"))
    found = {}
    for precision, forms in FORMS.items():
        for number, (form, changes) in enumerate(forms.items()):
            model = ir.load(folder / f"{precision}.onnx")
            for change in changes:
                change(model)
            RemoveUnusedNodesPass()(model)
            found[precision, form] = folder / f"{precision}-{number}.onnx"
            ir.save(model, found[precision, form])
    return found


def main() -> None:
    """Build the forms, time them in both runtimes, print ratios and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        pictures = photographs(folder / "photographs")
        contenders: dict[tuple[str, str, str], Contender] = {}
        for (precision, form), path in build(options.blocks, folder).items():
            for runtime in ("onnxruntime", "openvino"):
                if runtime == "openvino" and form == "MultiHeadAttention":
                    continue
                spec = {"kind": runtime, "path": str(path), "threads": options.threads}
                one = Contender(spec, folder / "log.txt")
                stack.callback(one.close)
                contenders[precision, form, runtime] = one
        rows = []
        for batch in BATCHES:
            rounds = options.rounds // (1 if batch == 1 else 2)
            rows += measure(contenders, pictures[:batch], max(1, rounds), folder)
    told = {
        "machine": asdict(this_machine()),
        "versions": versions_of("onnxruntime-gpu", "onnxruntime", "openvino"),
        "threads": options.threads,
        "rows": rows,
    }
    options.json.write_text(json.dumps(told, indent=1) + "\n")


def measure(
    contenders: dict[tuple[str, str, str], Contender], batch: np.ndarray, rounds: int, folder: Path
) -> list[dict[str, Any]]:
    """Time all by turns: medians, and the median of a round's ratios to the form as written."""
    np.save(folder / "images.npy", batch)
    outputs = {key: one.outputs(folder / "images.npy", folder) for key, one in contenders.items()}
    times: dict[tuple[str, str, str], list[float]] = {key: [] for key in contenders}
    for _ in range(rounds):
        for key in random.sample(list(contenders), len(contenders)):
            times[key].append(contenders[key].times(1)[0][0])
    rows = []
    for (precision, form, runtime), taken in times.items():
        basis = (precision, WRITTEN, runtime)
        ratios = [a / b for a, b in zip(taken, times[basis], strict=True)]
        row = {
            "precision": precision, "form": form, "runtime": runtime, "batch": len(batch),
            "rounds": rounds, "ms": round(statistics.median(taken), 1),
            "ratio": round(statistics.median(ratios), 3),
            "cosine": agreement(outputs[precision, form, runtime], outputs[basis])["cosine"],
        }  # fmt: skip
        print(row, flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
