"""The summary of a graph in a manifest: tensors, operators, size, work, precision of each part.

A LayerNorm's epsilon is lost in fp32 rounding as soon as the stream's variance is some ten thousand
times larger (docs/tolerances.md), and either form of GELU passes the gate of a half precision
graph. Both stand in the graph, so they are read there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from msn_export.graph.attention import AttentionCore, match
from msn_export.graph.blocks import (
    PRODUCTS,
    Block,
    Stream,
    between,
    halves,
    handed_on,
    parts_of,
)
from msn_export.graph.builder import constant_of, producer
from msn_export.graph.fused_operators import QUICK, is_plain
from msn_export.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """A graph as a manifest describes it, without weights; ``ops`` the most frequent first."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    nodes: int
    ops: dict[str, int]
    opset: int

    @classmethod
    def of(cls, model: ir.Model) -> Self:
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
        depth = left[0 if node.attributes.get_int("transA", 0) else -1]
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


def precision_map(stream: Stream) -> tuple[BlockPrecision, ...]:
    """Read the dtype each part of each block computes in.

    A matrix product computes in its weight's dtype, one whose weight is dequantised in the
    quantised one: that is what TensorRT makes of it.
    """
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


# a number that half precision stores is a scalar of that type
Stated = float | str | np.generic
Structure = Mapping[str, Stated]

_EPS = 1e-5  # onnx.ai operators, LayerNormalization, attribute epsilon
_ORDER = "norm, attention, norm, MLP"  # of a pre-norm block
# What converters write for a positive number below it, which fp16 would round to 0: onnxruntime's
# and onnxconverter-common's convert_float_to_float16, argument min_positive_val
_LEAST = (5.96e-8, 1e-7)
_READ = frozenset({"QuickGelu"})  # operators of another domain that are read as they are
_BEHIND = "what follows the blocks"
_TAIL = "the tail: number of residual additions"
_PRESENT, _MISSING = "present", "missing"
# transformers' activation names by the function they are; others are not told apart here
_ACTIVATION_NAMES = {
    "gelu": ("gelu", "gelu_python"),
    "gelu, tanh form": (
        "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python_tanh", "gelu_pytorch_tanh",
    ),
    "gelu, sigmoid form": ("quick_gelu",),
    "silu": ("silu", "swish"),
    "relu": ("relu",),
}  # fmt: skip


def structure_of(model: ir.Model, stream: Stream) -> Structure:
    """Read a graph's epsilons, activations, additions and norms; the rest is left out."""
    found: dict[str, Stated] = {}
    inside: set[ir.Node] = set()
    halves, opaque = _half_types(model), _unread_places(model, stream)
    for block in stream.blocks:
        inside.update(block.nodes)
        if f"block {block.number}" in opaque:
            continue
        for name, value in parts_of(block).items():
            node = value.producer()
            if node is not None and node.op_type == "LayerNormalization":
                found[f"{name}: epsilon"] = _epsilon(node, halves)
        activation = activation_of(block)
        if activation:
            found[f"block {block.number}: activation"] = activation
        found |= _layout(block)
    final = [n for n in model.graph if n.op_type == "LayerNormalization" and n not in inside]
    if _BEHIND not in opaque:
        if len(final) == 1:
            found["final norm: epsilon"] = _epsilon(final[0], halves)
        found[_TAIL] = str(len(stream.tail))
    return found


def unread(model: ir.Model, stream: Stream) -> list[str]:
    """List places whose structure is not read, each with the operator that prevents it."""
    what = "its epsilons, activations and additions were not compared, {} is not read:"
    places = _unread_places(model, stream).items()
    return _with_places((place, what.format(operator)) for place, operator in places)


def _unread_places(model: ir.Model, stream: Stream) -> dict[str, str]:
    """Give the first operator of another domain of each block, and of what is behind the blocks.

    One that holds attention may be a whole block that is not counted: no place is sure then.
    """
    nodes = list(model.graph)
    places = {f"block {block.number}": list(block.nodes) for block in stream.blocks}
    last = stream.blocks[-1]  # where it ends is not sure if it has such an operator
    places[_BEHIND] = [*last.nodes, *nodes[nodes.index(producer(last.output)) + 1 :]]
    everywhere = [node for node in nodes if "Attention" in node.op_type]
    found: dict[str, str] = {}
    for place, there in places.items():
        for node in (*everywhere, *there):
            if not is_plain(node) and node.op_type not in _READ:
                found.setdefault(place, f"{node.domain}.{node.op_type}")
    return found


def _half_types(model: ir.Model) -> tuple[ir.DataType, ...]:
    computed = {value.dtype for node in model.graph for value in node.outputs}
    return tuple(t for t in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16) if t in computed)


