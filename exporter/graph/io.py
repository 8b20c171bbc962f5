"""Read and write ONNX files, and hand a graph's skeleton to libraries that copy what they get.

A skeleton is the graph without its weights: onnxsim, the version converter and the checker
serialise what they are given several times, which for a ViT-L is gigabytes each.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
from onnx_ir.external_data import load_to_model
from onnx_ir.passes.common import LiftConstantsToInitializersPass
from onnx_ir.traversal import RecursiveGraphIterator

from msn_export.errors import GraphError
from msn_export.onnx_header import fields
from msn_export.onnx_loops import require_bounded_loops

# A protobuf message holds less than 2 GiB: protobuf.dev/programming-guides/proto-limits
PROTOBUF_LIMIT = 2**31 - 1
# Smaller constants stay in a skeleton: shapes and indices, which simplification must see.
SKELETON_KEEPS = 1024  # bytes

# Field numbers of onnx/onnx.proto; wire type 2 is length-delimited
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT = 5, 11
_TENSOR_RAW_DATA = 9


def load(path: Path) -> ir.Model:
    """Read an ONNX file with its external weights, which lie in the file's own folder.

    All weights come into memory: the libraries that a graph is handed to would look for them
    beside a file that there is not.
    """
    require_bounded_loops(path)
    try:
        # absolute: where a path names no folder, onnx-ir follows links out of it
        model = ir.load(path.absolute())
        model.graph.sort()  # as onnxruntime does; every step here goes through nodes in order
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        _require_no_more_files(model, path)
        skeleton(model)  # what cannot be written again has names that are no text, or no types
    except GraphError:
        raise
    except Exception as error:  # protobuf and onnx-ir raise what they like for damaged files
        reason = _reason(error)
        raise GraphError(f"{path} is not an ONNX file ({reason}); export it again") from error
    _require_made(model, path)
    if not model.graph.outputs:
        raise GraphError(f"{path} is not an ONNX file (no graph in it); export it again")
    if "" not in model.graph.opset_imports:
        raise GraphError(f"{path} names no version of ONNX's operators; export it again")
    _load_weights(model, path)
    return model


def _require_made(model: ir.Model, path: Path) -> None:
    """Refuse a graph whose nodes read what nothing makes, as one that has lost its weights."""
    for node in RecursiveGraphIterator(model.graph):
        for value in node.inputs:
            if value is None or value.producer() is not None:
                continue
            if not (value.is_graph_input() or value.is_initializer()):
                raise GraphError(
                    f"{path} is not a whole ONNX file (nothing in it makes {value.name!r}, which "
                    f"node {node.name!r} reads); export it again"
                )


def _reason(error: Exception) -> str:
    """Give an error's first line, which of onnx-ir's is the innermost one's."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _require_no_more_files(model: ir.Model, path: Path) -> None:
    """Refuse weights beside the file that are no initializers: nobody checks where those lie."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in RecursiveGraphIterator(graph):
            for attribute in node.attributes.values():
                held = () if attribute.is_ref() else attribute.value
                tensors = held if isinstance(held, list | tuple) else (held,)
                if any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors):
                    raise GraphError(
                        f"{path}: attribute {attribute.name!r} of node {node.name!r} has its "
                        "tensor in another file; refused, save the model with its weights inside"
                    )


def _load_weights(model: ir.Model, path: Path) -> None:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                _require_beside(path, value.name, Path(value.const_value.location))
            _require_size(path, value)
    try:
        load_to_model(model)
    except (OSError, ValueError) as error:  # shorter than the graph says, or not ours to read
        reason = str(error).splitlines()[0]
        raise GraphError(
            f"{path}: its weights cannot be read ({reason}); copy them again"
        ) from error


def _require_size(path: Path, weight: ir.Value) -> None:
    """Refuse a weight of more or fewer bytes than its sizes say."""
    tensor = weight.const_value
    proto = getattr(tensor, "raw", None)
    if not isinstance(proto, onnx.TensorProto) or not proto.HasField("raw_data"):
        return
    if tensor is not None and len(proto.raw_data) != tensor.nbytes:
        raise GraphError(
            f"{path}: weight {weight.name!r} has {len(proto.raw_data)} bytes, and its sizes "
            f"{list(proto.dims)} make {tensor.nbytes}; export it again"
        )


def _require_beside(path: Path, weight: str | None, location: Path) -> None:
    if location.is_absolute() or ".." in location.parts:
        raise GraphError(
            f"{path}: weight {weight!r} lies outside the folder ({location}); "
            "refused, save the model with its weights beside it"
        )
    if not (path.parent / location).is_file():
        raise GraphError(f"{path}: its weight file {location} is missing; copy it along")


def save(model: ir.Model, path: Path) -> None:
    """Write an ONNX file, one weight at a time.

    The graph message is written by hand around weights that are never gathered in memory: first
    the skeleton, then each initializer as one more field, which protobuf reads as appended.
    """
    with _weights_aside(model, keeps=-1) as weights:
        proto = ir.to_proto(model)
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    head = proto.SerializeToString(deterministic=True)
    entries = [(tensor, _initializer_head(name, tensor)) for name, tensor in weights.items()]
    size = len(graph) + sum(len(entry) + tensor.nbytes for tensor, entry in entries)
    if size + len(head) + 16 > PROTOBUF_LIMIT:
        raise GraphError(
            f"the graph is {size / 2**30:.1f} GiB and one ONNX file holds less than 2; "
            "export it with --dtype fp16 or bf16"
        )
    with path.open("wb") as file:
        file.write(head + _field(_MODEL_GRAPH, size) + graph)
        for tensor, entry in entries:
            file.write(entry)
            file.write(tensor.tobytes())


def _initializer_head(name: str, tensor: ir.TensorProtocol) -> bytes:
    described = onnx.TensorProto(name=name, data_type=tensor.dtype.value)
    described.dims.extend(tensor.shape.numpy())
    body: bytes = described.SerializeToString(deterministic=True)
    body += _field(_TENSOR_RAW_DATA, tensor.nbytes)
    return _field(_GRAPH_INITIALIZER, len(body) + tensor.nbytes) + body


def _field(number: int, length: int) -> bytes:
    """Start a length-delimited field: protobuf.dev/programming-guides/encoding."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


