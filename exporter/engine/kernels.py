"""The kernels of a compiled engine, what each does and what fused attention sums in.

With ``ProfilingVerbosity.DETAILED`` TensorRT-RTX logs one record a kernel at VERBOSE; full
TensorRT tells the same through its inspector, on a GPU. Both become ``Kernel``.

Generated kernels are called ``__myl_`` and what they fuse: ``__myl_FcAddCast_myl0_4`` is a matrix
product, an addition and a cast. Checked on SM 7.5 to 12.0 in fp32, fp16, bf16, int8 and fp8.

TensorRT-RTX compiles its generated kernels on the user's machine and keeps their source in the
engine, each function under the kernel's tactic. A tensor-core kernel names its types where it fills
its parameters: ``initialize(DATA_TYPE_FP16, DATA_TYPE_FP16, DATA_TYPE_FP16, ...`` are those of the
inputs, of the output and of the sums; in bf16 the third is FP32. The kernel for a single query is
written out and names the type of its sums in each ``FMA<...>``. Found in 1.7.1, SM 7.5 to 12.0.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from mmap import mmap
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
        return math.ceil(math.prod(self.shape) * ITEM_BYTES.get(self.dtype, 4.0))


@dataclass(frozen=True, slots=True)
class Kernel:
    """One record: ``kind`` is TensorRT's LayerType, dtypes are in TensorRT's spelling.

    ``layers`` are the ONNX nodes it computes. ``kind`` "shape_call" computes shapes on the host;
    it is counted like the rest. ``accumulator`` is what a fused attention kernel sums in,
    "unknown" where the engine does not say, and "" for all other kernels.
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
        the border of two blocks) the lower, whose output it completes.
        """
        named = [block for layer in self.layers if (block := block_of(layer)) is not None]
        return max(sorted(set(named)), key=named.count, default=None)


def block_of(node: str) -> int | None:
    match = _BLOCK.search(node)
    return int(match[1]) if match else None


def read_log(messages: list[str]) -> tuple[Kernel, ...]:
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
                Constant(
                    tensor["name"],
                    tensor["dtype"],
                    tuple(int(size) for size in tensor["shape"].split(",") if size.strip()),
                )
                for tensor in _TENSOR.finditer(constants)
            ),
            layers=tuple(_LAYER.findall(metadata)),
            tactic=tactic,
            profile=profiles.get(_graph(name), 0),
        )


def _split(record: str) -> list[str]:
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


_FUSED_ATTENTION = re.compile(r"(?:__mye\d+)?_ge(?:mm|mv)_mha")
_GENERATED = re.compile(r"__myl_([A-Za-z]+?)(?:_myl\d+_\d+)?")
_GEMM_KINDS = frozenset(
    {"gemm", "MatrixMultiply", "FullyConnected", "Gemm", "CaskGemmMatrixMultiply"}
)
_CONVOLUTION_KINDS = frozenset(
    {"correlation", "Convolution", "CaskConvolution", "CaskGemmConvolution"}
)
_LAYOUT_KINDS = frozenset({"Reformat", "Shuffle", "Slice", "Concatenation", "NoOp"})
# Parts of a generated kernel's name that move or copy elements; older TensorRTs cut to 3 letters.
_MOVES = frozenset({"Move", "Resh", "Tran", "Slic", "Conc", "Repl", "Cast", "Gath", "Copy", "Expa"})
_MOVES_3 = frozenset(move[:3] for move in _MOVES)
# Layers whose inside TensorRT does not tell (8.6: a whole transformer is one of them).
_CLOSED = re.compile(r"\{?ForeignNode\[|Myelin$")
_WIDTH = ("Float", "Half", "BFloat16", "FP8", "Int8", "FP4", "Int4")  # the widest first


def is_fused_attention(kernel: Kernel) -> bool:
    """True for TensorRT's fused attention, not for an ONNX node that is called mha."""
    return bool(_FUSED_ATTENTION.match(kernel.name))


def is_gemm(kernel: Kernel) -> bool:
    return kernel.kind in _GEMM_KINDS or "Fc" in parts(kernel)


def is_layout_only(kernel: Kernel) -> bool:
    """True for a kernel that moves, copies or converts elements and computes nothing."""
    found = parts(kernel)
    moves = bool(found) and all(part in _MOVES or part in _MOVES_3 for part in found)
    return moves or kernel.kind in _LAYOUT_KINDS


