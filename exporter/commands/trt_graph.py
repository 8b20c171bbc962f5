"""The graph that is compiled: an ONNX file typed and written as a compiler reads and fuses it.

Fused attention of TensorRT-RTX keeps scores and sums in fp16, which no run of an fp16 graph on the
CPU shows: the kernel is emulated (``graph/emulate.py``). bf16 has fp32's range and its
kernels sum in fp32, but each number that is multiplied has 8 bits: it is for what overflows.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from msn_export.artifact import GraphFile
from msn_export.commands.jobs import TrtJob
from msn_export.engine.build import BuildResult
from msn_export.engine.census import AskedNode, Census
from msn_export.engine.options import Backend
from msn_export.errors import FusionError, GraphError, ToleranceError
from msn_export.files import apart
from msn_export.graph import io
from msn_export.graph.batch import find_mixing
from msn_export.graph.blocks import find_stream, stages_of
from msn_export.graph.builder import mark_outputs
from msn_export.graph.emulate import Emulated, emulate_attention, peaks_of
from msn_export.graph.fuse import fuse_attention
from msn_export.graph.opset import lower_opset, raise_opset
from msn_export.graph.precision import (
    LARGEST,
    MOVES,
    PRODUCTS,
    attention_in_bf16,
    fp32_nodes,
    fp32_products,
    quantised_products,
    type_beside,
)
from msn_export.graph.summary import operators, tensor_specs
from msn_export.manifest import Manifest, SumsRecord
from msn_export.metrics.evaluate import Reference, Sample, evaluate
from msn_export.metrics.tolerances import HEADROOM, Gate
from msn_export.mixed_precision import Fp32Islands, convert
from msn_export.progress import Progress
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.runtime.runner import Outputs
from msn_export.spec import AttentionForm, ComputeCapability, Dtype, InputFormat, TensorSpec


@dataclass(frozen=True, slots=True)
class Compilable:
    """The graph that is compiled: typed, its attention in the form the compiler fuses.

    ``asked`` says of each node what the compiler must keep to, ``accepted`` names the products in
    fp32 that nothing declares and that the user accepted. ``attention`` are the nodes of Attention
    operators with the dtype each computes in. ``mixing`` names what may join images of a batch, as
    ``find_mixing`` does.
    """

    path: Path
    dtype: Dtype
    cores: int
    form: AttentionForm
    opset: int
    nodes: int
    ops: dict[str, int]
    outputs: tuple[TensorSpec, ...]
    islands: Fp32Islands
    quantised: tuple[str, ...]
    asked: dict[str, AskedNode]
    accepted: tuple[str, ...] = ()
    attention: dict[str, Dtype] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    mixing: str = "not looked for"


def prepare(
    job: TrtJob,
    source: GraphFile,
    backend: Backend,
    sample: Sample,
    stage: Path,
    progress: Progress,
) -> Compilable:
    """Type the graph and write it in the form and opset that the compiler fuses."""
    dtype, rest = _types(job, source)
    if dtype.is_quantised and backend.row.opset < 19:
        raise GraphError(
            f"{source.path} is quantised with {source.dtype} weights and half-precision scales, "
            f"which {backend} cannot read; it takes TensorRT 10 or later"
        )
    accepted = _undeclared(source) if rest is None else ()
    if accepted and not job.allow_fp32:
        named = ", ".join(accepted[:3]) + (", …" if len(accepted) > 3 else "")
        raise GraphError(
            f"{source.path} is typed {source.dtype}, and {len(accepted)} of its products compute "
            f"in fp32 though no island in its manifest says so: {named}; export the fp32 graph and "
            "let --fp16 type it, or accept them with --allow-fp32"
        )
    notes: list[str] = []
    with progress.step(f"type as {rest or dtype}"):
        model, form, cores = written_for(
            backend, source, rest or dtype, partial=job.allow_unfused, notes=notes
        )
        if rest is None:
            islands = _islands_of(source, model)
        else:
            islands = convert(model, rest, job.islands, sample, source.input_format, stage)
            if dtype.is_quantised:
                notes.append(f"what {source.path.name} computes in fp32 beside {dtype} is {rest}")
    if job.stages:
        model = mark_outputs(model, stages_of(find_stream(model)))
    path = apart(stage) / source.path.name
    with progress.step("write and check the typed graph"):
        io.save(model, path)
        io.check(path)
    ops = operators(model)
    opset, nodes = model.graph.opset_imports[""], len(model.graph)
    outputs = tensor_specs(list(model.graph.outputs))
    quantised = quantised_products(model)
    return Compilable(
        path, dtype, cores, form, opset, nodes, ops, outputs, islands, quantised,
        asked_of(model), accepted, _attention(model), tuple(notes), find_mixing(model),
    )  # fmt: skip


def _types(job: TrtJob, source: GraphFile) -> tuple[Dtype, Dtype | None]:
    """Give the engine's type, and the type that its floats have yet to get; None: they have it.

    No TensorRT fuses attention in fp32, so what is fp32 beside 8 bits becomes fp16 unless another
    type is asked for.
    """
    held, asked = source.dtype, job.precision or source.dtype
    if asked is held and not held.is_quantised:
        return held, None
    if asked.is_quantised and asked is not held:
        raise GraphError(
            f"{source.path} is typed {held}; msn-export calibrate --{asked} quantises it"
        )
    beside = type_beside(source.graph) if held.is_quantised else held
    if asked.is_quantised:
        asked = Dtype.FP16 if beside is Dtype.FP32 else beside
    if beside is not Dtype.FP32 and asked is not beside:
        both = f"{held} beside {beside}" if held.is_quantised else f"{held}"
        raise GraphError(f"{source.path} is typed {both}; --{asked} needs the fp32 graph")
    return held if held.is_quantised else asked, None if asked is beside else asked


def _undeclared(source: GraphFile) -> tuple[str, ...]:
    """Name the products in fp32 of a graph that came typed which its manifest does not declare."""
    if source.dtype is Dtype.FP32:
        return ()
    declared = source.manifest.islands if source.manifest is not None else {}
    return fp32_products(source.graph, declared)


def _attention(model: ir.Model) -> dict[str, Dtype]:
    dtypes = {ir.DataType.FLOAT16: Dtype.FP16, ir.DataType.BFLOAT16: Dtype.BF16}
    return {
        node.name or "": dtypes.get(node.outputs[0].dtype or ir.DataType.FLOAT, Dtype.FP32)
        for node in model.graph
        if node.op_type == "Attention"
    }


def asked_of(model: ir.Model) -> dict[str, AskedNode]:
    """List what each node of a graph asks of the compiler; islands are those in fp32."""
    wide = set(fp32_nodes(model))
    asked = {}
    for node in model.graph:
        if node.name:
            constants = [value.const_value for value in node.inputs if value is not None]
            asked[node.name] = AskedNode(
                fp32=node.name in wide,
                moves=node.op_type in MOVES,
                product=node.op_type in PRODUCTS,
                constants=tuple(
                    tuple(tensor.numpy().shape) for tensor in constants if tensor is not None
                ),
            )
    return asked


def _islands_of(source: GraphFile, model: ir.Model) -> Fp32Islands:
    """List what stays fp32 in a graph that came typed."""
    declared = source.manifest.islands if source.manifest is not None else {}
    maxima = {name: math.inf if peak is None else peak for name, peak in declared.items()}
    return Fp32Islands(maxima, fp32_nodes(model) if source.dtype is not Dtype.FP32 else ())


def written_for(
    backend: Backend,
    source: GraphFile,
    dtype: Dtype,
    *,
    partial: bool = False,
    notes: list[str] | None = None,
) -> tuple[ir.Model, AttentionForm, int]:
    """Write the graph as this backend reads and fuses it; how many attention cores it has.

    With ``partial``, attention that is not recognised stays as it is, which ``notes`` receives.
    """
    row = backend.row
    # an fp32 Attention operator has no kernel: "not supported by a dedicated kernel"
    plain = dtype is Dtype.FP32 or not row.has_attention
    form = AttentionForm.PLAIN if plain else AttentionForm.HEADS
    model = source.graph if plain else raise_opset(source.graph)
    try:
        cores = fuse_attention(
            model, form, expected=_expected(source), partial=partial, notes=notes
        )
    except FusionError as error:
        raise FusionError(
            f"{source.path}: {error}; --allow-unfused compiles them unfused"
        ) from error
    if model.graph.opset_imports[""] > row.opset:
        lower_opset(model, row.opset)
    return model, form, cores


def _expected(source: GraphFile) -> int | None:
    return source.manifest.attention.expected if source.manifest is not None else None


_FIRST_BF16 = ComputeCapability(8, 0)
# Scores computed in a check: 16 images of vit-msn-small are 45 million, one of vit-msn-base-4 is
# 1.4 billion. There is always one image.
_WORK = 1 << 29
_LIMIT = LARGEST[Dtype.FP16] / HEADROOM


@dataclass(frozen=True, slots=True)
class AttentionVerdict:
    """Result of emulating an engine's attention: ``failures``, and the nodes that overflow."""

    record: SumsRecord
    failures: tuple[str, ...] = ()
    over: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionGate:
    """Limits for an engine's attention.

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
        progress: shows the emulation.
    """
    while True:
        written = in_bf16(graph, bf16)
        result = build(written)
        fp16 = sums_in_fp16(result.censuses, written)
        with progress.step("emulate the engine's attention"):
            verdict = check_sums(graph, fp16, bf16, against)
        more = more_bf16(verdict, capabilities)
        if not more:
            return result, verdict.record
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
        opened = OrtRunner(path)
    with opened:
        runner = _Watched(opened, emulated, len(bf16))
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
    """Give the images to emulate on: the cost grows with the square of the tokens."""
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
    verdict: AttentionVerdict, capabilities: Sequence[ComputeCapability]
) -> tuple[str, ...]:
    """Name the nodes to type bf16 beside those that are; nothing where the engine does."""
    if not verdict.over and not verdict.failures:
        return ()
    why = "; ".join((*_overflows(verdict), *verdict.failures))
    wanted = verdict.over or verdict.record.fp16
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


def _overflows(verdict: AttentionVerdict) -> list[str]:
    notes = []
    for name in verdict.over[:3]:
        score, total = verdict.record.scores[name] or 0.0, verdict.record.sums[name] or 0.0
        what, peak = ("a score", score) if not score <= _LIMIT else ("a sum of values", total)
        notes.append(f"{what} of {name} reaches {peak:.6g}, and fp16 ends at 65504 ({HEADROOM:g} "
                    "times less is allowed)")  # fmt: skip
    return notes


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