@contextmanager
def _weights_aside(model: ir.Model, *, keeps: int) -> Iterator[Mapping[str, ir.TensorProtocol]]:
    """Take the initializers above ``keeps`` bytes out of the graph, and put them back after."""
    initializers = model.graph.initializers
    aside: dict[str, ir.Value] = {
        name: value
        for name, value in initializers.items()
        if value.const_value is not None and value.const_value.nbytes > keeps
    }
    tensors: dict[str, ir.TensorProtocol] = {}
    for name, value in aside.items():
        assert value.const_value is not None  # chosen above
        tensors[name] = value.const_value
        value.shape = value.shape or ir.Shape(value.const_value.shape.numpy())
        value.dtype = value.dtype or value.const_value.dtype
        del initializers[name]
    try:
        yield tensors
    finally:
        for value in aside.values():
            initializers.add(value)


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """Serialise the graph with its weights as extra inputs."""
    with _weights_aside(model, keeps=SKELETON_KEEPS) as weights:
        proto = ir.to_proto(model)
        for name, tensor in weights.items():
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(
                    name, tensor.dtype.value, list(tensor.shape.numpy())
                )
            )
    return proto


def refill(proto: onnx.ModelProto, source: ir.Model) -> ir.Model:
    """Make a graph from a processed skeleton and the weights of the graph it came from."""
    model = ir.from_proto(proto)
    kept = [value.name for value in source.graph.inputs]
    for value in list(model.graph.inputs):
        if value.name in kept:
            continue
        weight = source.graph.initializers.get(value.name or "")
        if weight is None:
            raise GraphError(f"the processed graph asks for {value.name!r}, which is no weight")
        model.graph.inputs.remove(value)
        if value.uses():
            value.const_value = weight.const_value
            model.graph.initializers.add(value)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def infer_shapes(model: ir.Model) -> None:
    """Give every value its type and shape, in place."""
    try:
        proto = onnx.shape_inference.infer_shapes(
            skeleton(model), check_type=True, strict_mode=True, data_prop=True
        )
    except Exception as error:  # onnx raises several of its own, and C++'s, for one that is wrong
        reason = " ".join(str(error).split())
        raise GraphError(f"the graph's types or shapes do not fit: {reason}") from error
    inferred = {info.name: info for info in (*proto.graph.value_info, *proto.graph.output)}
    for node in model.graph:
        for value in node.outputs:
            info = inferred.get(value.name or "")
            if info is not None:
                value.type = ir.serde.deserialize_type_proto_for_type(info.type)
                value.shape = ir.serde.deserialize_type_proto_for_shape(info.type)


def check(path: Path) -> None:
    """Run onnx's checker on a file, with strict shape inference.

    The checker is given what the file says of its weights and not their numbers, of which it would
    make two copies.
    """
    try:
        onnx.checker.check_model(_read_skeleton(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        reason = " ".join(str(error).split())
        raise GraphError(f"{path.name} breaks the ONNX specification: {reason}") from error


def _read_skeleton(path: Path) -> bytes:
    """Read a file that ``save`` wrote, each large weight as one more input.

    Raises:
        GraphError: a weight has more or fewer bytes than its sizes say.
    """
    found = bytearray()
    with path.open("rb") as file:
        for number, wire, length, value in fields(file, path.stat().st_size):
            if number == _MODEL_GRAPH:
                graph = _read_graph(file, file.tell() + length, path)
                found += _field(_MODEL_GRAPH, len(graph)) + graph
            else:
                found += _copied(file, number, wire, length, value)
    return bytes(found)


def _read_graph(file: BinaryIO, end: int, path: Path) -> bytes:
    found = bytearray()
    for number, wire, length, value in fields(file, end):
        start = file.tell()
        if number == _GRAPH_INITIALIZER and length > SKELETON_KEEPS:
            info = _read_weight(file, start + length, path).SerializeToString()
            found += _field(_GRAPH_INPUT, len(info)) + info
        else:
            found += _copied(file, number, wire, length, value)
    return bytes(found)


def _read_weight(file: BinaryIO, end: int, path: Path) -> onnx.ValueInfoProto:
    head, held = bytearray(), 0
    for number, wire, length, value in fields(file, end):
        if number == _TENSOR_RAW_DATA:
            held = length
            file.seek(length, os.SEEK_CUR)
        else:
            head += _copied(file, number, wire, length, value)
    tensor = onnx.TensorProto.FromString(bytes(head))
    wanted = math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize)
    if held != wanted:
        raise GraphError(
            f"{path}: weight {tensor.name!r} has {held} bytes, and its sizes {list(tensor.dims)} "
            f"make {wanted}; export it again"
        )
    return onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))


def _copied(file: BinaryIO, number: int, wire: int, length: int, value: int) -> bytes:
    head = _varint(number << 3 | wire)
    if wire == 0:  # a number
        return head + _varint(value)
    return (head if wire != 2 else head + _varint(length)) + file.read(length)
