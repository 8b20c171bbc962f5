"""Work out what follows from a graph's weights and its input's shape alone, and write it down.

Exporters compute the shapes of Reshape and Expand from the running batch, and leave operators on
weights (Resize of a position embedding) to the runtime. ONNX's own inference stops at the first of
them. Here a graph is walked once for each of two batch sizes: what is the same in both is a
constant, and a size that differs is the batch's.

Hugging Face optimum marks channels, height and width of every vision model dynamic. The graph of a
ViT runs for one size all the same: its position embedding is added as it is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from msn_export.graph.builder import GraphBuilder
from msn_export.graph.fused_operators import SHAPED_OUTPUTS, is_plain, shape_of_fused
from msn_export.graph.io import refill, skeleton
from msn_export.graph.precision import WEIGHTED_PRODUCTS
from msn_export.graph.summary import operators
from msn_export.spec import ImageSize

# Two batches that no size of a model is computed from by accident
_BATCHES = (5, 7)
# A constant that is larger is not written into the graph: a hostile Expand of one number has any
_LARGEST = 64 * 2**20  # bytes
# What inference reads of a constant: shapes, axes, sizes, not weights
_SMALL = 1024  # elements
# Operators that a constant must not be made of: 8-bit weights stay 8-bit, random numbers random
_KEPT = frozenset(
    ("QuantizeLinear", "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike",
     "RandomUniform", "RandomUniformLike")
)  # fmt: skip


@dataclass(slots=True)
class _Walk:
    """One walk over a graph at one batch size: types and constants by value."""

    opsets: list[onnx.OperatorSetIdProto]
    ir_version: int
    types: dict[ir.Value, onnx.TypeProto] = field(default_factory=dict)
    constants: dict[ir.Value, NDArray[Any]] = field(default_factory=dict)

    def sizes(self, value: ir.Value) -> tuple[int | None, ...] | None:
        """Give a value's shape, None where its rank is unknown."""
        inferred = self.types.get(value)
        if inferred is None or not inferred.tensor_type.HasField("shape"):
            return None
        return tuple(
            dim.dim_value if dim.HasField("dim_value") else None
            for dim in inferred.tensor_type.shape.dim
        )


def resolve_shapes(model: ir.Model) -> int:
    """Write constants and shapes that follow from weights and input shape, in place.

    Values get the types and shapes that were found. Those that are constant become initializers,
    and a Reshape to one open size gets a constant target.

    Returns:
        How many values that the graph computed are constants now.
    """
    image = next((v for v in model.graph.inputs if not v.is_initializer()), None)
    shape = None if image is None else image.shape
    dynamic = shape is not None and len(shape) > 0 and not isinstance(shape[0], int)
    done: dict[ir.Node, tuple[list[NDArray[Any] | None], list[NDArray[Any]]]] = {}
    weights = {
        value: value.const_value.numpy()  # once: what was folded is known by its arrays
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.dtype != ir.DataType.STRING
    }
    batches = _BATCHES if dynamic else _BATCHES[:1]
    walks = [_walk(model, batch, weights, done) for batch in batches]
    _write_types(model.graph, walks, shape[0] if shape is not None and dynamic else None)
    builder = GraphBuilder(model.graph)
    written = _write_constants(builder, walks)
    _write_targets(builder)
    RemoveUnusedNodesPass()(model)
    return written


def _walk(
    model: ir.Model, batch: int, weights: dict[ir.Value, NDArray[Any]], done: dict[ir.Node, Any]
) -> _Walk:
    opsets = [onnx.helper.make_opsetid(d, v) for d, v in model.graph.opset_imports.items()]
    walk = _Walk(opsets, model.ir_version, constants=dict(weights))
    for value in model.graph.inputs:
        if value.dtype is not None and value.shape is not None:
            sizes = [size if isinstance(size, int) else None for size in value.shape]
            if sizes and sizes[0] is None:
                sizes[0] = batch
            walk.types[value] = onnx.helper.make_tensor_type_proto(value.dtype.value, sizes)
    for value in weights:
        assert value.const_value is not None
        walk.types[value] = onnx.helper.make_tensor_type_proto(
            value.const_value.dtype.value, list(value.const_value.shape.numpy())
        )
    for node in model.graph:
        if is_plain(node):
            _infer(node, walk)
            _fold(node, walk, done)
        else:
            _infer_fused(node, walk)
    return walk


