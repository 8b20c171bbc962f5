"""Loops of an ONNX file, found with the standard library alone: a graph may run for ever.

``Loop`` and ``Scan`` are taken where the file itself bounds their trip count; ``If`` always is.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeAlias

from msn_export.errors import GraphError
from msn_export.input_files import GRAPH, open_regular
from msn_export.onnx_header import MalformedError, fields, text, varint

LONGEST = 10_000  # trips, of nested loops their product; a loop over the tokens of a ViT has fewer
_DEEPEST = 50  # graphs inside graphs; protobuf's own parsers stop at 100 messages

# Field numbers of onnx/onnx.proto
_MODEL_GRAPH, _MODEL_FUNCTION = 7, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT = 1, 5, 11
_FUNCTION_NODE = 7
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TENSOR = 1, 3, 5
_ATTRIBUTE_GRAPH, _ATTRIBUTE_INTS, _ATTRIBUTE_GRAPHS = 6, 8, 11
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_INT64, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 7, 8, 9
_VALUE_NAME, _VALUE_TYPE = 1, 2
_INT64 = 7  # TensorProto.DataType
_VARINT, _LENGTH = 0, 2  # wire types


def require_bounded_loops(path: Path) -> None:
    """Refuse a graph that may run for ever, in its subgraphs and functions too.

    Raises:
        GraphError: a ``Loop`` or ``Scan`` has no constant trip count below 10,000, or the file is
            no ONNX file.
    """
    try:
        with open_regular(path, GRAPH) as file:
            size = os.fstat(file.fileno()).st_size
            _LoopWalk(file, path).model(size)
    except MalformedError as error:
        raise GraphError(f"{path} is not an ONNX file ({error}); export it again") from error


Span: TypeAlias = tuple[int, int]  # where a message begins and ends in the file


@dataclass(slots=True)
class _Node:
    name: str = ""
    op: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    attributes: list[Span] = field(default_factory=list)  # where each begins and ends


@dataclass(frozen=True, slots=True)
class _Facts:
    """Numbers and sizes that the file fixes, by the name of the value."""

    numbers: Mapping[str, int] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


class _LoopWalk:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path

    def model(self, end: int) -> None:
        graphs = 0
        for number, wire, length, _ in fields(self._file, end):
            stop = self._file.tell() + length
            if wire == _LENGTH and number == _MODEL_GRAPH:
                graphs += 1
                if graphs > 1:  # protobuf would make one of them
                    raise MalformedError("two graphs in it")
                self._graph(stop, _GRAPH_NODE, _Facts(), 1, 0)
            elif wire == _LENGTH and number == _MODEL_FUNCTION:
                self._graph(stop, _FUNCTION_NODE, _Facts(), 1, 0)
            self._file.seek(stop)

    def _graph(self, end: int, node: int, outer: _Facts, times: int, depth: int) -> None:
        """Look at a graph's or a function's nodes, which run ``times`` times."""
        if depth > _DEEPEST:
            raise MalformedError(f"more than {_DEEPEST} graphs inside each other")
        numbers, sizes, nodes = dict[str, int](), dict[str, tuple[int, ...]](), list[_Node]()
        inputs = list[Span]()
        is_function = node == _FUNCTION_NODE
        for number, wire, length, _ in fields(self._file, end):
            stop = self._file.tell() + length
            if wire == _LENGTH and number == node:
                nodes.append(self._node(stop))
            elif wire == _LENGTH and not is_function and number == _GRAPH_INITIALIZER:
                self._tensor(stop, None, numbers, sizes)
            elif wire == _LENGTH and not is_function and number == _GRAPH_INPUT:
                inputs.append((self._file.tell(), stop))
            self._file.seek(stop)
        for span in inputs if depth == 0 else ():
            self._input(span, sizes)
        for one in nodes:
            if one.op == "Constant" and one.outputs:
                self._constant(one, numbers, sizes)
        facts = _Facts({**outer.numbers, **numbers}, {**outer.sizes, **sizes})
        for one in nodes:
            self._inside(one, facts, times, depth)

    def _inside(self, node: _Node, facts: _Facts, times: int, depth: int) -> None:
        parts = [self._attribute(start, end) for start, end in node.attributes]
        graphs = [span for part in parts for span in part.graphs]
        if node.domain in {"", "ai.onnx"} and node.op in {"Loop", "Scan", "SequenceMap"}:
            trips = _trips_of(node, {part.name: part for part in parts}, facts)
            if trips is None or trips * times >= LONGEST:
                found = "no constant trip count" if trips is None else f"{trips * times:,} trips"
                raise GraphError(
                    f"{self._path}: {node.op} {node.name!r} has {found}; expected a constant below "
                    f"{LONGEST:,}: export the model without this loop, or unroll it"
                )
            times *= max(trips, 1)
        for start, end in graphs:
            self._file.seek(start)
            self._graph(end, _GRAPH_NODE, facts, times, depth + 1)

    def _node(self, end: int) -> _Node:
        node = _Node()
        for number, wire, length, _ in fields(self._file, end):
            start = self._file.tell()
            if wire == _LENGTH and number == _NODE_ATTRIBUTE:
                node.attributes.append((start, start + length))
            elif wire == _LENGTH and number in {
                _NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_DOMAIN,
            }:  # fmt: skip
                read = text(self._file.read(length))
                if number == _NODE_INPUT:
                    node.inputs.append(read)
                elif number == _NODE_OUTPUT:
                    node.outputs.append(read)
                elif number == _NODE_NAME:
                    node.name = read
                elif number == _NODE_OP:
                    node.op = read
                else:
                    node.domain = read
            self._file.seek(start + length)
        return node

    def _attribute(self, start: int, end: int) -> _Attribute:
        self._file.seek(start)
        found = _Attribute()
        for number, wire, length, value in fields(self._file, end):
            at = self._file.tell()
            if number == _ATTRIBUTE_NAME and wire == _LENGTH:
                found.name = text(self._file.read(length))
            elif number in {_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS} and wire == _LENGTH:
                found.graphs.append((at, at + length))
            elif number == _ATTRIBUTE_TENSOR and wire == _LENGTH:
                found.tensor = (at, at + length)
            elif number in {_ATTRIBUTE_INT, _ATTRIBUTE_INTS} and wire == _VARINT:
                found.ints.append(_signed(value))
            elif number == _ATTRIBUTE_INTS and wire == _LENGTH:
                found.ints += self._packed(at + length)
            self._file.seek(at + length)
        return found

    def _packed(self, end: int) -> list[int]:
        numbers = []
        while self._file.tell() < end:
            numbers.append(_signed(varint(self._file)))
        return numbers

    def _constant(
        self, node: _Node, numbers: dict[str, int], sizes: dict[str, tuple[int, ...]]
    ) -> None:
        name = node.outputs[0]
        for start, end in node.attributes:
            found = self._attribute(start, end)
            if found.name == "value_int" and found.ints:
                numbers[name] = found.ints[-1]
            elif found.name == "value_ints" and len(found.ints) == 1:
                numbers[name] = found.ints[0]
            elif found.name == "value" and found.tensor is not None:
                self._file.seek(found.tensor[0])
                self._tensor(found.tensor[1], name, numbers, sizes)

    def _tensor(
        self, end: int, name: str | None, numbers: dict[str, int], sizes: dict[str, tuple[int, ...]]
    ) -> None:
        """Note a tensor's sizes, and its number where it holds one int64."""
        dims, kind, values, raw, own = list[int](), 0, list[int](), b"", ""
        for number, wire, length, value in fields(self._file, end):
            at = self._file.tell()
            if number == _TENSOR_DIMS:
                dims += self._numbers(wire, value, at, length)
            elif number == _TENSOR_TYPE and wire == _VARINT:
                kind = _signed(value)
            elif number == _TENSOR_INT64 and length <= 16:
                values += self._numbers(wire, value, at, length)
            elif number == _TENSOR_NAME and wire == _LENGTH:
                own = text(self._file.read(length))
            elif number == _TENSOR_RAW and wire == _LENGTH and length == 8:
                raw = self._file.read(8)
            self._file.seek(at + length)
        name = own if name is None else name
        if name in sizes:  # a second of this name: which one counts is anybody's guess
            numbers.pop(name, None)
            sizes[name] = ()
            return
        sizes[name] = tuple(dims)
        if kind == _INT64 and math.prod(dims) == 1 and (len(raw) == 8 or len(values) == 1):
            numbers[name] = struct.unpack("<q", raw)[0] if raw else values[0]

    def _numbers(self, wire: int, value: int, at: int, length: int) -> list[int]:
        if wire == _VARINT:
            return [_signed(value)]
        return self._packed(at + length) if wire == _LENGTH else []

    def _input(self, span: Span, sizes: dict[str, tuple[int, ...]]) -> None:
        """Note the sizes of the model's input, which a runner requires of its images."""
        names = [self._read(*part) for part in self._parts(span, _VALUE_NAME)]
        # TypeProto.tensor_type.shape.dim
        dims = [
            self._size(dim)
            for kind in self._parts(span, _VALUE_TYPE)
            for tensor in self._parts(kind, 1)
            for shape in self._parts(tensor, 2)
            for dim in self._parts(shape, 1)
        ]
        sizes[names[-1] if names else ""] = tuple(dims)

    def _parts(self, span: Span, wanted: int) -> Iterator[Span]:
        """Give where the messages or texts of one number begin and end in a message."""
        self._file.seek(span[0])
        for number, wire, length, _ in fields(self._file, span[1]):
            end = self._file.tell() + length
            if number == wanted and wire == _LENGTH:
                yield end - length, end
            self._file.seek(end)

    def _read(self, start: int, end: int) -> str:
        self._file.seek(start)
        return text(self._file.read(end - start))

    def _size(self, dim: Span) -> int:
        """Read dim_value; 0 for a size that is open."""
        size = 0
        self._file.seek(dim[0])
        for number, wire, length, value in fields(self._file, dim[1]):
            size = _signed(value) if number == 1 and wire == _VARINT else size
            self._file.seek(length, os.SEEK_CUR)
        return size


@dataclass(slots=True)
class _Attribute:
    name: str = ""
    ints: list[int] = field(default_factory=list)
    graphs: list[Span] = field(default_factory=list)
    tensor: Span | None = None


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number


def _trips_of(node: _Node, attributes: Mapping[str, _Attribute], facts: _Facts) -> int | None:
    """Find how often a loop's body runs at most; None where the file does not tell."""
    if node.op == "Loop":
        trips = facts.numbers.get(node.inputs[0]) if node.inputs else None
        return None if trips is None else max(trips, 0)
    if node.op != "Scan":
        return None
    count = attributes.get("num_scan_inputs", _Attribute()).ints[-1:] or [0]
    axes = attributes.get("scan_input_axes", _Attribute()).ints or [0] * count[0]
    scanned = node.inputs[-count[0] :] if 0 < count[0] <= len(node.inputs) else []
    for name, axis in zip(scanned, axes, strict=False):
        sizes = facts.sizes.get(name, ())
        if -len(sizes) <= axis < len(sizes) and sizes[axis] > 0:
            return sizes[axis]  # the others are as long, or onnxruntime refuses it
    return None
