"""Describe an engine: what it was built from, with what, and what the compiler made of it."""

from msn_export.check.sample import Sample
from msn_export.engine.build import BuildResult
from msn_export.engine.census import summary
from msn_export.graph.facts import tensor_specs
from msn_export.manifest import Manifest, versions_of
from msn_export.manifest_records import AttentionRecord, CheckRecord, EngineRecord, SourceRecord
from msn_export.records import to_plain
from msn_export.sidecar import sha256_of
from msn_export.source import Source
from msn_export.trt.compilable import Compilable
from msn_export.trt.job import TrtJob

PACKAGES = ("onnx", "onnx-ir", "onnxsim", "onnxruntime-gpu", "onnxruntime")


def _engine_record(job: TrtJob, graph: Compilable, result: BuildResult) -> EngineRecord:
    figures = summary(result.census)
    options = {
        name: getattr(job, name)
        for name in (
            "workspace",
            "optimization_level",
            "version_compatible",
            "hardware_compatible",
            "tf32",
            "allow_unfused",
            "allow_fp32",
        )
        if getattr(job, name) not in {None, False}
    }
    return EngineRecord(
        backend=result.backend.name,
        version=result.backend.version,
        compute_capabilities=tuple(map(str, result.targets.named)),
        precision=graph.dtype,
        kernels=figures["kernels"],
        kernels_per_block=figures["kernels_per_block"],
        fused_attention=figures["fused_attention"],
        gemm_dtypes=figures["gemm_dtypes"],
        accumulators=figures["accumulators"],
        quantised_products=len(graph.quantised),
        executed=False,
        reason="compiled",
        later=result.targets.later,
        census=[to_plain(census) for census in result.censuses],
        options=options,
    )


def _accepted(graph: Compilable) -> tuple[str, ...]:
    if not graph.accepted:
        return ()
    return (f"in fp32 though no island says so, accepted: {', '.join(graph.accepted)}",)


def describe(
    job: TrtJob,
    source: Source,
    graph: Compilable,
    sample: Sample,
    check: CheckRecord | None,
    result: BuildResult,
) -> Manifest:
    """Write down all that is known before the engine has run; profiles and seal come later."""
    known = source.manifest
    engine = _engine_record(job, graph, result)
    return Manifest(
        kind="engine",
        output=result.output.name,
        sha256=sha256_of(result.output),
        bytes=result.bytes,
        dtype=graph.dtype,
        inputs=tensor_specs(list(source.model.graph.inputs)),
        outputs=graph.outputs,
        profiles=(),
        preprocessing=source.preprocessing,
        nodes=graph.nodes,
        ops=graph.ops,
        attention=AttentionRecord(graph.cores, engine.fused_attention, "kernel"),
        check=check,
        opset=graph.opset,
        target=engine.backend,
        labels=known.labels if known else (),
        scores=known.scores if known else None,
        checkpoint=known.checkpoint if known else None,
        config=known.config if known else None,
        islands=dict(graph.islands.maxima),
        source=SourceRecord(source.path.name, sha256_of(source.path)),
        engine=engine,
        notes=tuple(
            dict.fromkeys(
                (
                    *source.notes,
                    *graph.notes,
                    *result.notes,
                    *_accepted(graph),
                    *sample.notes,
                )
            )
        ),
        command=job.command,
        versions=versions_of(*PACKAGES, engine.backend),
    )
