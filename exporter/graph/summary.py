"""What a manifest says of a graph: tensors, operators, size, work, precision of each part."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Self

import onnx_ir as ir

from msn_export.errors import GraphError
from msn_export.graph.attention import AttentionCore, match
from msn_export.graph.blocks import PRODUCTS, Block, find_stream, halves
from msn_export.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """What a manifest says of a graph, without its weights; ``ops`` the most frequent first."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: int
    ops: dict[str, int]
    opset: int

    @classmethod
    def of(cls, model: ir.Model) -> Self:
        """Read them off a graph."""
        return cls(
            inputs=tensor_specs(list(model.graph.inputs)),
            outputs=tensor_specs(list(model.graph.outputs)),
            nodes=len(model.graph),
            ops=operators(model),
            opset=model.graph.opset_imports[""],
        )


def operators(model: ir.Model) -> dict[str, int]:
    """Count the graph's nodes by operator, the most frequent first."""
    counts = Counter(
        f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in model.graph
    )
    return dict(counts.most_common())


def tensor_specs(values: list[ir.Value]) -> tuple[TensorSpec, ...]:
    """Describe graph inputs or outputs: names, dtypes as ONNX spells them, shapes."""
    return tuple(
        TensorSpec(
            name=value.name or "",
            dtype=value.dtype.name.lower() if value.dtype else "undefined",
            shape=tuple(
                size if isinstance(size, int) else str(size.value) for size in (value.shape or ())
            ),
        )
        for value in values
    )


# A product of [m, k] and [k, n] is m * n * k multiply-adds. Element-wise operators, LayerNorm and
# softmax are left out, as the field does (a ViT-B/16 at 224 is 17.5 billion).


def macs(model: ir.Model) -> int:
    """Sum convolutions, matrix products and attention; a dynamic batch counts as one image."""
    return sum(_of_node(node) for node in model.graph)


def _of_node(node: ir.Node) -> int:
    if node.op_type == "Conv":
        weight = _sizes(node.inputs[1])
        return math.prod(_sizes(node.outputs[0])) * math.prod(weight[1:])
    if node.op_type in {"MatMul", "Gemm"}:
        left = _sizes(node.inputs[0])
        transposed = node.attributes.get("transA")
        depth = left[0 if transposed is not None and transposed.as_int() else -1]
        return math.prod(_sizes(node.outputs[0])) * depth
    if node.op_type == "Attention":
        return _of_attention(node)
    return 0


def _of_attention(node: ir.Node) -> int:
    """Two products: scores [b, h, m, n] over d, and the result [b, h, m, d] over n."""
    core = match(node)
    if isinstance(core, AttentionCore):
        batch, heads, queries, size = _sizes(core.q)
        keys = _sizes(core.k)[1 if core.tokens_first else 3 if core.transposed else 2]
        return 2 * batch * heads * queries * keys * size
    q, k = _sizes(node.inputs[0]), _sizes(node.inputs[1])
    return 2 * q[0] * q[1] * k[1] * q[2] if len(q) == 3 else 0


def _sizes(value: ir.Value | None) -> list[int]:
    if value is None or value.shape is None:
        return [0]
    return [size if isinstance(size, int) else 1 for size in value.shape]


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