def _infer(node: ir.Node, walk: _Walk) -> None:
    read = [value for value in node.inputs if value is not None]
    if any(value not in walk.types for value in read):
        return
    small = {
        value.name or "": _tensor(walk.constants[value], value)
        for value in read
        if value in walk.constants and walk.constants[value].size <= _SMALL
    }
    try:
        version = next(o.version for o in walk.opsets if o.domain in {"", "ai.onnx"})
        schema = onnx.defs.get_schema(node.op_type, version, "")
        found = onnx.shape_inference.infer_node_outputs(
            schema,
            ir.to_proto(node),
            {value.name or "": walk.types[value] for value in read},
            small,
            opset_imports=walk.opsets,
            ir_version=walk.ir_version,
        )
    except Exception:  # noqa: BLE001  onnx raises what it likes; what is not known stays open
        return
    for value in node.outputs:
        if value.name in found:
            walk.types[value] = found[value.name]


def _infer_fused(node: ir.Node, walk: _Walk) -> None:
    read = [None if value is None else walk.sizes(value) for value in node.inputs]
    sizes = shape_of_fused(node, read)
    if sizes is None or node.inputs[0] is None:
        return
    kind = walk.types[node.inputs[0]].tensor_type.elem_type
    for index in SHAPED_OUTPUTS:
        if index < len(node.outputs):
            walk.types[node.outputs[index]] = onnx.helper.make_tensor_type_proto(kind, list(sizes))


def _fold(node: ir.Node, walk: _Walk, done: dict[ir.Node, Any]) -> None:
    """Compute a node whose inputs are constants, once for both walks."""
    if node.op_type in {"Shape", "Size"}:
        _measure(node, walk)
        return
    read = [None if v is None else walk.constants.get(v) for v in node.inputs]
    constant = all(v is None or a is not None for v, a in zip(node.inputs, read, strict=True))
    if not constant or not read or not _may_fold(node, walk, read):
        return
    if node in done and all(a is b for a, b in zip(done[node][0], read, strict=True)):
        outputs = done[node][1]
    else:
        outputs = _compute(node, read, walk)
        done[node] = (read, outputs)
    walk.constants.update(zip(node.outputs, outputs, strict=False))


def _measure(node: ir.Node, walk: _Walk) -> None:
    source = node.inputs[0]
    sizes = None if source is None else walk.sizes(source)
    if sizes is None:
        return
    if node.op_type == "Size":
        counted = [size for size in sizes if size is not None]
        if len(counted) == len(sizes):
            walk.constants[node.outputs[0]] = np.asarray(math.prod(counted), np.int64)
        return
    start, end = (node.attributes.get_int(name, None) for name in ("start", "end"))
    taken = sizes[start:end]
    if None not in taken:
        walk.constants[node.outputs[0]] = np.asarray(taken, np.int64)


def _may_fold(node: ir.Node, walk: _Walk, read: Sequence[NDArray[Any] | None]) -> bool:
    if node.op_type in _KEPT or any(
        attribute.type in {ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS}
        for attribute in node.attributes.values()
    ):
        return False
    if node.op_type == "DequantizeLinear" and _is_weight(node, read[0]):
        return False
    limit = max(_LARGEST, 2 * sum(array.nbytes for array in read if array is not None))
    for value in node.outputs:
        sizes = walk.sizes(value)
        if sizes is None:
            return False
        counted = [size for size in sizes if size is not None]
        if len(counted) != len(sizes) or 8 * math.prod(counted) > limit:
            return False
    return True


def _is_weight(dequantize: ir.Node, held: NDArray[Any] | None) -> bool:
    """Match a constant in 8 bits that is a product's operand; a bias is as good in floats.

    Biases in int32, which a runtime adds to its sums, are no operand of a compiler.
    """
    if held is None or held.dtype == np.int32:
        return False
    users = [use.node.op_type for use in dequantize.outputs[0].uses()]
    return any(user in {*WEIGHTED_PRODUCTS, "Reshape", "Transpose"} for user in users)


