"""The kernels of a compiled engine, read from the builder's log or from an EngineInspector.

With ``ProfilingVerbosity.DETAILED`` TensorRT-RTX logs one record a kernel at VERBOSE; full
TensorRT tells the same through its inspector, on a GPU. Both become ``Kernel``.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from msn_export.errors import BuildError

# Bytes an element takes, by TensorRT's spelling in records.
ITEM_BYTES = {
    "Float": 4.0, "Half": 2.0, "BFloat16": 2.0, "Int8": 1.0, "FP8": 1.0, "UInt8": 1.0, "Bool": 1.0,
    "Int32": 4.0, "Int64": 8.0, "Int4": 0.5, "FP4": 0.5, "E8M0": 1.0,
}  # fmt: skip

# The fields of a record, in order; a list's closing bracket belongs to the next separator.
_SEPARATORS = (
    ", LayerType: ", ", Inputs: [", "], Constants: [", "], Outputs: [", "], TacticName: ",
    ", StreamId: ", ", Metadata: ",
)  # fmt: skip
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[^\]]*)\].*?Datatype: (?P<dtype>\w+)"
)
_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# A Myelin kernel ends in _myl<graph>_<index>; each optimisation profile is a graph of its own.
_GRAPH = re.compile(r"_myl(\d+)_\d+$")
_PROFILE = re.compile(r"\[profile (\d+)\]")
# blocks.3.attn (ours), /vit/encoder/layer.3/ and vit.layers.3. (Hugging Face), encoder_layer_3
# (torchvision). The first that matches is the outermost module.
_BLOCK = re.compile(r"(?:^|[./_])(?:blocks?|layers?)[._/]?(\d+)(?=[./_]|$)")


@dataclass(frozen=True, slots=True)
class Constant:
    """A weight baked into a kernel; several kernels (of two profiles, say) may share one."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in the engine, in bytes."""
        return math.ceil(math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 4.0))


@dataclass(frozen=True, slots=True)
class Kernel:
    """One record: ``kind`` is TensorRT's LayerType, dtypes are in TensorRT's spelling.

    ``layers`` are the ONNX nodes it computes. ``kind`` "shape_call" computes shapes on the host;
    it is counted like the rest. ``accumulator`` is what a fused attention kernel sums in,
    "unknown" where that is not told and "" of all other kernels.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[Constant, ...] = ()
    layers: tuple[str, ...] = ()
    tactic: str = ""
    profile: int = 0
    accumulator: str = ""

    @property
    def block(self) -> int | None:
        """The transformer block it belongs to, or None.

        The block that most of its ONNX nodes name; of two named equally often (a kernel across
        the seam of two blocks) the lower, whose output it completes.
        """
        named = [block for layer in self.layers if (block := block_of(layer)) is not None]
        return max(sorted(set(named)), key=named.count, default=None)


def block_of(node: str) -> int | None:
    """Read the block's number out of an ONNX node's name; None where none is found."""
    match = _BLOCK.search(node)
    return int(match[1]) if match else None


def read_log(messages: list[str]) -> tuple[Kernel, ...]:
    """Read the kernel records among a builder's log messages.

    Raises:
        BuildError: there is none, or one cannot be read: this TensorRT writes them differently.
    """
    records = [
        line
        for message in messages
        for line in message.splitlines()
        if line.startswith("Name: ") and ", LayerType: " in line
    ]
    if not records:
        raise BuildError("the builder's log has no kernel records; the engine cannot be judged")
    return tuple(_read_records(records))


def _read_records(records: list[str]) -> Iterator[Kernel]:
    split = [_split(record) for record in records]
    profiles = _profile_of_graphs(records)
    for name, kind, inputs, constants, outputs, tactic, _stream, metadata in split:
        yield Kernel(
            name=name,
            kind=kind,
            inputs=tuple(tensor["dtype"] for tensor in _TENSOR.finditer(inputs)),
            outputs=tuple(tensor["dtype"] for tensor in _TENSOR.finditer(outputs)),
            constants=tuple(
                Constant(tensor["name"], tensor["dtype"], _shape(tensor["shape"]))
                for tensor in _TENSOR.finditer(constants)
            ),
            layers=tuple(_LAYER.findall(metadata)),
            tactic=tactic,
            profile=profiles.get(_graph(name), 0),
        )


def _split(record: str) -> list[str]:
    """Cut a record into its eight fields."""
    values, rest = [], record.removeprefix("Name: ")
    for separator in _SEPARATORS:
        value, found, rest = rest.partition(separator)
        if not found:
            raise BuildError(
                f"the builder's log has a kernel record of unknown form (no {separator.strip()!r} "
                f"in {record[:120]!r}); the engine cannot be judged"
            )
        values.append(value)
    return [*values, rest]


def read_inspector(text: str) -> tuple[Kernel, ...]:
    """Read ``EngineInspector.get_engine_information(LayerInformationFormat.JSON)``.

    Raises:
        BuildError: it is no such JSON, or holds names only (an engine built without DETAILED).
    """
    try:
        layers = json.loads(text)["Layers"]
        named_only = any(isinstance(layer, str) for layer in layers)
    except (ValueError, KeyError, TypeError) as error:
        raise BuildError(f"the engine inspector's answer is not understood ({error!r})") from error
    if named_only or not layers:
        raise BuildError(
            "the engine tells only the names of its layers; build it with detailed profiling"
        )
    try:
        return tuple(_read_layer(layer) for layer in layers)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BuildError(f"the engine inspector's answer is not understood ({error!r})") from error


def _read_layer(layer: Mapping[str, Any]) -> Kernel:
    constants = layer.get("Constants") or []
    profile = _PROFILE.search(layer["Name"])
    return Kernel(
        name=layer["Name"],
        kind=layer["LayerType"],
        inputs=tuple(_dtype(tensor) for tensor in layer.get("Inputs") or []),
        outputs=tuple(_dtype(tensor) for tensor in layer.get("Outputs") or []),
        constants=tuple(
            Constant(tensor["Name"], _dtype(tensor), tuple(map(int, tensor["Dimensions"])))
            for tensor in constants
        ),
        layers=tuple(_LAYER.findall(layer.get("Metadata") or "")),
        tactic=str(layer.get("TacticName") or ""),
        profile=int(profile[1]) if profile else 0,
    )


def _dtype(tensor: Mapping[str, Any]) -> str:
    """Read ``Half`` from a Datatype, or from a Format/Datatype ``Row major linear FP16``."""
    text = str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")
    spelled = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT8": "Int8", "FP8": "FP8"}
    return next((name for key, name in spelled.items() if key in text.split()), text)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size.strip())


def _graph(name: str) -> int:
    match = _GRAPH.search(name)
    return int(match[1]) if match else -1


def _profile_of_graphs(records: list[str]) -> dict[int, int]:
    """Map each Myelin graph to its optimisation profile: tensors of profile 1 on are marked."""
    profiles: dict[int, int] = {}
    for record in records:
        marked = _PROFILE.search(record)
        if marked:
            profiles[_graph(record[len("Name: ") :].split(", LayerType: ")[0])] = int(marked[1])
    return profiles
