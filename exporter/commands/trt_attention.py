"""Judge attention as the engine computes it, and type it bf16 where fp16 does not hold it.

Fused attention of TensorRT-RTX keeps scores and sums in fp16, which no run of an fp16 graph on the
CPU shows: the kernel is emulated (``graph/flash_attention.py``). bf16 has fp32's range and its
kernels sum in fp32, but each number that is multiplied has 8 bits: it is for what overflows.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msn_export.commands.trt_graph import Compilable
from msn_export.engine.build import BuildResult
from msn_export.engine.census import AskedNode, Census
from msn_export.errors import ToleranceError
from msn_export.files import apart
from msn_export.graph import io
from msn_export.graph.flash_attention import Emulated, emulate_attention, peaks_of
from msn_export.graph.precision import LARGEST, attention_in_bf16
from msn_export.manifest import Manifest, SumsRecord
from msn_export.metrics.evaluate import Reference, evaluate
from msn_export.metrics.tolerances import HEADROOM, Gate
from msn_export.progress import Progress
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.runtime.runner import Outputs
from msn_export.spec import ComputeCapability, Dtype, InputFormat

_FIRST_BF16 = ComputeCapability(8, 0)
# Scores computed in a check: 16 images of vit-msn-small are 45 million, one of vit-msn-base-4 is
# 1.4 billion. There is always one image.
_WORK = 1 << 29
_LIMIT = LARGEST[Dtype.FP16] / HEADROOM


@dataclass(frozen=True, slots=True)
class AttentionVerdict:
    """What came of emulating an engine's attention: why it does not do, and where it overflows."""

    record: SumsRecord
    failures: tuple[str, ...] = ()
    over: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionGate:
    """What an engine's attention is judged by.

    ``reference`` is what the typed graph was compared with, None where no check was asked for;
    ``gate`` what that was held to; ``input_format`` what the graph takes; ``fixed`` its one batch
    size.
    """

    reference: Reference | None
    gate: Gate
    input_format: InputFormat
    fixed: int | None


def settle(
    graph: Compilable,
    bf16: tuple[str, ...],
    build: Callable[[Compilable], BuildResult],
    against: AttentionGate,
    capabilities: Sequence[ComputeCapability],
    progress: Progress,
) -> tuple[BuildResult, SumsRecord]:
    """Compile, judge attention as the engine computes it, and compile again with more in bf16.

    Args:
        graph: the graph as it was typed.
        bf16: attention nodes that are bf16 from the start.
        build: compiles a graph and requires of it what the graph asks.
        against: what attention is judged by.
        capabilities: the targets; none where that is every GPU from Ampere on.
        progress: is told of the emulation.

    Raises:
        ToleranceError: attention does not do, in fp16 nor in bf16.
    """
    while True:
        written = in_bf16(graph, bf16)
        result = build(written)
        fp16 = sums_in_fp16(result.censuses, written)
        with progress.step("emulate the engine's attention"):
            judged = check_sums(graph, fp16, bf16, against)
        more = more_bf16(judged, capabilities)
        if not more:
            return result, judged.record
        bf16 = tuple(name for name in graph.attention if name in {*bf16, *more})


def sums_in_fp16(censuses: Sequence[Census], graph: Compilable) -> tuple[str, ...]:
    """Name the graph's attention nodes that a kernel of any profile sums in fp16."""
    kernels = [kernel for census in censuses for kernel in census.fused_attention]
    narrow = {
        layer for kernel in kernels if kernel.accumulator == "fp16" for layer in kernel.layers
    }
    return tuple(name for name in graph.attention if name in narrow)


def in_bf16(graph: Compilable, nodes: Collection[str]) -> Compilable:
    """Write the graph once more with attention of some nodes in bf16, for the compiler alone."""
    if not nodes:
        return graph
    model = io.load(graph.path)
    io.infer_shapes(model)
    attention_in_bf16(model, nodes)
    path = apart(graph.path.parent) / graph.path.name
    io.save(model, path)
    io.check(path)
    asked = {
        name: replace(node, fp32=False, bf16=True) if name in nodes else node
        for name, node in graph.asked.items()
    }
    asked |= {node.name: AskedNode(fp32=False, moves=True) for node in model.graph
              if node.name and node.name not in asked}  # fmt: skip
    return replace(graph, path=path, asked=asked)


