"""The steps of ``msn-export onnx``: checkpoint, trace, graph steps, check, file."""

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir

from msn_export import __version__, golden
from msn_export.baseline import add_baseline, open_rounded
from msn_export.commands.jobs import OnnxJob
from msn_export.compare.sides import (
    heads_of,
    preprocessing_of,
    require_one_size,
    sized,
    with_classifier,
    with_config,
)
from msn_export.files import apart, publish, staging
from msn_export.graph import io
from msn_export.graph.batch import find_mixing
from msn_export.graph.cls_only import narrow_to_first_token
from msn_export.graph.fuse import fuse_attention
from msn_export.graph.opset import lower_opset
from msn_export.graph.simplify import simplify
from msn_export.graph.summary import GraphSummary
from msn_export.graph.torch_reference import InThread, TorchRunner, shaken, trace
from msn_export.host import peak_rss
from msn_export.manifest import (
    AttentionRecord,
    CheckpointRecord,
    CheckRecord,
    GoldenRecord,
    Manifest,
    seal,
    sha256_of,
    versions_of,
)
from msn_export.metrics.evaluate import (
    Evaluation,
    OutputsOf,
    Reference,
    Sample,
    add_rounding,
    batch_sizes,
    draw,
    draw_files,
    evaluate,
    max_batch_in_memory,
    measure_rounding,
    require_different,
    run_reference,
    sizes_without_largest,
)
from msn_export.metrics.tolerances import BYTES_ROUNDING, GATES, ROUNDED_MARGIN
from msn_export.mixed_precision import Fp32Islands, convert, cpu_runner
from msn_export.models.checkpoint import Checkpoint, load_checkpoint
from msn_export.onnx_header import GraphMetadata
from msn_export.preprocessing import Preprocessing
from msn_export.progress import SILENT, Progress
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.spec import Dtype, Head, InputFormat, Scores, Target
from msn_export.version_table import Client, Row, least_versions, row_of

__all__ = ["OnnxJob", "run_onnx"]  # the two that docs/python.md speaks of

