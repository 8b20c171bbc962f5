"""The story of ``msn-export trt``: graph, precision, check, compile in a child, census, engine."""

import math
import resource
import time
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from msn_export import golden
from msn_export.check.gate import GATES
from msn_export.check.sample import Sample, draw
from msn_export.check.verify import Reference, run_reference, verify
from msn_export.driver import NoDriver, find_driver
from msn_export.engine import timing_cache
from msn_export.engine.backend import Backend, find_backend
from msn_export.engine.build import BuildResult, build_engine
from msn_export.engine.census import require, summary
from msn_export.engine.job import BuildSpec
from msn_export.engine.job import Progress as BuildProgress
from msn_export.errors import GraphError, SpecError
from msn_export.execute import execute
from msn_export.files import manifest_path, publish, require_writable, sha256_of, staging
from msn_export.graph import io
from msn_export.graph.expose import expose
from msn_export.graph.fuse import fuse_attention
from msn_export.graph.lower import lower, raise_opset
from msn_export.graph.precision import fp32_nodes
from msn_export.graph.quantised import quantised_products
from msn_export.graph.stream import stages_of
from msn_export.manifest import (
    AttentionRecord,
    CheckRecord,
    EngineRecord,
    GoldenRecord,
    Manifest,
    SourceRecord,
    seal,
    versions_of,
)
from msn_export.progress import Progress
from msn_export.records import to_plain
from msn_export.source import Source, read_source, room_of
from msn_export.spec import AttentionForm, BatchRange, ComputeCapability, Dtype, TensorSpec
from msn_export.typed import Islands, cpu_runner, type_as

PACKAGES = ("onnx", "onnx-ir", "onnxsim", "onnxruntime-gpu", "onnxruntime")


@dataclass(frozen=True, slots=True)
class TrtJob:
    """What ``msn-export trt`` was asked for; ``precision`` None is as the graph is typed."""

    model: Path
    output: Path | None = None
    precision: Dtype | None = None
    backend: str = "auto"
    capabilities: tuple[ComputeCapability, ...] = ()
    profiles: tuple[BatchRange, ...] = ()
    islands: str = "measured"
    workspace: int | None = None
    optimization_level: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    tf32: bool = False
    timeout: float | None = None
    memory_limit: int | None = None
    images: Path | None = None
    allow_unfused: bool = False
    check: bool = True
    stages: bool = False  # show the residual stream as outputs; for drift, not for production
    log: Path | None = None
    force: bool = False
    command: str = ""