def _compute(node: ir.Node, read: Sequence[NDArray[Any] | None], walk: _Walk) -> list[NDArray[Any]]:
    """Run one node in onnxruntime; nothing where it has no kernel for it."""
    inputs = {
        value.name or "": array
        for value, array in zip(node.inputs, read, strict=True)
        if value is not None and array is not None
    }
    small = {name: array for name, array in inputs.items() if array.size <= _SMALL}
    large = {name: array for name, array in inputs.items() if name not in small}
    outputs = [value.name or "" for value in node.outputs if value.name]
    try:
        graph = onnx.helper.make_graph(
            [ir.to_proto(node)],
            "constant",
            [onnx.helper.make_tensor_value_info(
                name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            ) for name, array in large.items()],
            [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
            [onnx.numpy_helper.from_array(array, name) for name, array in small.items()],
        )  # fmt: skip
        model = onnx.helper.make_model(graph, opset_imports=walk.opsets, ir_version=walk.ir_version)
        return _run(model, outputs, large)
    except Exception:  # noqa: BLE001  onnxruntime's errors have no base; the node stays
        return []


def _tensor(array: NDArray[Any], value: ir.Value) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.asarray(array, order="C"), value.name)


def _write_types(graph: ir.Graph, walks: Sequence[_Walk], batch: Any) -> None:
    for node in graph:
        for value in node.outputs:
            shapes = [walk.sizes(value) for walk in walks]
            first = shapes[0]
            if first is None or any(s is None or len(s) != len(first) for s in shapes):
                continue
            value.type = ir.TensorType(ir.DataType(walks[0].types[value].tensor_type.elem_type))
            columns = list(zip(*(s for s in shapes if s is not None), strict=True))
            named = list(value.shape or ()) if value.is_graph_output() else []
            sizes = [_dim(column, batch) for column in columns]
            if len(named) == len(sizes):  # an output keeps the names of its open sizes
                sizes = [s if isinstance(s, int) else n for s, n in zip(sizes, named, strict=True)]
            value.shape = ir.Shape(sizes)


def _dim(sizes: tuple[int | None, ...], batch: Any) -> Any:
    """Give a size that is the same in all walks, the batch where it is that, else an open one."""
    if len(set(sizes)) == 1 and sizes[0] is not None:
        return sizes[0]
    return batch if sizes == _BATCHES else ir.SymbolicDim(None)


def _write_constants(builder: GraphBuilder, walks: Sequence[_Walk]) -> int:
    written = 0
    for node in builder.graph:
        for value in node.outputs:
            arrays = [walk.constants.get(value) for walk in walks]
            first = arrays[0]
            if first is None or value.is_graph_output() or not value.uses():
                continue
            if not all(a is not None and _same(a, first) for a in arrays[1:]):
                continue
            name = builder.free(f"{value.name}.constant")
            tensor = ir.tensor(np.asarray(first, order="C"), name=name)
            value.replace_all_uses_with(builder.initializer(tensor, name))
            written += 1
    return written


def _same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return one is other or (one.dtype == other.dtype and np.array_equal(one, other))


def _write_targets(builder: GraphBuilder) -> None:
    """Give each Reshape to one open size, the rest known, a constant target."""
    for node in builder.graph:
        target = node.inputs[1] if node.op_type == "Reshape" and len(node.inputs) > 1 else None
        shape = node.outputs[0].shape
        if target is None or target.const_value is not None or shape is None:
            continue
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if sizes.count(-1) > 1 or 0 in sizes:
            continue
        name = builder.free(f"{target.name}.constant")
        node.replace_input_with(1, builder.initializer(ir.tensor(np.array(sizes)), name))


def fix_image_size(model: ir.Model) -> ImageSize | None:
    """Write height, width and channels into the image input's shape, in place.

    Returns:
        The size; None where nothing was dynamic, or where patches and position embedding do not
        tell (a grid that is not square might be turned).
    """
    for conv in model.graph:
        image = conv.inputs[0] if conv.op_type == "Conv" else None
        if image is None or not image.is_graph_input() or image.shape is None:
            continue
        kernel = _patch_kernel(conv)
        if kernel is None or all(isinstance(size, int) for size in image.shape[1:]):
            return None
        dim, channels, height, width = kernel
        side = _square_grid(model.graph, dim)
        if side is None:
            return None
        size = ImageSize(side * height, side * width)
        image.shape = ir.Shape([image.shape[0], channels, size.height, size.width])
        return size
    return None


