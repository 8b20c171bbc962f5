"""What fused attention sums in, read from the CUDA source that an engine of TensorRT-RTX holds.

TensorRT-RTX compiles its generated kernels on the user's machine and keeps their source in the
engine, each function under the kernel's tactic. A tensor-core kernel names its types where it fills
its parameters: ``initialize(DATA_TYPE_FP16, DATA_TYPE_FP16, DATA_TYPE_FP16, ...`` are those of the
inputs, of the output and of the sums; in bf16 the third is FP32. The kernel for a single query is
written out and names the type of its sums in each ``FMA<...>``. Found in 1.7.1, SM 7.5 to 12.0.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from mmap import mmap

from msn_export.engine.kernels import Kernel
from msn_export.engine.roles import is_fused_attention

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
    """Read what each fused attention kernel in an engine sums in.

    Args:
        engine: the file's bytes; anything may be in them.

    Returns:
        By tactic, for each time its source is there, ``fp16``, ``fp32``, ``int32`` or ``unknown``.
        Nothing where an engine holds no source.
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
    """Say of each fused attention kernel what it sums in: ``unknown`` where that is not told."""
    found = read_accumulators(engine)
    return tuple(
        replace(kernel, accumulator=_agreed(found.get(kernel.tactic, [])))
        if is_fused_attention(kernel)
        else kernel
        for kernel in kernels
    )


def _agreed(accumulators: list[str]) -> str:
    return accumulators[0] if len(set(accumulators)) == 1 else UNKNOWN