def gemm_dtype(kernel: Kernel) -> str:
    """Dtype a matrix product or convolution multiplies in.

    That of its largest constant of two or more dimensions, which is the weight; without one (two
    activations) the widest of its inputs, so that a doubtful case never passes as narrower. Not
    the inputs where there is a weight: a fused residual is an input too.
    """
    matrices = [c for c in kernel.constants if sum(size > 1 for size in c.shape) >= 2]
    if matrices:
        return max(matrices, key=lambda constant: constant.bytes).dtype
    order = {dtype: index for index, dtype in enumerate(_WIDTH)}
    return min(kernel.inputs, key=lambda dtype: order.get(dtype, -1), default="unknown")


def parts(kernel: Kernel) -> list[str]:
    """Split ``__myl_FcAddCast_myl0_4`` into Fc, Add, Cast; other kernels have no parts."""
    match = _GENERATED.fullmatch(kernel.name)
    return re.findall(r"[A-Z][a-z0-9]*", match[1]) if match else []


def is_closed(kernel: Kernel) -> bool:
    """True for a layer whose kernels TensorRT does not list."""
    return bool(_CLOSED.match(kernel.name) or _CLOSED.match(kernel.kind))


def is_convolution(kernel: Kernel) -> bool:
    return kernel.kind in _CONVOLUTION_KINDS


UNKNOWN = "unknown"

Buffer = bytes | memoryview | mmap

_FUNCTION = re.compile(
    rb"__global__ void (?:__launch_bounds__\(\d{1,5}\) )?"
    rb"((?:__mye\d{1,20})?_ge(?:mm|mv)_mha\w{1,200})\("
)
_LONGEST = 1 << 16  # bytes of a function that are read; those known have 800 to 6500
_TYPES = re.compile(rb"\binitialize\(DATA_TYPE_\w{1,20}, DATA_TYPE_\w{1,20}, DATA_TYPE_(\w{1,20}),")
# FMA<a, b, sum, ...>::fma and FMAReduce<a, b, sum, ...>::fma; a type may be __myln_vtype<t, n, m>
_TYPE = rb"(?:__myln_vtype<__myln_(?:\w{1,20}),\d{1,4},\d{1,4}>|__myln_\w{1,20})"
_FMA = re.compile(rb"\bFMA(?:Reduce)?<" + _TYPE + rb", " + _TYPE + rb", (" + _TYPE + rb"), ")
_ELEMENT = re.compile(rb"__myln_(?!vtype)(\w{1,20})")
_NAMES = {
    b"FP16": "fp16", b"FP32": "fp32", b"INT32": "int32", b"half": "fp16", b"float": "fp32",
    b"int32": "int32",
}  # fmt: skip


def read_accumulators(engine: Buffer) -> dict[str, list[str]]:
    """Find the types that each fused attention kernel in an engine sums in.

    By tactic, for each time its source is found: ``fp16``, ``fp32``, ``int32`` or ``unknown``.
    ``engine`` is hostile: it may hold anything.
    """
    found: dict[str, list[str]] = {}
    for match in _FUNCTION.finditer(engine):
        body = bytes(engine[match.end() : match.end() + _LONGEST])
        body = body.partition(b"\0")[0].partition(b"__global__")[0]
        found.setdefault(match[1].decode("ascii"), []).append(_sums_in(body))
    return found


def _sums_in(body: bytes) -> str:
    types = _TYPES.findall(body)
    for text in _FMA.findall(body):
        types += _ELEMENT.findall(text)
    names = {_NAMES.get(name, UNKNOWN) for name in types}
    return names.pop() if len(names) == 1 else UNKNOWN


def with_accumulators(kernels: Sequence[Kernel], engine: Buffer) -> tuple[Kernel, ...]:
    """Add to each fused attention kernel the type it sums in, or ``unknown``."""
    found = read_accumulators(engine).items()
    agreed = {tactic: sums[0] for tactic, sums in found if len(set(sums)) == 1}
    return tuple(
        replace(kernel, accumulator=agreed.get(kernel.tactic, UNKNOWN))
        if is_fused_attention(kernel)
        else kernel
        for kernel in kernels
    )