def check_sums(
    graph: Compilable, fp16: tuple[str, ...], bf16: tuple[str, ...], against: AttentionGate
) -> AttentionVerdict:
    """Run the typed graph with its attention computed as the engine does, and compare.

    Args:
        graph: as it was typed, its attention not in bf16 yet.
        fp16: nodes whose kernel sums in fp16.
        bf16: nodes that are bf16 in the engine.
        against: what to compare with, and by what.
    """
    record = SumsRecord(fp16, bf16)
    reference = against.reference
    if reference is None or not (fp16 or bf16):
        return AttentionVerdict(record)
    emulated = emulate_attention(io.load(graph.path), fp16=fp16, bf16=bf16)
    few = _few(reference, _images(emulated, [*fp16, *bf16]))
    with TemporaryDirectory(dir=graph.path.parent) as own:
        path = Path(own) / "attention.onnx"
        io.save(emulated.model, path)
        runner = _Watched(OrtRunner(path), emulated, len(bf16))
    # the emulation holds each step's scores in five forms
    size = against.fixed or max(1, min(4, few.sample.max_batch // 4, len(few.sample)))
    found = evaluate(runner, few, against.input_format, [size], against.gate)
    peaks = {
        name: (float(pair[0]), float(pair[1]))
        for name, pair in zip(fp16, runner.peaks, strict=True)
    }
    over = tuple(name for name, pair in peaks.items() if not all(x <= _LIMIT for x in pair))
    record = replace(
        record,
        scores={name: score for name, (score, _) in peaks.items()},
        sums={name: total for name, (_, total) in peaks.items()},
        check=found.check,
    )
    return AttentionVerdict(record, found.failures, over)


class _Watched:
    """A runner of an emulating graph that keeps the largest scores and sums of all its runs."""

    def __init__(self, runner: OrtRunner, emulated: Emulated, bf16: int) -> None:
        self._runner, self._emulated = runner, emulated
        self.peaks: NDArray[np.float32] = np.zeros((len(emulated.nodes), 2), np.float32)
        parts = [
            f"{count} of attention {how}"
            for count, how in (
                (len(emulated.nodes), "with scores and sums in fp16"),
                (bf16, "in bf16 with sums in fp32"),
            )
            if count
        ]
        self.name = f"{runner.name} ({' and '.join(parts)}, emulated)"

    def __call__(self, images: NDArray[Any], /) -> Outputs:
        outputs = self._runner(images)
        if self._emulated.nodes:
            self.peaks = np.maximum(self.peaks, peaks_of(self._emulated, outputs))  # keeps NaN
        return outputs


def _few(reference: Reference, count: int) -> Reference:
    sample = reference.sample
    kept = replace(sample, pixels=sample.pixels[:count], names=sample.names[:count])
    outputs = {name: output[:count] for name, output in reference.outputs.items()}
    return replace(reference, outputs=outputs, sample=kept)


def _images(emulated: Emulated, nodes: Collection[str]) -> int:
    """Say how many images the emulation is worth: its cost grows with the tokens' square."""
    scores = 0
    for node in emulated.model.graph:
        if node.op_type.startswith("attention_") and node.domain:
            queries, keys = node.inputs[0], node.inputs[1]
            assert queries is not None
            assert keys is not None
            sizes = [queries.shape[1], queries.shape[2], keys.shape[2]]  # type: ignore[index]
            heads, m, n = (size if isinstance(size, int) else 1 for size in sizes)
            scores += heads * m * n
    return max(1, min(16, _WORK // max(1, scores))) if nodes else 16


def more_bf16(
    judged: AttentionVerdict, capabilities: Sequence[ComputeCapability]
) -> tuple[str, ...]:
    """Name the nodes to type bf16 beside those that are; nothing where the engine does.

    Raises:
        ToleranceError: it does not, and no bf16 mends that.
    """
    if not judged.over and not judged.failures:
        return ()
    why = "; ".join((*_overflows(judged), *judged.failures))
    wanted = judged.over or judged.record.fp16
    if not wanted:
        raise ToleranceError(
            f"the engine's attention does not agree with its reference, emulated in bf16: {why}; "
            "build with --bf16 or --fp32"
        )
    _require_bf16(capabilities, f"the engine's attention keeps scores and sums in fp16: {why}")
    return wanted


def first_bf16(
    graph: Compilable, capabilities: Sequence[ComputeCapability], asked: Collection[str]
) -> tuple[str, ...]:
    """Name the nodes that are bf16 from the start: those ``asked`` for, and islands.

    No compiler has fused attention in fp32, which is what an island among queries, keys or values
    asks for.

    Raises:
        ToleranceError: an island needs it and a target has no bf16.
    """
    if graph.dtype is Dtype.FP32:
        return ()
    wide = [name for name, dtype in graph.attention.items() if dtype is Dtype.FP32]
    if wide:
        _require_bf16(
            capabilities,
            f"attention {', '.join(wide[:3])} reads or writes values that fp16 does not hold",
        )
    return tuple(name for name in graph.attention if name in {*wide, *asked})


def _require_bf16(capabilities: Sequence[ComputeCapability], why: str) -> None:
    older = [capability for capability in capabilities if capability < _FIRST_BF16]
    if older:
        raise ToleranceError(
            f"{why}; bf16 would hold them, and needs SM {_FIRST_BF16} or later, not {min(older)}"
        )


def _overflows(judged: AttentionVerdict) -> list[str]:
    told = []
    for name in judged.over[:3]:
        score, total = judged.record.scores[name] or 0.0, judged.record.sums[name] or 0.0
        what, peak = ("a score", score) if not score <= _LIMIT else ("a sum of values", total)
        told.append(f"{what} of {name} reaches {peak:.6g}, and fp16 ends at 65504 ({HEADROOM:g} "
                    "times less is allowed)")  # fmt: skip
    return told


def with_sums(manifest: Manifest, sums: SumsRecord) -> Manifest:
    """Add to an engine's manifest what its attention computes with, and notes on that."""
    assert manifest.engine is not None  # it is an engine's
    notes = []
    if sums.fp16 and sums.check is None:
        notes.append(
            f"fused attention sums in fp16 in {len(sums.fp16)} blocks, which was not emulated: no "
            "check was asked for"
        )
    if sums.bf16:
        checked = "; it was checked in an emulation" if sums.check is not None else ""
        notes.append(
            "attention is bf16 in the engine alone, where fp16 does not hold it: "
            f"{', '.join(sums.bf16)}{checked}"
        )
    return replace(
        manifest,
        engine=replace(manifest.engine, attention=sums),
        notes=(*manifest.notes, *notes),
    )