def _patch_kernel(conv: ir.Node) -> tuple[int, ...] | None:
    """Give [dim, c, height, width] of a convolution that cuts an image into patches."""
    weight = conv.inputs[1]
    strides = conv.attributes.get("strides")
    if weight is None or weight.const_value is None or strides is None:
        return None
    shape: tuple[int, ...] = tuple(weight.const_value.shape.numpy())
    return shape if len(shape) == 4 and list(shape[2:]) == list(strides.as_ints()) else None


def _square_grid(graph: ir.Graph, dim: int) -> int | None:
    """Find the position embedding [1, 1 + side * side, dim] among what is added, and its side."""
    for node in graph:
        if node.op_type != "Add":
            continue
        for value in node.inputs:
            table = None if value is None else value.const_value
            shape = () if table is None else tuple(table.shape.numpy())
            if len(shape) == 3 and shape[0] == 1 and shape[1] > 1 and shape[2] == dim:
                side = math.isqrt(shape[1] - 1)
                return side if side * side == shape[1] - 1 else None
    return None


# Turns each MatMul + Add of a [b, n, dim] tensor into Reshape, Gemm, Reshape: 286 -> 322 nodes
# on ViT-S, and TensorRT then loses the fusion of the bias.
HARMFUL_PASSES = ["fuse_matmul_add_bias_into_gemm_batched"]


def simplify(model: ir.Model) -> tuple[ir.Model, str]:
    """Run onnxsim over the skeleton of ``model``, which is not changed.

    The result is kept only if it has fewer nodes and, run on the same seeded input, the same
    outputs.

    Returns:
        The graph to go on with, and the reason for it.
    """
    import onnxsim  # it imports torch, two seconds that most graphs need not wait for

    try:
        with _without_stderr():
            proto, _ = onnxsim.simplify(
                skeleton(model), skipped_optimizers=HARMFUL_PASSES, check_n=0
            )
        candidate = refill(proto, model)
        reason = _objection(model, candidate)
    except Exception as error:  # noqa: BLE001  theirs have no base; a smaller graph is no need
        reason = f"not kept: {' '.join(str(error).split())[:200]}"
    if reason:
        return model, reason
    return candidate, f"kept: {len(model.graph) - len(candidate.graph)} nodes fewer"


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drop what is printed on stderr by C++ too: names out of a hostile file, and tracebacks.

    onnxsim prints there what it cannot fold, and leaves it as it is.
    """
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123  for its descriptor
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _objection(model: ir.Model, candidate: ir.Model) -> str:
    """Give the reason against the simplified graph; nothing if it is taken."""
    before, after = len(model.graph), len(candidate.graph)
    if operators(candidate) == operators(model):
        return "nothing left to simplify"
    if after >= before:
        return f"not kept: {after} nodes instead of {before}"
    difference = _difference(model, candidate)
    # the passes fold and drop nodes; arithmetic moves by rounding at most
    return "" if difference <= 1e-5 else f"not kept: outputs moved by {difference:.1e}"


def _difference(model: ir.Model, candidate: ir.Model) -> float:
    """Run both on one seeded batch; the largest difference relative to the largest output."""
    inputs = {}
    generator = np.random.default_rng(0)
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else 1 for size in value.shape or ()]
        assert value.dtype is not None
        assert value.name is not None
        inputs[value.name] = (generator.random(shape) * 2).astype(value.dtype.numpy())
    wanted, got = (_run(ir.to_proto(graph), None, inputs) for graph in (model, candidate))
    worst = np.float64(0.0)
    for want, have in zip(wanted, got, strict=True):
        scale = np.maximum(np.abs(want).max(), 1.0)
        worst = np.maximum(worst, np.abs(want.astype(np.float64) - have).max() / scale)
    return float(worst)


def _run(
    model: onnx.ModelProto, outputs: list[str] | None, inputs: dict[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what fails is raised
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    computed: list[NDArray[Any]] = session.run(outputs, inputs)
    return computed
