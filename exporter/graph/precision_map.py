"""What each part of each block computes in, read from the graph."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from msn_export.errors import GraphError
from msn_export.graph.inside import halves
from msn_export.graph.stream import PRODUCTS, Block, find_stream

PARTS = ("norm", "qkv", "attention", "projection", "add", "norm", "fc1", "activation", "fc2", "add")

_SHORT = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
}
_ACTIVATIONS = frozenset(("Erf", "Gelu", "Relu", "Sigmoid", "Tanh"))


@dataclass(frozen=True, slots=True)
class BlockPrecision:
    """A block's dtypes, one for each of ``PARTS``; "" where a part was not found."""

    block: int
    dtypes: tuple[str, ...]


def precision_map(model: ir.Model) -> tuple[BlockPrecision, ...]:
    """Read the dtype each part of each block computes in; empty where no block is understood.

    A matrix product computes in its weight's dtype, one whose weight is dequantised in the
    quantised one: that is what TensorRT makes of it.
    """
    try:
        stream = find_stream(model)
    except GraphError:
        return ()
    return tuple(
        BlockPrecision(block.number, _dtypes(block))
        for block in stream.blocks
        if len(block.branches) == 2
    )


def _dtypes(block: Block) -> tuple[str, ...]:
    attention, mlp = halves(block)
    cores = [node for node in attention if node.op_type in {"Attention", "Softmax"}]
    weighted = [node for node in attention if _weight(node) is not None]
    dense = [node for node in mlp if _weight(node) is not None]
    first, second = (_of(stream.producer()) for stream in block.streams)
    return (
        _of(_norm(attention)),
        _of(weighted[0] if weighted else None),
        _of(cores[-1] if cores else None),
        _of(weighted[-1] if len(weighted) > 1 else None),
        first,
        _of(_norm(mlp)),
        _of(dense[0] if dense else None),
        _of(next((node for node in mlp if node.op_type in _ACTIVATIONS), None)),
        _of(dense[-1] if len(dense) > 1 else None),
        second,
    )


def _norm(nodes: tuple[ir.Node, ...]) -> ir.Node | None:
    return next((node for node in nodes if node.op_type == "LayerNormalization"), None)


def _weight(node: ir.Node) -> ir.Value | None:
    """Give a matrix product's weight, as it is stored."""
    if node.op_type not in PRODUCTS or node.inputs[1] is None:
        return None
    value = node.inputs[1]
    while (producer := value.producer()) is not None:
        if producer.op_type not in {"DequantizeLinear", "Transpose", "Cast"}:
            return None  # two activations
        if producer.inputs[0] is None:
            return None
        value = producer.inputs[0]
    return value if value.const_value is not None else None


def _of(node: ir.Node | None) -> str:
    if node is None:
        return ""
    value = _weight(node) or node.outputs[0]
    return _SHORT.get(value.dtype, value.dtype.name.lower()) if value.dtype is not None else ""