@dataclass(frozen=True, slots=True)
class Graph:
    """The graph that is compiled: typed, its attention in the form the compiler fuses."""

    path: Path
    dtype: Dtype
    cores: int
    form: AttentionForm
    opset: int
    nodes: int
    ops: dict[str, int]
    outputs: tuple[TensorSpec, ...]
    islands: Islands
    quantised: tuple[str, ...]
    changed: bool


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of checking the typed graph; None where no check was asked for."""

    record: CheckRecord | None
    reference: Reference | None
    golden: GoldenRecord | None


def run_trt(job: TrtJob, progress: Progress) -> tuple[Path, Manifest]:
    """Compile a graph into an engine with its manifest.

    Returns:
        The engine's path and its manifest.

    Raises:
        MsnExportError: whatever kept the engine from its gate; the output path is as it was.
    """
    started = time.monotonic()
    output = job.output or Path(job.model.with_suffix(".engine").name)
    require_writable([output, manifest_path(output)], force=job.force, sources=[job.model])
    backend = find_backend(job.backend)
    with progress.step("read the graph"):
        source = read_source(job.model)
        profiles = _profiles(job, source)
    with progress.step("read images"):
        sample = draw(job.images, source.preprocessing, room=room_of(source.model))
    with staging(output.parent) as stage:
        graph = _prepare(job, source, backend, sample, stage, progress)
        checked = _check(job, source, graph, sample, profiles, progress)
        result = _compile(job, graph, profiles, backend, stage / output.name, progress)
        manifest = replace(
            _describe(job, source, graph, sample, checked.record, result),
            profiles=profiles,
            golden=checked.golden,
        )
        with progress.step("run the engine, where a GPU is"):
            engine = execute(result.output, manifest, checked.reference, source.stem)
        manifest = replace(
            manifest,
            engine=engine,
            seconds=round(time.monotonic() - started, 3),
            peak_rss_bytes=max(
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, result.peak_rss
            ),
        )
        publish(result.output, output, seal(manifest))
    return output, manifest


def _profiles(job: TrtJob, source: Source) -> tuple[BatchRange, ...]:
    """Take the batch ranges asked for, or the graph's own.

    Raises:
        SpecError: the graph's batch is fixed at another size.
    """
    profiles = job.profiles or (source.batch,)
    for profile in profiles:
        fixed = source.batch.is_static and profile != source.batch
        if fixed:
            raise SpecError(
                f"--batch {profile}: the graph has a fixed batch of {source.batch.max}; "
                f"export it again with --batch {profile}"
            )
    return profiles


def _prepare(
    job: TrtJob,
    source: Source,
    backend: Backend,
    sample: Sample,
    stage: Path,
    progress: Progress,
) -> Graph:
    """Type the graph and write it in the form and opset that the compiler fuses."""
    dtype = job.precision or source.dtype
    if dtype is not source.dtype and source.dtype is not Dtype.FP32:
        raise GraphError(f"{source.path} is typed {source.dtype}; --{dtype} needs the fp32 graph")
    if dtype.is_quantised and backend.flavour.opset < 19:
        raise GraphError(
            f"{source.path} is quantised with {source.dtype} weights and half-precision scales, "
            f"which {backend} cannot read; it takes TensorRT 10 or later"
        )
    before = io.operators(source.model)
    with progress.step(f"type as {dtype}"):
        model, form, cores = _written_for(backend, source, dtype)
        if dtype is source.dtype:
            islands = _islands_of(source, model)
        else:
            islands = type_as(model, dtype, job.islands, sample, source.stem, stage)
    if job.stages:
        model = expose(model, stages_of(model))
    path = stage / source.path.name
    with progress.step("write and check the typed graph"):
        io.save(model, path)
        io.check(path)
    ops = io.operators(model)
    opset, nodes = model.graph.opset_imports[""], len(model.graph)
    outputs = io.tensor_specs(list(model.graph.outputs))
    quantised = quantised_products(model)
    return Graph(
        path, dtype, cores, form, opset, nodes, ops, outputs, islands, quantised,
        changed=ops != before,
    )  # fmt: skip


def _islands_of(source: Source, model: ir.Model) -> Islands:
    """Say what stays fp32 in a graph that came typed."""
    known = source.manifest.islands if source.manifest is not None else {}
    maxima = {name: math.inf if peak is None else peak for name, peak in known.items()}
    return Islands(maxima, fp32_nodes(model) if source.dtype is not Dtype.FP32 else ())


def _written_for(
    backend: Backend, source: Source, dtype: Dtype
) -> tuple[ir.Model, AttentionForm, int]:
    """Write the graph as this backend reads and fuses it; how many attention cores it has."""
    flavour = backend.flavour
    # an fp32 Attention operator has no kernel: "not supported by a dedicated kernel"
    plain = dtype is Dtype.FP32 or not flavour.has_attention
    form = AttentionForm.PLAIN if plain else AttentionForm.HEADS
    model = source.model if plain else raise_opset(source.model)
    cores = fuse_attention(model, form, expected=_expected(source))
    if model.graph.opset_imports[""] > flavour.opset:
        lower(model, flavour.opset)
    return model, form, cores


def _expected(source: Source) -> int | None:
    return source.manifest.attention.expected if source.manifest is not None else None


def _check(
    job: TrtJob,
    source: Source,
    graph: Graph,
    sample: Sample,
    profiles: tuple[BatchRange, ...],
    progress: Progress,
) -> Checked:
    """Compare the typed graph with the graph that was given, at each profile's sizes."""
    known = source.manifest.golden if source.manifest is not None else None
    if not job.check:
        return Checked(None, None, known)
    with progress.step("run the given graph"):
        reference, known = _run_given(source, sample, known, graph.path.parent)
    room = sample.room
    sizes = {min(size, max(p.min, room)) for p in profiles for size in (p.min, p.opt, p.max)}
    with progress.step("compare the typed graph"):
        runner = cpu_runner(graph.path, graph.dtype, graph.path.parent)
        verified = verify(runner, reference, source.stem, sorted(sizes))
    record = verified.require(GATES[graph.dtype], f"the {graph.dtype} graph")
    return Checked(record, reference, known)


