"""The graph that is compiled: an ONNX file typed and written as a compiler reads and fuses it."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from msn_export.artifact import GraphFile
from msn_export.commands.jobs import TrtJob
from msn_export.engine.census import AskedNode
from msn_export.engine.versions import Backend
from msn_export.errors import FusionError, GraphError
from msn_export.files import apart
from msn_export.graph import io
from msn_export.graph.blocks import stages_of
from msn_export.graph.builder import mark_outputs
from msn_export.graph.fuse import fuse_attention
from msn_export.graph.opset import lower_opset, raise_opset
from msn_export.graph.precision import MOVES, PRODUCTS, fp32_nodes, fp32_products
from msn_export.graph.quantised import quantised_products, type_beside
from msn_export.graph.summary import operators, tensor_specs
from msn_export.metrics.samples import Sample
from msn_export.mixed_precision import Fp32Islands, convert
from msn_export.progress import Progress
from msn_export.spec import AttentionForm, Dtype, TensorSpec


@dataclass(frozen=True, slots=True)
class Compilable:
    """The graph that is compiled: typed, its attention in the form the compiler fuses.

    ``asked`` says of each node what the compiler must keep to, ``accepted`` names the products in
    fp32 that nothing declares and that the user accepted. ``attention`` are the nodes of Attention
    operators with the dtype each computes in.
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


def prepare(
    job: TrtJob,
    source: GraphFile,
    backend: Backend,
    sample: Sample,
    stage: Path,
    progress: Progress,
) -> Compilable:
    """Type the graph and write it in the form and opset that the compiler fuses.

    Raises:
        GraphError: the graph cannot be had in the precision asked for, or not by this backend.
    """
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
    told: list[str] = []
    with progress.step(f"type as {rest or dtype}"):
        model, form, cores = written_for(
            backend, source, rest or dtype, partial=job.allow_unfused, told=told
        )
        if rest is None:
            islands = _islands_of(source, model)
        else:
            islands = convert(model, rest, job.islands, sample, source.input_format, stage)
            if dtype.is_quantised:
                told.append(f"what {source.path.name} computes in fp32 beside {dtype} is {rest}")
    if job.stages:
        model = mark_outputs(model, stages_of(model))
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
        asked_of(model), accepted, _attention(model), tuple(told),
    )  # fmt: skip


def _types(job: TrtJob, source: GraphFile) -> tuple[Dtype, Dtype | None]:
    """Say what the engine is typed, and what its floats have to be typed as; None: they are.

    No TensorRT fuses attention in fp32, so what is fp32 beside 8 bits becomes fp16 unless another
    type is asked for.

    Raises:
        GraphError: the graph is typed already, and otherwise.
    """
    held, asked = source.dtype, job.precision or source.dtype
    if asked is held and not held.is_quantised:
        return held, None
    if asked.is_quantised and asked is not held:
        raise GraphError(
            f"{source.path} is typed {held}; msn-export calibrate --{asked} quantises it"
        )
    beside = type_beside(source.model) if held.is_quantised else held
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
    return fp32_products(source.model, declared)


def _attention(model: ir.Model) -> dict[str, Dtype]:
    dtypes = {ir.DataType.FLOAT16: Dtype.FP16, ir.DataType.BFLOAT16: Dtype.BF16}
    return {
        node.name or "": dtypes.get(node.outputs[0].dtype or ir.DataType.FLOAT, Dtype.FP32)
        for node in model.graph
        if node.op_type == "Attention"
    }


def asked_of(model: ir.Model) -> dict[str, AskedNode]:
    """Say what each node of a graph asks of the compiler; islands are those in fp32."""
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
    """Say what stays fp32 in a graph that came typed."""
    known = source.manifest.islands if source.manifest is not None else {}
    maxima = {name: math.inf if peak is None else peak for name, peak in known.items()}
    return Fp32Islands(maxima, fp32_nodes(model) if source.dtype is not Dtype.FP32 else ())


def written_for(
    backend: Backend,
    source: GraphFile,
    dtype: Dtype,
    *,
    partial: bool = False,
    told: list[str] | None = None,
) -> tuple[ir.Model, AttentionForm, int]:
    """Write the graph as this backend reads and fuses it; how many attention cores it has.

    With ``partial``, attention that is not recognised stays as it is, which ``told`` receives.

    Raises:
        FusionError: without it, attention is not recognised.
    """
    row = backend.row
    # an fp32 Attention operator has no kernel: "not supported by a dedicated kernel"
    plain = dtype is Dtype.FP32 or not row.has_attention
    form = AttentionForm.PLAIN if plain else AttentionForm.HEADS
    model = source.model if plain else raise_opset(source.model)
    try:
        cores = fuse_attention(model, form, expected=_expected(source), partial=partial, told=told)
    except FusionError as error:
        raise FusionError(
            f"{source.path}: {error}; --allow-unfused compiles them unfused"
        ) from error
    if model.graph.opset_imports[""] > row.opset:
        lower_opset(model, row.opset)
    return model, form, cores


def _expected(source: GraphFile) -> int | None:
    return source.manifest.attention.expected if source.manifest is not None else None