# TensorRT-RTX 1.7.1 has its kernel for one query only where heads times smallest batch is 4 or
# more: with as many heads any batch will do
SINGLE_QUERY_HEADS = 4
# Pictures that the reference computes in fp64 too; all, where the graph does not agree by these.
EXACT = 2
# More fp32 runs that say what rounding costs, where the graph does not agree at first. Measured on
# 30 tiny models of 3 logits with one massive channel: a graph errs up to 5.6 times the rounding of
# the reference alone, and up to 2.8 times the largest of four runs.
SHAKEN = 3
PACKAGES = ("torch", "onnx", "onnx-ir", "onnxsim", "onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True, slots=True)
class Traced:
    """The fp32 graph, its attention fused, and what came of simplifying it."""

    model: ir.Model
    fused: int
    simplified: str


@dataclass(frozen=True, slots=True)
class Built:
    """A written, not yet published graph with what is known of it.

    ``mixing`` names what may join images of a batch, as ``find_mixing`` does.
    """

    path: Path
    sha256: str
    summary: GraphSummary
    fused: int
    simplified: str
    islands: Fp32Islands
    mixing: str


Run = InThread[tuple[Reference, GoldenRecord]]


def run_onnx(job: OnnxJob, progress: Progress = SILENT) -> tuple[Path, Manifest]:
    """Export a checkpoint to a checked ONNX file with its manifest.

    Returns:
        The file's path and its manifest.

    Raises:
        MsnExportError: whatever kept the export from its gate; the output path is as it was.
    """
    started = time.monotonic()
    output = job.validate_paths()
    with progress.step("load checkpoint"):
        checkpoint = load_checkpoint(job.checkpoint, job.choices)
        if job.preprocess == "auto" and job.image_size is None:
            require_one_size(checkpoint)
        checkpoint = read_as(sized(checkpoint, job.image_size), job)
    default = Head.LOGITS if checkpoint.config.labels else Head.CLS
    heads = tuple(dict.fromkeys(job.heads)) or (default,)
    config = checkpoint.config
    max_batch = max_batch_in_memory(config.sequence, config.dim, config.mlp_dim, config.heads)
    if job.check:
        batch_sizes(
            job.batch, max_batch
        )  # refuses before the work what could not be checked after it
    with progress.step("read images"):
        preprocessing = preprocessing_of(checkpoint, job.preprocess, job.exif)
        sample = _sample(job, preprocessing, max_batch)
        if job.check:
            require_different(sample)
    with staging(output.parent) as stage, ExitStack() as running:
        with progress.step("trace"):
            model = _trace(job, checkpoint, heads, sample)
        run: Run | None = None
        if job.check:
            work = partial(_run_reference, job, checkpoint, heads, sample)
            run = running.enter_context(InThread(checkpoint.model, work))
        traced = _improve(job, checkpoint, heads, model, progress)
        limits = None
        if run is not None and job.dtype is not Dtype.FP32:
            limits = _check_fp32(job, traced.model, run, heads, stage, progress)
        built = _write(job, checkpoint, traced, sample, stage / output.name, progress)
        del traced, model
        check = recorded = None
        if run is not None:
            with progress.step("run the PyTorch reference"):
                reference, recorded = run.result()
            # The weights are in the file: while it is checked onnxruntime alone holds them. The
            # graph is full of cycles, so it does not go by itself.
            checkpoint.model.to("meta")
            gc.collect()
            check, recorded = _check(job, built, limits or reference, recorded, heads, progress)
        manifest = replace(
            _describe(job, checkpoint, sample, built, check),
            golden=recorded,
            seconds=round(time.monotonic() - started, 3),
            peak_rss_bytes=peak_rss(),
        )
        publish(built.path, output, seal(manifest), force=job.force)
    return output, manifest


def _sample(job: OnnxJob, preprocessing: Preprocessing, max_batch: int) -> Sample:
    if job.pictures and job.images is not None:
        return draw_files(job.pictures, job.images, preprocessing, max_batch=max_batch)
    return draw(job.images, preprocessing, max_batch=max_batch)


def read_as(checkpoint: Checkpoint, job: OnnxJob) -> Checkpoint:
    """Give a checkpoint with the job's classifier, patches that are computed, and blocks read."""
    if job.classifier is not None:
        checkpoint = with_classifier(checkpoint, job.classifier)
    config = checkpoint.config
    kept = job.keep_patches.of(config.grid) if job.keep_patches is not None else ()
    config = replace(config, kept=kept, blocks=job.blocks, normalize=job.normalize)
    read = with_config(checkpoint, config)
    if not kept:
        return read
    share = f"{len(kept)} of {config.tokens - 1} patches are computed ({job.keep_patches})"
    return replace(read, notes=(*read.notes, f"{share}; evaluate what that costs on your images"))


def _cores(checkpoint: Checkpoint, heads: Sequence[Head]) -> int:
    """Count the attention cores that heads need; a map alone ends at the last one's scores."""
    return checkpoint.config.depth - (set(heads) == {Head.ATTENTION})


def _run_reference(
    job: OnnxJob, checkpoint: Checkpoint, heads: tuple[Head, ...], sample: Sample
) -> tuple[Reference, GoldenRecord]:
    model, preprocessing = checkpoint.model, sample.preprocessing
    with closing(TorchRunner(model, heads)) as runner:
        reference = run_reference(runner, sample).require_finite()
        # the reference takes floats whatever the graph takes
        recorded = golden.record(
            runner, runner.name, preprocessing, InputFormat.FLOAT, sample.max_batch
        )
    with closing(TorchRunner(model, heads, exact=True)) as exact:
        reference = measure_rounding(reference, exact, EXACT)
    if job.input_format is InputFormat.UINT8:
        reference = replace(reference, rounding_margin=BYTES_ROUNDING)
    return reference, recorded


def _trace(
    job: OnnxJob, checkpoint: Checkpoint, heads: tuple[Head, ...], sample: Sample
) -> ir.Model:
    return trace(
        checkpoint.model,
        heads=heads,
        input_format=job.input_format,
        batch=job.batch,
        preprocessing=sample.preprocessing,
    )


def _improve(
    job: OnnxJob,
    checkpoint: Checkpoint,
    heads: tuple[Head, ...],
    model: ir.Model,
    progress: Progress,
) -> Traced:
    """Simplify the graph and fuse its attention."""
    simplified = "not asked for"
    if job.simplify:
        with progress.step("simplify"):
            model, simplified = simplify(model)
    if checkpoint.config.heads >= SINGLE_QUERY_HEADS:
        with progress.step("compute only what the outputs need"):
            narrow_to_first_token(model, split_projection=job.target.splits_queries)
    with progress.step("fuse attention"):
        fused = fuse_attention(model, job.target.attention, expected=_cores(checkpoint, heads))
        if job.target.opset < 23:
            lower_opset(model, job.target.opset)
    return Traced(model, fused, simplified)


def _write(
    job: OnnxJob,
    checkpoint: Checkpoint,
    traced: Traced,
    sample: Sample,
    path: Path,
    progress: Progress,
) -> Built:
    model, islands = traced.model, Fp32Islands({})
    if job.dtype is not Dtype.FP32:
        with progress.step(f"type as {job.dtype}"):
            islands = convert(model, job.dtype, job.islands, sample, job.input_format, path.parent)
    model.producer_name, model.producer_version = "msn-export", __version__
    model.metadata_props.update(_metadata(job, checkpoint, sample))
    with progress.step("write and check the file"):
        io.save(model, path)
        io.check(path)
    return Built(
        path, sha256_of(path), GraphSummary.of(model), traced.fused, traced.simplified, islands,
        find_mixing(model),
    )  # fmt: skip


def _check_fp32(
    job: OnnxJob,
    model: ir.Model,
    run: Run,
    heads: tuple[Head, ...],
    stage: Path,
    progress: Progress,
) -> Reference:
    """Hold the fp32 graph to its own limit before it is typed, and measure what typing may cost."""
    path = apart(stage) / "fp32.onnx"
    io.save(model, path)
    with progress.step("run the PyTorch reference"):
        reference, _ = run.result()
    fixed = job.batch.max if job.batch.is_static else None
    with progress.step("check the fp32 graph"):
        with OrtRunner(path) as runner:
            size = fixed or min(8, reference.sample.max_batch, len(reference.sample))
            found = _evaluate_fp32(job, runner, reference, heads, (size,))
            found.require(f"the fp32 graph, before it was typed {job.dtype}")
        path.unlink()
        rough = replace(reference, exact={}, rounding={})  # errors to come are far above fp32's
        with open_rounded(model, job.dtype, reference.sample, job.input_format, stage) as rounded:
            return add_baseline(
                rough, rounded, job.input_format, margin=ROUNDED_MARGIN, fixed=fixed
            )


def _metadata(job: OnnxJob, checkpoint: Checkpoint, sample: Sample) -> dict[str, str]:
    own = GraphMetadata(
        sample.preprocessing, checkpoint.config.labels, _scores(checkpoint), job.target, job.dtype
    )
    origin = {"checkpoint": checkpoint.source, "checkpoint_sha256": checkpoint.sha256}
    return {**origin, **own.props()}


def _evaluate_fp32(
    job: OnnxJob,
    runner: OutputsOf,
    reference: Reference,
    heads: tuple[Head, ...],
    sizes: tuple[int, ...],
) -> Evaluation:
    """Compare an fp32 graph; where it does not agree, measure the rounding more thoroughly.

    Where attention is sharp a few pictures do not tell how far fp32 is from what is right, and few
    numbers may be rounded well by chance: fp64 says on every picture which side errs, and the
    reference runs again with other roundings.
    """
    gate = GATES[Dtype.FP32]
    found = evaluate(runner, reference, job.input_format, sizes, gate)
    if not found.failures:
        return found
    model = read_as(sized(load_checkpoint(job.checkpoint, job.choices), job.image_size), job).model
    if len(reference.sample) > EXACT:
        with closing(TorchRunner(model, heads, exact=True)) as exact:
            reference = measure_rounding(reference, exact, len(reference.sample))
        del exact  # a copy of all weights in fp64
    for seed in range(SHAKEN):
        with closing(TorchRunner(shaken(model, seed), heads)) as again:
            reference = add_rounding(reference, again)
    return evaluate(runner, reference, job.input_format, sizes, gate)


def _check(
    job: OnnxJob,
    built: Built,
    reference: Reference,
    recorded: GoldenRecord,
    heads: tuple[Head, ...],
    progress: Progress,
) -> tuple[CheckRecord, GoldenRecord]:
    with (
        progress.step("compare with the reference"),
        cpu_runner(built.path, job.dtype, built.path.parent) as runner,
    ):
        sizes = batch_sizes(job.batch, reference.sample.max_batch)
        if not built.mixing:
            sizes = sizes_without_largest(sizes, len(reference.sample))
        if job.dtype is Dtype.FP32:
            found = _evaluate_fp32(job, runner, reference, heads, sizes)
        else:
            found = evaluate(runner, reference, job.input_format, sizes, GATES[job.dtype])
        record = found.require(f"the {job.dtype} graph")
        least = record.limits[recorded.output]["image"] or 0.0
        preprocessing = reference.sample.preprocessing
        recorded = golden.with_limit(recorded, runner, preprocessing, job.input_format, least)
    return replace(record, images_apart=not built.mixing), recorded


def _scores(checkpoint: Checkpoint) -> Scores | None:
    config = checkpoint.config
    return Scores.of(config.problem_type, len(config.labels)) if config.labels else None


def _unbuildable(job: OnnxJob, row: Row) -> Iterator[str]:
    """Warn of a graph for TensorRT that its own parser and builder do not build as they are."""
    if job.target is Target.TENSORRT and row[Client.TENSORRT_RTX].least is None:
        yield (
            f"TensorRT's parser and builder alone do not build this {job.dtype} graph: its "
            "Attention has no fused kernel in that type. msn-export trt builds it; for other "
            "builders take --target portable, or --dtype fp16"
        )


def _describe(
    job: OnnxJob,
    checkpoint: Checkpoint,
    sample: Sample,
    built: Built,
    check: CheckRecord | None,
) -> Manifest:
    form = job.target.attention
    heads = heads_of(tuple(one.name for one in built.summary.outputs))
    graph, row = built.summary, row_of(job.target, job.dtype)
    assert row is not None  # the table has a row for everything that a job may ask for
    return Manifest(
        kind="onnx",
        output=built.path.name,
        sha256=built.sha256,
        bytes=built.path.stat().st_size,
        dtype=job.dtype,
        inputs=graph.inputs,
        outputs=graph.outputs,
        profiles=(job.batch,),
        preprocessing=sample.preprocessing,
        nodes=graph.nodes,
        ops=graph.ops,
        attention=AttentionRecord(_cores(checkpoint, heads), built.fused, form.value),
        check=check,
        opset=graph.opset,
        target=job.target,
        labels=checkpoint.config.labels,
        scores=_scores(checkpoint),
        checkpoint=CheckpointRecord(
            checkpoint.source, checkpoint.sha256, checkpoint.notes, job.variant, job.weights
        ),
        config=checkpoint.config.to_json(),
        islands=dict(built.islands.maxima),
        least_versions=least_versions(row),
        simplified=built.simplified,
        notes=(*sample.notes, *_unbuildable(job, row)),
        command=job.command,
        versions=versions_of(*PACKAGES),
    )