def _epsilon(norm: ir.Node, halves: tuple[ir.DataType, ...]) -> float | np.generic:
    """Read an epsilon, in the half precision type of the graph that holds it exactly.

    A norm that was written out has it as a constant, which a converter rounds as all others: the
    1e-6 of a ViT is subnormal in fp16, and 1.3 % larger there.
    """
    held = norm.attributes.get_float("epsilon", _EPS)
    for dtype in halves:
        rounded = np.asarray([held]).astype(dtype.numpy())[0]
        if float(rounded) == held:
            half: np.generic = rounded
            return half
    return held


def structure_of_module(model: Any) -> Structure:
    """Read the same of the PyTorch reference (``VitMsn``)."""
    # the last LayerNorm is the classifier's own where there is no final one
    last: Any = model.norm or model.fc_norm or model.classifier.norm
    found: dict[str, Stated] = {"final norm: epsilon": last.eps, _TAIL: "0"}
    activation = next(
        (kind for kind, names in _ACTIVATION_NAMES.items() if model.config.activation in names), ""
    )
    for number, block in enumerate(model.blocks):
        found[f"block {number} norm before attention: epsilon"] = block.norm1.eps
        found[f"block {number} norm before MLP: epsilon"] = block.norm2.eps
        if activation:
            found[f"block {number}: activation"] = activation
        found |= _described(number, _PRESENT, _PRESENT, _ORDER)
    return found


def _layout(block: Block) -> dict[str, Stated]:
    """Read which branches are added to the stream, and where the norms are."""
    index_of = {node: index for index, node in enumerate(block.nodes)}
    core = index_of[block.core]
    products = [i for i, node in enumerate(block.nodes) if i > core and node.op_type in PRODUCTS]
    norms = [i for i, node in enumerate(block.nodes) if node.op_type == "LayerNormalization"]
    if not products:
        return {}
    events = sorted([*((i, "norm") for i in norms), (core, "attention"), (products[-1], "MLP")])
    # a norm that is written out has no operator; nothing is said of its place then
    order = ", ".join(name for _, name in events) if norms else ""
    added = [False, False]
    for stream, branch in zip(block.streams, block.branches, strict=True):
        added_to = producer(stream).inputs
        before = next(value for value in added_to if value is not None and value is not branch)
        attends = block.core in (between(handed_on(before), branch) or ())
        added[0 if attends else 1] = True
    attention, mlp = (_PRESENT if there else _MISSING for there in added)
    return _described(block.number, attention, mlp, order)


def _described(number: int, attention: str, mlp: str, order: str) -> dict[str, Stated]:
    found: dict[str, Stated] = {
        f"block {number}: addition of attention to the stream": attention,
        f"block {number}: addition of the MLP to the stream": mlp,
    }
    return found | ({f"block {number}: order": order} if order else {})


def differences(reference: Structure, candidate: Structure) -> list[str]:
    """List contradictions of two structures; what only one of them has is none."""
    return _with_places(_contradictions(reference, candidate))


def lost_epsilons(reference: Structure, candidate: Structure) -> list[str]:
    """List epsilons that are too small for fp16 and are no contradiction, though they differ."""
    found = []
    for name, want in reference.items():
        have = candidate.get(name, want)
        if isinstance(want, str) or isinstance(have, str) or not _is_same(want, have):
            continue
        small, large = sorted((float(want), float(have)))
        if large > 2 * small:
            where, _, what = name.partition(": ")
            differs = f"{what} is {float(have):g}, the reference's {float(want):g}"
            found.append((where, f"{differs} (fp16 holds none so small; the numbers decide)"))
    return _with_places(found)


def _with_places(found: Iterable[tuple[str, str]]) -> list[str]:
    """Name each thing once, with all places that it was found at."""
    places: dict[str, list[str]] = {}
    for where, what in found:
        places.setdefault(what, []).append(where)
    return [f"{what} in {_some(sorted(where, key=_order))}" for what, where in places.items()]


def differences_by_block(reference: Structure, candidate: Structure) -> dict[str, tuple[str, ...]]:
    """List the same by ``block N``, of the ``final norm`` and ``the tail``."""
    found: dict[str, tuple[str, ...]] = {}
    for where, what in _contradictions(reference, candidate):
        stage = " ".join(where.split()[:2]) if where.startswith("block ") else where
        part = where.removeprefix(stage).strip()
        found[stage] = (*found.get(stage, ()), f"{what} in {part}" if part else what)
    return found


def _contradictions(reference: Structure, candidate: Structure) -> Iterator[tuple[str, str]]:
    for name, want in reference.items():
        have = candidate.get(name, want)
        if not _is_same(want, have):
            where, _, what = name.partition(": ")
            shown = (x if isinstance(x, str) else f"{float(x):g}" for x in (have, want))
            yield where, "{} is {}, the reference's {}".format(what, *shown)


