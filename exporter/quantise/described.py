"""A quantised graph's manifest: how it was made, what it costs, what it saves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msn_export.calibration import ranges as ranges_file
from msn_export.calibration.pictures import FEW
from msn_export.graph.facts import GraphFacts
from msn_export.graph.quantised import quantised_products
from msn_export.image_folder import notes_on
from msn_export.manifest import Manifest, versions_of
from msn_export.manifest_records import AttentionRecord, QuantizationRecord, SourceRecord
from msn_export.progress import Progress
from msn_export.quantise.job import CalibrateJob
from msn_export.quantise.measured import Calibrated, measure
from msn_export.quantise.verdict import Savings, sentence
from msn_export.sidecar import sha256_of

PACKAGES = ("onnx", "onnx-ir", "onnxsim", "onnxruntime-gpu", "onnxruntime", "tensorrt-rtx")


def describe(
    done: Calibrated, job: CalibrateJob, stage: Path, ranges: str, progress: Progress
) -> Manifest:
    """Compile both graphs where that is possible, and write everything down.

    The ranges are written to ``stage`` under the name ``ranges``, unless they were given.
    """
    compiled, latency = measure(done, job, stage, progress)
    if job.ranges is None:
        ranges_file.write(done.ranged.ranges, stage / ranges)
    known, facts = done.source.manifest, GraphFacts.of(done.chosen.model)
    quantization = _quantization(done, job, job.ranges or stage / ranges, compiled, latency)
    cores = done.ranged.plan.depth
    path = done.chosen.path
    return Manifest(
        kind="onnx",
        output=path.name,
        sha256=sha256_of(path),
        bytes=path.stat().st_size,
        dtype=job.dtype,
        inputs=facts.inputs,
        outputs=facts.outputs,
        profiles=(done.source.batch,),
        preprocessing=done.source.preprocessing,
        nodes=facts.nodes,
        ops=facts.ops,
        attention=AttentionRecord(cores, cores, _form(job, done)),
        check=done.chosen.judged.record,
        opset=facts.opset,
        target=job.scheme.target,
        labels=known.labels if known else (),
        scores=known.scores if known else None,
        checkpoint=known.checkpoint if known else None,
        config=known.config if known else None,
        islands=dict(done.ranged.islands),
        source=SourceRecord(done.source.path.name, done.ranged.ranges.graph),
        quantization=quantization,
        notes=tuple(_notes(done)),
        command=job.command,
        versions=versions_of(*PACKAGES),
    )


def _form(job: CalibrateJob, done: Calibrated) -> str:
    if not job.quantize_attention:
        return job.scheme.attention.value
    kept = len(done.chosen.choice.kept)
    rest = f", {kept} of them {job.scheme.attention}" if kept else ""
    return f"MatMul, Softmax, MatMul in {job.dtype}{rest}"


def _quantization(
    done: Calibrated,
    job: CalibrateJob,
    ranges: Path,
    compiled: dict[str, Any],
    latency: dict[str, Any],
) -> QuantizationRecord:
    plan, taken, choice = done.ranged.plan, done.ranged.ranges, done.chosen.choice
    base, form = str(job.rest), str(job.dtype)
    judged, twin = done.chosen.judged, done.twin.judged
    both = {base: done.twin.path.stat().st_size, form: done.chosen.path.stat().st_size}
    engines = (compiled[base]["bytes"], compiled[form]["bytes"]) if form in compiled else None
    times = latency["reason"] if "reason" in latency else (latency[base], latency[form])
    faults = tuple(_faults(compiled[form], form, plan.depth)) if form in compiled else ()
    savings = Savings(base, form, (both[base], both[form]), engines, times, faults)
    return QuantizationRecord(
        format=form,
        base=base,
        observer=str(job.observer),
        smoothing=taken.smoothing.strength,
        smoothing_errors=taken.smoothing.errors or {},
        attention=job.quantize_attention,
        bias_correction=job.bias_correction,
        products=len(quantised_products(done.chosen.model)),
        expected=len(plan.projections) + len(done.ranged.overflowing),
        kept=_kept(done, job),
        drift={str(block): error for block, error in choice.drift.items()},
        calibration_images=len(taken.images.sha256),
        held_out=done.dealt.held_out.names,
        seed=taken.images.seed,
        limit=taken.images.limit,
        ranges=SourceRecord(ranges.name, sha256_of(ranges)),
        sizes={"fp32": done.source.path.stat().st_size, **both},
        twin=twin.record,
        neighbours={base: twin.neighbours, form: judged.neighbours},
        classes={base: twin.classes, form: judged.classes},
        compiled=compiled,
        latency=latency,
        worthwhile=savings.worthwhile,
        verdict=sentence(savings, judged, twin, kept=len(choice.kept), depth=plan.depth),
    )


def _faults(engine: dict[str, Any], form: str, depth: int) -> Iterator[str]:
    """Say what an engine is not that was meant."""
    if engine["fused_attention"] < depth:
        yield f"fused attention in {engine['fused_attention']} of {depth} blocks"
    if engine["multiplied"] < engine["products"]:
        yield f"{engine['multiplied']} of {engine['products']} products multiply in {form}"


def _kept(done: Calibrated, job: CalibrateJob) -> dict[str, str]:
    """Say of each block, and each product, that is not quantised, why."""
    drift = done.chosen.choice.drift
    kept = {
        f"block {block}": f"{job.rest}: quantised alone, it moves the embedding by "
        f"{drift[block]:.2%}"
        for block in done.chosen.choice.kept
    }
    return kept | dict.fromkeys(
        done.ranged.overflowing, "fp32: its result passes what fp16 can hold"
    )


def _notes(done: Calibrated) -> Iterator[str]:
    taken = done.ranged.ranges.images
    if len(taken.sha256) < FEW:
        yield (
            f"only {len(taken.sha256)} images were calibrated on: ranges of fewer than {FEW} say "
            "little about others; give more with --images"
        )
    yield from done.source.notes
    dealt = done.dealt.calibration
    if dealt.broken:
        yield f"{len(dealt.broken)} broken images skipped"
    yield from notes_on(tuple(dealt.broken.values()), dealt.skipped, len(dealt.turned))
    if done.twin.judged.failures:
        yield f"the {done.twin.judged.record.executed_on} twin misses its own gate: " + "; ".join(
            done.twin.judged.failures
        )