def _run_given(
    source: Source, sample: Sample, known: GoldenRecord | None, stage: Path
) -> tuple[Reference, GoldenRecord]:
    """Run the graph that was given; its session is closed before the next one opens."""
    with cpu_runner(source.path, source.dtype, stage) as runner:
        runner.name = f"{source.path.name} in {runner.name}"
        reference = run_reference(runner, sample, source.stem, fixed=source.fixed)
        return reference, known or golden.record(
            runner, runner.name, source.preprocessing, source.stem, sample.room
        )


def _compile(
    job: TrtJob,
    graph: Graph,
    profiles: tuple[BatchRange, ...],
    backend: Backend,
    output: Path,
    progress: Progress,
) -> BuildResult:
    spec = BuildSpec(
        model=graph.path,
        profiles=profiles,
        capabilities=job.capabilities,
        precision=graph.dtype,
        workspace=job.workspace,
        optimization_level=job.optimization_level,
        timing_cache=job.timing_cache or _default_timing_cache(backend),
        version_compatible=job.version_compatible,
        tf32=job.tf32,
        decompose_attention=job.allow_unfused,
        timeout=job.timeout,
        memory_limit=job.memory_limit,
    )

    def advance(at: BuildProgress) -> None:
        progress.advance(int(at.fraction * 1000), 1000, at.phase)

    with progress.step(f"compile with {backend}"):
        result = build_engine(spec, backend, output, job.log, advance)
    for census in result.censuses:
        require(
            census,
            depth=graph.cores,
            precision=graph.dtype,
            # no TensorRT has fused attention in fp32: there is nothing to require
            allow_unfused=job.allow_unfused or graph.dtype is Dtype.FP32,
            fp32_islands=graph.islands.nodes,
            quantised=graph.quantised,
        )
    return result


def _default_timing_cache(backend: Backend) -> Path | None:
    """Name the user's cache for this TensorRT and GPU; None where the backend keeps no timings."""
    driver = find_driver()
    if isinstance(driver, NoDriver) or "timing_cache" in backend.flavour.ignored:
        return None
    device = driver.devices[0]
    return timing_cache.default_path(backend.version, device.name, device.capability)


def _engine_record(job: TrtJob, graph: Graph, result: BuildResult) -> EngineRecord:
    figures = summary(result.census)
    options = {
        name: getattr(job, name)
        for name in ("workspace", "optimization_level", "version_compatible", "tf32")
        if getattr(job, name) not in {None, False}
    }
    return EngineRecord(
        backend=result.backend.name,
        version=result.backend.version,
        compute_capabilities=tuple(str(capability) for capability in result.capabilities),
        precision=graph.dtype,
        kernels=figures["kernels"],
        kernels_per_block=figures["kernels_per_block"],
        fused_attention=figures["fused_attention"],
        gemm_dtypes=figures["gemm_dtypes"],
        quantised_products=len(graph.quantised),
        executed=False,
        reason="compiled",
        census=[to_plain(census) for census in result.censuses],
        options=options,
    )


def _describe(
    job: TrtJob,
    source: Source,
    graph: Graph,
    sample: Sample,
    check: CheckRecord | None,
    result: BuildResult,
) -> Manifest:
    known = source.manifest
    engine = _engine_record(job, graph, result)
    return Manifest(
        kind="engine",
        output=result.output.name,
        sha256=sha256_of(result.output),
        bytes=result.bytes,
        dtype=graph.dtype,
        inputs=io.tensor_specs(list(source.model.graph.inputs)),
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
        checkpoint=known.checkpoint if known else None,
        config=known.config if known else None,
        islands=dict(graph.islands.maxima),
        source=SourceRecord(source.path.name, sha256_of(source.path)),
        engine=engine,
        notes=(
            *source.notes,
            *result.notes,
            *(f"skipped: {broken}" for broken in sample.broken),
        ),
        command=job.command,
        versions=versions_of(*PACKAGES, engine.backend),
    )
