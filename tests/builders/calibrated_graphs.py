"""Tiny fp32 ViTs to quantise, with packings of queries, keys and values as exporters write them."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.calibration.plan import Plan
from msn_export.calibration.qdq import FORMATS, Scheme
from msn_export.graph import io
from msn_export.graph.builder import array_of, operand, producer_of, replace
from msn_export.spec import Dtype
from tests.builders.engine_graphs import Vit, save
from tests.builders.graphs import parse


def scheme(dtype: Dtype = Dtype.INT8, base: Dtype = Dtype.FP16) -> Scheme:
    return Scheme(FORMATS[dtype], base)


def vit(folder: Path, **shape) -> ir.Model:
    """Read an fp32 ViT of two blocks, two heads of 16, five tokens; input x [b, 3, 32, 32]."""
    model = io.load(save(Vit(**{"dtype": "fp32", "dim": 32, **shape}), folder / "vit.onnx"))
    io.infer_shapes(model)
    return model


def planned(folder: Path, dtype: Dtype = Dtype.INT8, *, attention: bool = False, **shape) -> Plan:
    return Plan.of(vit(folder, **shape), scheme(dtype), attention=attention)


def feeds(count: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    pixels = np.random.default_rng(seed).standard_normal((count, 3, 32, 32))
    return {"x": pixels.astype(np.float32)}


def drop_activation_pairs(model: ir.Model) -> None:
    """Take out each Q/DQ of an activation, in place: weights alone stay quantised."""
    for node in list(model.graph):
        rounded = producer_of(node.inputs[0], "QuantizeLinear") if node.inputs else None
        if node.op_type == "DequantizeLinear" and rounded is not None:
            replace(node.outputs[0], operand(rounded, 0))
    RemoveUnusedNodesPass()(model)


def scale_weights(model: ir.Model, factor: float, block: int = 1) -> None:
    """Multiply the scales of a block's 8-bit weights, in place."""
    for node in model.graph:
        held = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if held is not None and held.is_initializer() and f"blocks.{block}." in str(held.name):
            scale = operand(node, 1)
            steps = array_of(scale)
            scale.const_value = ir.tensor((steps * factor).astype(steps.dtype), name=scale.name)


# One block of dim 4, two heads of 2; how the 12 columns of qkv are split is the test's to say.
_BLOCK = """
g (float[b,5,4] x) => (float[b,5,4] y)
<int64[5] apart = {{{apart}}}, int64[3] together = {{0, 5, 4}}, int64[1] axis = {{{axis}}}>
{{
    n = LayerNormalization <axis = -1> (x, gain, shift)
    product = MatMul (n, qkv)
    packed = Add (product, bias)
    five = Reshape (packed, apart)
    moved = Transpose <perm = {perm}> (five)
    q5, k5, v5 = Split <axis = {axis}, num_outputs = 3> (moved)
    q = Squeeze (q5, axis)
    k = Squeeze (k5, axis)
    v = Squeeze (v5, axis)
    o = Attention (q, k, v)
    back = Transpose <perm = [0, 2, 1, 3]> (o)
    heads = Reshape (back, together)
    out = MatMul (heads, proj)
    between = LayerNormalization <axis = -1> (out, gain2, shift2)
    up = MatMul (between, fc1)
    bent = Gelu (up)
    y = MatMul (bent, fc2)
}}
"""
PACKINGS = {
    "thirds": {  # columns are (3, h, d): timm, facebookresearch/msn, this project
        "apart": "0, 5, 3, 2, 2", "perm": "[0, 3, 2, 1, 4]", "axis": 2, "packing": (3, 2, 2),
    },
    "by head": {  # (h, 3, d): Megatron
        "apart": "0, 5, 2, 3, 2", "perm": "[0, 2, 1, 3, 4]", "axis": 3, "packing": (2, 3, 2),
    },
    "innermost": {  # (h, d, 3)
        "apart": "0, 5, 2, 2, 3", "perm": "[4, 0, 2, 1, 3]", "axis": 0, "packing": (2, 2, 3),
    },
}  # fmt: skip


def block(packing: str) -> ir.Model:
    """Parse one block; every weight is drawn."""
    said = PACKINGS[packing]
    shapes = {
        "gain": (4,), "shift": (4,), "qkv": (4, 12), "bias": (12,), "proj": (4, 4),
        "gain2": (4,), "shift2": (4,), "fc1": (4, 8), "fc2": (8, 4),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    listed = []
    for name, shape in shapes.items():
        values = ", ".join(f"{value:.4f}" for value in rng.standard_normal(np.prod(shape)))
        sizes = ", ".join(str(size) for size in shape)
        listed.append(f"float[{sizes}] {name} = {{{values}}}")
    text = _BLOCK.format(**said).replace("<int64[5]", f"<{', '.join(listed)}, int64[5]")
    return parse(text)
