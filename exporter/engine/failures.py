"""What the builder's and the parser's errors mean, in one sentence that says what to do.

The raw text stays in the log (``--log``). The texts are those of TensorRT 8.6 to 11.4 and
TensorRT-RTX 1.5 to 1.7; tests/engine/test_build.py provokes each that can be had without a GPU.
"""

import re
from collections.abc import Sequence

# The first pattern found wins: the particular before the general. cudaError 35 comes last because
# TensorRT-RTX appends it to other errors where there is no GPU.
_MEANINGS: tuple[tuple[str, str], ...] = (
    (
        r"Attention operation was not supported by a dedicated kernel",
        "TensorRT has no fused kernel for this graph's Attention operator (it has them for fp16 "
        "and bf16, head sizes 16 to 256; for a single query only where heads x smallest batch is "
        "4 or more); build an fp16 graph, or --allow-unfused takes it apart",
    ),
    (
        r"Cannot compile for target\(s\) (?P<target>[\w, ]+), because the model contains "
        r"HW-specific datatypes: (?P<dtype>\w+)",
        "{target} cannot compute in {dtype} (fp8 takes --compute-capability 8.9 or later, fp4 "
        "12.0)",
    ),
    (
        r"FP32 GEMM is not supported",
        "compute capability 7.5 has no fp32 matrix products in TensorRT-RTX; build an fp16 graph, "
        "or for a later GPU",
    ),
    (
        r"Non-zero zero point is not supported",
        "the graph is quantised with zero points other than 0, which TensorRT does not support; "
        "quantise symmetrically, as msn-export calibrate does",
    ),
    (
        r"no optimization profile has been defined",
        "the graph has a dynamic input that no profile covers; give a --batch",
    ),
    (
        r"static dimensions that don't match (?P<which>kM\w+|kOPT) dimensions",
        "a --batch lies outside the graph's fixed shape; export the graph with a dynamic batch",
    ),
    (
        r"Version tag does not match|serialized engine.*different version",
        "the engine was built by another version of TensorRT; build it again here",
    ),
    (
        r"Plugin not found|No importer (?:is )?registered for op|Unsupported ONNX opera",
        "TensorRT has no importer for this operator; if onnxruntime optimised the graph "
        "(com.microsoft operators), export it again without that",
    ),
    (
        r".*Failed to import initializer: (?P<name>[^\n]+)$",  # .*: it says so twice
        "the weight {name!r} cannot be read; is the graph's external data file beside it?",
    ),
    (
        r"ParseFromCodedStream|Failed to parse the ONNX model",
        "it is not an ONNX file, or a truncated one; export it again",
    ),
    (
        r"Network must have at least one output",
        "it holds no graph with an output; export it again",
    ),
    (
        r"must have same input types\. But they are of types (?P<a>\w+) and (?P<b>\w+)",
        "it mixes {a} and {b} operands without a Cast; type the graph as a whole, as "
        "msn-export onnx --dtype does",
    ),
    (
        r"within workspace limit|[Ii]nsufficient workspace",
        "no kernel fits into --workspace; raise it or leave it out",
    ),
    (
        r"Unable to load library: (?P<library>\S+?):",
        "a library that this build needs is missing: {library}",
    ),
    (
        r"(?i)out of memory|bad_alloc|OutOfMemory",
        "there is not enough memory; lower --batch or --workspace, or build on a larger machine",
    ),
    (
        r"Unsupported SM|SM \d+ is not supported|does not support (?:this|the) (?:GPU|device)",
        "this TensorRT does not support the GPU it was to compile for",
    ),
    (
        r"cudaError 35|CUDA driver version is insufficient|no CUDA-capable device",
        "it needs an NVIDIA driver, and there is none here; TensorRT-RTX compiles without one "
        "(--backend tensorrt-rtx)",
    ),
)


# What TensorRT-RTX logs beside any other error where there is no GPU
_NO_DRIVER = re.compile(r"cudaError 35|CUDA driver version is insufficient")
_PLACE = re.compile(r"\s*\(?In \w+ at \S+:\d+\)?|^\[\S+\]\s*")  # in TensorRT's own sources
_LONGEST = 300  # characters


def explain(raw: str) -> str | None:
    """Translate an error into a sentence for the user; None where its meaning is not known."""
    for pattern, meaning in _MEANINGS:
        match = re.search(pattern, raw)
        if match:
            return meaning.format(**match.groupdict())
    return None


def explain_or_quote(raw: Sequence[str]) -> str:
    """Give TensorRT's own reason, and before it what it means where that is known.

    The reason is the first line that is not about a missing driver, unless nothing else is said.
    """
    lines = [" ".join(line.split()) for text in raw for line in text.splitlines() if line.strip()]
    if not lines:
        return "TensorRT gave no reason; --log FILE keeps all it said"
    told = [line for line in lines if not _NO_DRIVER.search(line)] or lines
    meaning = explain("\n".join(told))
    known = [line for line in told if explain(line)] if meaning else []
    reason = _PLACE.sub("", (known or _reasons(told))[0])[:_LONGEST].rstrip(" .")
    quoted = f"TensorRT says: {reason}"
    return quoted if meaning is None else f"{meaning} ({quoted})"


def _reasons(lines: Sequence[str]) -> Sequence[str]:
    """Prefer the lines with an error code: others say where in the graph, which is told anyway."""
    return [line for line in lines if "Error Code" in line] or lines