def _is_same(one: Stated, other: Stated) -> bool:
    """Compare texts, and numbers as far as the types that hold them tell them apart."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    if abs(float(one) - float(other)) <= 1e-3 * float(one):
        return True  # both went through a float32
    return _rounds_to(float(one), other) or _rounds_to(float(other), one)


def _rounds_to(number: float, held: float | np.generic) -> bool:
    """Check whether a number in half precision is what a converter makes of ``number``."""
    if not isinstance(held, np.generic):
        return False
    least = _LEAST if held.dtype == np.float16 and number > 0 else ()
    written = np.array([number, *(max(number, smallest) for smallest in least)])
    return bool((written.astype(held.dtype) == held).any())


def _order(where: str) -> tuple[int, str]:
    words = where.split()
    return (int(words[1]), where) if words[0] == "block" else (1 << 30, where)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def activation_of(block: Block) -> str | None:
    """Name a block's activation, as an operator or written out; None if it is none of these."""
    nodes = block.nodes[block.nodes.index(block.core) + 1 :]
    types = {node.op_type for node in nodes}
    for node in nodes:
        if node.op_type == "Gelu":
            tanh = node.attributes.get_string("approximate", "none") == "tanh"
            return "gelu, tanh form" if tanh else "gelu"
        factor = _sigmoid_factor(node)
        if factor is not None:
            return _sigmoid_unit(factor)
    if "Erf" in types:
        return "gelu"
    if "Tanh" in types:
        return "gelu, tanh form"
    return "relu" if "Relu" in types else None


def _sigmoid_unit(factor: float) -> str:
    """Name x * sigmoid(factor * x); half precision stores 1.702 with an error of 0.1 %."""
    for name, exact in (("gelu, sigmoid form", QUICK), ("silu", 1.0)):
        if abs(factor - exact) <= 2e-3 * exact:
            return name
    return f"x * sigmoid({factor:.4g} x)"


def _sigmoid_factor(node: ir.Node) -> float | None:
    """Read ``factor`` of x * sigmoid(factor * x), in each form that exporters write.

    One operator; Sigmoid and a product; or 1 / (1 + exp(-factor * x)).
    """
    if node.op_type in {"QuickGelu", "Swish"}:
        # com.microsoft QuickGelu has 1.702 where nothing is said, onnx.ai Swish 1
        default = QUICK if node.op_type == "QuickGelu" else 1.0
        return node.attributes.get_float("alpha", default)
    if node.op_type not in {"Exp", "Sigmoid"} or node.inputs[0] is None:
        return None
    x, factor = _scaled(node.inputs[0])
    if node.op_type == "Exp":
        factor = -factor
        if not any(map(_adds_one, _readers(node.outputs[0]))):
            return None  # of a softmax, say
    reached = {node.outputs[0]}
    for _ in range(4):  # Cast, 1 + …, 1 / …, then the product
        for use in [use for value in reached for use in value.uses()]:
            operands = [handed_on(value) for value in use.node.inputs if value is not None]
            if use.node.op_type in {"Mul", "Div"} and handed_on(x) in operands:
                return factor
            reached.update(use.node.outputs)
    return None


def _readers(value: ir.Value) -> list[ir.Node]:
    """List what reads a value, behind casts."""
    found: list[ir.Node] = []
    for node in [use.node for use in value.uses()]:
        found += _readers(node.outputs[0]) if node.op_type == "Cast" else [node]
    return found


def _adds_one(node: ir.Node) -> bool:
    return node.op_type == "Add" and any(_scalar(value) == 1 for value in node.inputs)


def _scaled(value: ir.Value) -> tuple[ir.Value, float]:
    """Step back over products with one number: what is multiplied, and by what."""
    factor = 1.0
    while (node := handed_on(value).producer()) is not None:
        operands = [operand for operand in node.inputs if operand is not None]
        numbers = [_scalar(operand) for operand in operands]
        if node.op_type == "Neg":
            value, factor = operands[0], -factor
        elif node.op_type == "Mul" and len(numbers) == 2 and (None in numbers):
            index = numbers.index(None)
            number = numbers[1 - index]
            if number is None:
                break
            value, factor = operands[index], factor * number
        elif node.op_type == "Div" and numbers[0] is None and numbers[1]:
            value, factor = operands[0], factor / numbers[1]
        else:
            break
    return value, factor


def _scalar(value: ir.Value | None) -> float | None:
    """Give a constant of one number, cast or not."""
    held = None if value is None else constant_of(handed_on(value))
    if held is None or held.size != 1:
        return None
    return float(np.asarray(held, np.float64).reshape(()))
