"""The steps of ``msn-export calibrate``: ranges, Q/DQ, the blocks that stay, verdict."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from msn_export import __version__, golden
from msn_export.artifact import GraphFile, max_batch_of
from msn_export.benchmark.results import spread_of
from msn_export.calibration import ranges as ranges_file
from msn_export.calibration.images import FEW, Split, hash_of, split
from msn_export.calibration.job import CalibrateJob, settled
from msn_export.calibration.qdq import FORMATS
from msn_export.calibration.ranges import require_finite, require_meaning
from msn_export.calibration.search import CollectedRanges, collect_ranges, exclusions, given_ranges
from msn_export.calibration.verdict import (
    Calibrated,
    Candidate,
    CostBenefit,
    measure,
    neighbours_of,
    require_target,
    summary,
)
from msn_export.embedding.accuracy import (
    LabelledModel,
    LabelledReference,
    output_to_compare,
    require_classes,
)
from msn_export.errors import GraphError, ImageError, SpecError, ToleranceError
from msn_export.feed import Feed
from msn_export.files import apart, publish, require_writable, staging
from msn_export.graph import io
from msn_export.graph.precision import quantised_products, type_graph
from msn_export.graph.summary import GraphSummary
from msn_export.host import peak_rss
from msn_export.image_folder import notes_on
from msn_export.labelled import Labelled, read_labelled
from msn_export.manifest import (
    AttentionRecord,
    GoldenRecord,
    Manifest,
    QuantizationRecord,
    SourceRecord,
    manifest_path,
    seal,
    sha256_of,
    versions_of,
)
from msn_export.metrics.accuracy import notes as notes_of
from msn_export.metrics.evaluate import Evaluation, Reference, Sample, evaluate, run_reference
from msn_export.metrics.tolerances import GATES, Gate
from msn_export.mixed_precision import cpu_runner
from msn_export.onnx_header import GraphMetadata
from msn_export.progress import SILENT, Progress
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.runtime.runner import Runner
from msn_export.spec import Dtype, InputFormat
from msn_export.version_table import least_versions, row_of

__all__ = ["CalibrateJob", "run_calibrate"]  # the two that docs/python.md speaks of

PACKAGES = ("onnx", "onnx-ir", "onnxsim", "onnxruntime-gpu", "onnxruntime", "tensorrt-rtx")


def to_manifest(
    done: Calibrated, job: CalibrateJob, stage: Path, ranges: str, progress: Progress
) -> Manifest:
    """Compile both graphs where that is possible, and write everything down.

    The ranges are written to ``stage`` under the name ``ranges``, unless they were given.
    """
    compiled, latency = measure(done, job, stage, progress)
    if job.ranges is None:
        ranges_file.write(done.collected.ranges, stage / ranges)
    origin, graph = done.source.manifest, GraphSummary.of(done.chosen.model)
    quantization = _quantization(done, job, job.ranges or stage / ranges, compiled, latency)
    cores = done.collected.plan.depth
    path = done.chosen.path
    row = row_of(job.scheme.target, job.dtype, job.rest)
    assert row is not None  # the table has a row for everything that a job may ask for
    return Manifest(
        kind="onnx",
        output=path.name,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        dtype=job.dtype,
        inputs=graph.inputs,
        outputs=graph.outputs,
        profiles=(done.source.batch,),
        preprocessing=done.source.preprocessing,
        nodes=graph.nodes,
        ops=graph.ops,
        attention=AttentionRecord(cores, cores, _form(job, done)),
        check=done.chosen.evaluation.check,
        opset=graph.opset,
        target=job.scheme.target,
        labels=done.source.labels,
        scores=done.source.scores,
        checkpoint=origin.checkpoint if origin else None,
        config=origin.config if origin else None,
        fit=origin.fit if origin else None,
        islands=dict(done.collected.islands),
        least_versions=least_versions(row),
        source=SourceRecord(done.source.path.name, done.collected.ranges.graph),
        quantization=quantization,
        notes=tuple(_notes(done)),
        command=job.command,
        versions=versions_of(*PACKAGES),
    )


def _form(job: CalibrateJob, done: Calibrated) -> str:
    if not job.quantize_attention:
        return job.scheme.attention.value
    kept = len(done.chosen.exclusion.kept)
    rest = f", {kept} of them {job.scheme.attention}" if kept else ""
    return f"MatMul, Softmax, MatMul in {job.dtype}{rest}"


def _quantization(
    done: Calibrated,
    job: CalibrateJob,
    ranges: Path,
    compiled: dict[str, Any],
    latency: dict[str, Any],
) -> QuantizationRecord:
    plan, taken, exclusion = done.collected.plan, done.collected.ranges, done.chosen.exclusion
    base, form = str(job.rest), str(job.dtype)
    evaluation, baseline = done.chosen.evaluation, done.baseline.evaluation
    both = {base: done.baseline.path.stat().st_size, form: done.chosen.path.stat().st_size}
    engines = (compiled[base]["bytes"], compiled[form]["bytes"]) if form in compiled else None
    times = latency["reason"] if "reason" in latency else (latency[base], latency[form])
    faults = tuple(_faults(compiled[form], form, plan.depth)) if form in compiled else ()
    spread = spread_of(latency, form)
    benefit = CostBenefit(
        base, form, (both[base], both[form]), engines, times, faults, spread,
        noisy=bool(latency.get("noisy")),
    )  # fmt: skip
    return QuantizationRecord(
        format=form,
        base=base,
        observer=str(job.observer),
        smoothing=taken.smoothing.strength,
        smoothing_errors=taken.smoothing.errors or {},
        attention=job.quantize_attention,
        bias_correction=job.bias_correction,
        products=len(quantised_products(done.chosen.model)),
        expected=len(plan.projections) + len(done.collected.overflowing),
        kept=_kept(done, job),
        drift={str(block): error for block, error in exclusion.drift.items()},
        calibration_images=len(taken.images.sha256),
        held_out=done.images.held_out.names,
        seed=taken.images.seed,
        limit=taken.images.limit,
        ranges=SourceRecord(ranges.name, sha256_of(ranges)),
        sizes={"fp32": done.source.path.stat().st_size, **both},
        twin=baseline.check,
        neighbours={base: neighbours_of(baseline), form: neighbours_of(evaluation)},
        classes={base: baseline.check.classes, form: evaluation.check.classes},
        compiled=compiled,
        latency=latency,
        worthwhile=benefit.worthwhile,
        verdict=summary(
            benefit,
            evaluation,
            baseline,
            kept=len(exclusion.kept),
            depth=plan.depth,
            calibrated=len(taken.images.sha256),
        ),
    )


def _faults(engine: dict[str, Any], form: str, depth: int) -> Iterator[str]:
    """List the ways in which an engine is not what was meant."""
    if engine["fused_attention"] < depth:
        yield f"fused attention in {engine['fused_attention']} of {depth} blocks"
    if engine["multiplied"] < engine["products"]:
        yield f"{engine['multiplied']} of {engine['products']} products multiply in {form}"


def _kept(done: Calibrated, job: CalibrateJob) -> dict[str, str]:
    """Give for each block and each product that is not quantised the reason."""
    drift = done.chosen.exclusion.drift
    kept = {
        f"block {block}": f"{job.rest}: quantised alone, it moves the embedding by "
        f"{drift[block]:.2%}"
        for block in done.chosen.exclusion.kept
    }
    return kept | dict.fromkeys(
        done.collected.overflowing, "fp32: its result passes what fp16 can hold"
    )


def _notes(done: Calibrated) -> Iterator[str]:
    taken = done.collected.ranges.images
    if len(taken.sha256) < FEW:
        yield (
            f"only {len(taken.sha256)} images were calibrated on: ranges of fewer than {FEW} say "
            "little about others; give more with --images"
        )
    yield from done.source.notes
    pictures = done.images.calibration
    if pictures.broken:
        yield f"{len(pictures.broken)} broken images skipped"
    yield from notes_on(tuple(pictures.broken.values()), pictures.skipped, len(pictures.turned))
    yield from done.notes
    if done.chosen.evaluation.accuracy is not None:
        yield from notes_of(done.chosen.evaluation.accuracy)
    if done.baseline.evaluation.failures:
        yield (
            f"the {done.baseline.evaluation.check.executed_on} baseline misses its own gate: "
            + "; ".join(done.baseline.evaluation.failures)
        )


def run_calibrate(job: CalibrateJob, progress: Progress = SILENT) -> tuple[Path, Manifest]:
    """Quantise an fp32 graph, judge it on held-out images, and write it with its ranges.

    Returns:
        The graph's path and its manifest.

    Raises:
        MsnExportError: whatever kept the graph from its gate; the output paths are as they were.
    """
    started, load = time.monotonic(), round(os.getloadavg()[0], 2)
    output = job.output or Path(f"{job.model.stem}.{job.dtype}.onnx")
    ranges = job.ranges or output.with_name(f"{output.stem}.ranges.json")
    outputs = [output, manifest_path(output), *([] if job.ranges else [ranges])]
    read = [job.model, manifest_path(job.model), *([job.ranges] if job.ranges else [])]
    require_writable(outputs, force=job.force, sources=read)
    require_meaning(job.observer, FORMATS[job.dtype])
    _require_target(replace(job, base=job.base or Dtype.FP16))
    labelled = None
    if job.labelled is not None:
        with progress.step("list labelled pictures"):
            labelled = read_labelled(job.labelled)
    with progress.step("read the graph"):
        source = _read(job)
        if labelled is not None:
            require_classes(labelled, source.outputs, source.labels, str(source.path))
        job = settled(job, source)
        _require_target(job)  # by the type of the rest that the graph asks for
        given = given_ranges(job, source)
    with progress.step("deal out the images"):
        split_images = split(
            job.images, source.preprocessing, source.input_format, limit=job.limit, seed=job.seed,
            taken=given.images.sha256 if given else (),
        )  # fmt: skip
    with staging(output.parent) as stage:
        reference = _run_fp32(job, source, split_images, stage, progress)
        collected = collect_ranges(job, source, split_images.calibration, given, stage, progress)
        counted = _run_labelled(source, labelled, collected, progress) if labelled else None
        fp32 = _Fp32(source, reference, counted)
        chosen, recorded = _choose(job, fp32, collected, stage / output.name, progress)
        baseline = _baseline(job, fp32, collected, stage, progress)
        counts = _notes_on_labelled(counted) if counted else ()
        done = Calibrated(source, split_images, collected, chosen, baseline, tuple(counts), load)
        manifest = to_manifest(done, job, stage, ranges.name, progress)
        manifest = replace(
            manifest,
            golden=recorded,
            seconds=round(time.monotonic() - started, 3),
            peak_rss_bytes=peak_rss(),
        )
        taken = () if job.ranges else (stage / ranges.name,)
        publish(chosen.path, output, seal(manifest), beside=taken, force=job.force)
    return output, manifest


def _golden(source: GraphFile, runner: Runner, evaluation: Evaluation) -> GoldenRecord:
    """Record what the quantised graph itself makes of seeded noise.

    Noise is no picture: what 8 bits cost on it says nothing. Another machine has to reproduce it,
    to within what 8 bits cost a picture: where a sum is rounded elsewhere, whole steps change.
    """
    max_batch = max_batch_of(source.graph)
    recorded = golden.record(
        runner, runner.name, source.preprocessing, source.input_format, max_batch
    )
    costs = [figures["image"] or 0.0 for figures in evaluation.check.outputs.values()]
    return replace(recorded, limit=golden.MARGIN * max(costs))


def _require_target(job: CalibrateJob) -> None:
    """Refuse a GPU generation to compile for where nothing would be compiled."""
    if job.capability is None:
        return
    if job.rest is Dtype.FP32:
        raise SpecError(
            f"--compute-capability {job.capability}: {job.dtype} beside fp32 is for onnxruntime "
            "and is not compiled; --base fp16 is"
        )
    require_target(job.capability, (job.dtype, job.rest))


def _read(job: CalibrateJob) -> GraphFile:
    path = job.model
    source = GraphFile.read(path, job.preprocess, job.exif)
    if source.dtype.is_quantised:
        raise GraphError(
            f"{path} is quantised to {source.dtype} already; give the fp32 graph it was made from"
        )
    if source.dtype is not Dtype.FP32:
        raise GraphError(f"{path} is typed {source.dtype}; calibrate takes the fp32 graph")
    return source


def _run_fp32(
    job: CalibrateJob, source: GraphFile, split_images: Split, stage: Path, progress: Progress
) -> Reference:
    held = split_images.held_out
    sample = Sample(
        held.pixels, held.names, f"held out of {job.images}", source.preprocessing,
        max_batch=max_batch_of(source.graph), skipped=split_images.calibration.skipped,
    )  # fmt: skip
    title = f"run the fp32 graph on {len(sample)} held-out images"
    with progress.step(title), OrtRunner(source.path) as runner:
        runner.name = f"{source.path.name} in {runner.name}"
        reference = run_reference(runner, sample, source.input_format, fixed=source.fixed_batch)
        source.require_apart(runner, sample)
        source.require_golden(runner)
    again = partial(_one, sample, source.input_format)
    require_finite(source.graph, reference.outputs, held.names, again, stage)
    return reference


def _one(sample: Sample, input_format: InputFormat, index: int) -> NDArray[Any]:
    return sample.preprocess([index], input_format)


def _run_labelled(
    source: GraphFile,
    labelled: Labelled,
    collected: CollectedRanges,
    progress: Progress,
) -> LabelledReference:
    """Run the fp32 graph on the labelled pictures that were not calibrated on."""
    taken = frozenset(collected.ranges.images.sha256)
    feed = Feed(source.input_format, source.preprocessing)
    title = "run the fp32 graph on labelled pictures"
    with progress.step(title), OrtRunner(source.path) as runner:
        outputs = (output_to_compare(source.outputs),)
        model = LabelledModel(str(source.path), runner, feed, outputs, source.labels)
        reference = LabelledReference.run(
            labelled, model, progress, lambda pixels: hash_of(pixels) in taken
        )
    if not len(reference.labelled):
        raise ImageError(
            f"all {len(labelled)} pictures of {labelled.source} were calibrated on; give others "
            "with --labelled, or calibrate on fewer with --limit"
        )
    return reference


def _notes_on_labelled(reference: LabelledReference) -> Iterator[str]:
    yield from reference.notes
    if reference.withheld:
        yield (
            f"{reference.withheld} of {reference.given} labelled pictures were calibrated on, and "
            "are not judged by"
        )


@dataclass(frozen=True, slots=True)
class _Fp32:
    """The fp32 graph and what it made of the images that its quantised forms are judged on."""

    source: GraphFile
    reference: Reference
    labelled: LabelledReference | None

    @property
    def batch(self) -> int:
        """Images that a graph is run on at once, to be judged."""
        sample = self.reference.sample
        return self.source.fixed_batch or min(8, sample.max_batch, len(sample))


def _choose(
    job: CalibrateJob, fp32: _Fp32, collected: CollectedRanges, path: Path, progress: Progress
) -> tuple[Candidate, GoldenRecord]:
    """Quantise as many blocks as reach the gate, on calibration images and on held-out ones."""
    plan, probe = collected.plan, collected.probe
    failed: Evaluation | None = None
    with progress.step(f"quantise to {job.dtype} and judge"):
        for exclusion, model in exclusions(plan, probe, job.gate, progress):
            _write(model, collected, job.rest, path, _metadata(job, fp32.source))
            with cpu_runner(path, job.dtype, path.parent) as runner:
                evaluation = _evaluate(job, runner, job.gate, fp32, progress)
                if not evaluation.failures:
                    recorded = _golden(fp32.source, runner, evaluation)
                    return Candidate(path, model, evaluation, exclusion), recorded
            failed = evaluation
    if failed is not None and not failed.disagreements:
        raise ToleranceError(
            f"every choice of blocks in {job.dtype} fails on labelled pictures "
            f"({failed.losses[0]}); keep {job.rest}, or allow it with --accuracy-drop"
        )
    where, failures = "held-out", failed.failures if failed is not None else ()
    if not failures:
        where = "calibration"
        failures = tuple(probe.failures(plan.quantised(), job.gate))
    raise ToleranceError(
        f"no choice of blocks reaches --gate-cosine {job.gate.cosine_p1} in {job.dtype} on {where} "
        f"images ({failures[0]}); keep {job.rest}, or lower the gate"
    )


def _evaluate(
    job: CalibrateJob, runner: Runner, gate: Gate, fp32: _Fp32, progress: Progress
) -> Evaluation:
    """Judge a graph on held-out images; on labelled pictures too, once it agrees on those."""
    found = evaluate(runner, fp32.reference, fp32.source.input_format, (fp32.batch,), gate)
    if fp32.labelled is None or found.failures:
        return found
    accuracy = fp32.labelled.accuracy_of(runner, job.accuracy_drop, progress)
    return replace(found, accuracy=accuracy)


def _baseline(
    job: CalibrateJob, fp32: _Fp32, collected: CollectedRanges, stage: Path, progress: Progress
) -> Candidate:
    """Make the same graph in the base type, which is what quantising has to be better than."""
    path = apart(stage) / f"baseline.{job.rest}.onnx"
    with progress.step(f"judge the {job.rest} graph beside it"):
        model = collected.unquantised
        _write(model, collected, job.rest, path, _metadata(job, fp32.source))
        with cpu_runner(path, job.rest, path.parent) as runner:
            evaluation = _evaluate(job, runner, GATES[job.rest], fp32, progress)
    return Candidate(path, model, evaluation)


def _metadata(job: CalibrateJob, source: GraphFile) -> GraphMetadata:
    return GraphMetadata(
        source.preprocessing, source.labels, source.scores, job.scheme.target, job.dtype
    )


def _write(
    model: ir.Model, collected: CollectedRanges, base: Dtype, path: Path, metadata: GraphMetadata
) -> None:
    if base is not Dtype.FP32:
        named = {value.name for node in model.graph for value in node.outputs}
        type_graph(model, base, collected.islands.keys() & named)
    model.producer_name, model.producer_version = "msn-export", __version__
    model.metadata_props.update(metadata.props())
    io.save(model, path)
    io.check(path)
