"""The steps of ``msn-export trt``: graph, precision, check, compile in a child, census, engine."""

import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from msn_export import golden
from msn_export.artifact import Artifact, GraphFile, max_batch_of
from msn_export.baseline import add_baseline, open_exact, open_rounded, open_widened
from msn_export.commands.jobs import TrtJob
from msn_export.commands.trt_graph import (
    AttentionGate,
    Compilable,
    first_bf16,
    prepare,
    settle,
    with_sums,
)
from msn_export.engine import compile
from msn_export.engine.build import BuildResult, build_engine
from msn_export.engine.census import require, summary
from msn_export.engine.options import Backend, BuildSpec, check_options, find_backend
from msn_export.engine.options import BuildStep as BuildProgress
from msn_export.engine_header import parse_header
from msn_export.errors import GraphError, MissingPackageError, SpecError
from msn_export.files import publish, require_writable, same_file, staging
from msn_export.graph.summary import tensor_specs
from msn_export.host import NoDriver, find_driver, peak_rss
from msn_export.manifest import (
    AttentionRecord,
    CheckRecord,
    EngineRecord,
    GoldenRecord,
    Manifest,
    SourceRecord,
    manifest_path,
    seal,
    sha256_of,
    versions_of,
)
from msn_export.metrics.evaluate import (
    Reference,
    Sample,
    draw,
    evaluate,
    measure_rounding,
    require_different,
    run_reference,
    sizes_without_largest,
)
from msn_export.metrics.tolerances import GATES, ROUNDED_MARGIN
from msn_export.mixed_precision import cpu_runner
from msn_export.options import kept
from msn_export.progress import SILENT, Progress
from msn_export.runtime.engine import VerifiedEngine
from msn_export.runtime.opening import open_engine
from msn_export.runtime.runner import Outputs
from msn_export.runtime.tensorrt import TrtRunner
from msn_export.schema import to_plain
from msn_export.spec import BatchRange, ComputeCapability, Dtype, InputFormat

__all__ = ["TrtJob", "run_trt"]  # the two that docs/python.md speaks of


@dataclass(slots=True)
class _OnProfile:
    """A runner that uses one profile only."""

    runner: TrtRunner
    profile: int
    name: str

    def __call__(self, images: Any, /) -> Outputs:
        return self.runner(images, profile=self.profile)


def execute(
    engine: Path, manifest: Manifest, reference: Reference | None, input_format: InputFormat
) -> EngineRecord:
    """Run an engine at the smallest, best and largest batch of each profile and gate it.

    Args:
        engine: the staged file.
        manifest: what will be written of it.
        reference: what to compare with; None where no check was asked for.
        input_format: what the engine takes.

    Returns:
        The manifest's engine record: executed, with the figures, or not, and why.
    """
    record = manifest.engine
    assert record is not None
    content = engine.read_bytes()
    verified = VerifiedEngine(engine, content, parse_header(content, engine), manifest)
    reason = _obstacle(verified, reference)
    if reason or reference is None:
        return replace(record, executed=False, reason=f"compiled, not executed: {reason}")
    try:
        # TensorRT-RTX: judge the kernels that a service ends up with, not those of its first runs
        runner = open_engine(verified, eager_kernels=True)
    except MissingPackageError as error:
        return replace(record, executed=False, reason=f"compiled, not executed: {error}")
    with runner:
        check = _check_profiles(runner, manifest, reference, input_format)
    sizes = ", ".join(str(size) for size in check.batches)
    figures = f"max_abs {check.max_abs:.2e}, p1 cosine {check.cosine_p1:.6f}"
    reason = f"executed on {runner.name}, batches {sizes}: {figures}"
    return replace(record, executed=True, reason=reason, check=check)


def _obstacle(engine: VerifiedEngine, reference: Reference | None) -> str:
    """Give the reason why an engine cannot run here; nothing where it should run."""
    driver = find_driver()
    if isinstance(driver, NoDriver):
        return driver.reason
    if not any(engine.is_for(device) for device in driver.devices):
        here = ", ".join(f"{device.name} (SM {device.capability})" for device in driver.devices)
        return f"it is for another GPU ({engine}; here is {here})"
    return "no check was asked for (--no-check)" if reference is None else ""


def _check_profiles(
    runner: TrtRunner, manifest: Manifest, reference: Reference, input_format: InputFormat
) -> CheckRecord:
    """Gate every profile; the record is that of the worst, with all sizes that ran."""
    if manifest.rounds_as is not manifest.dtype:  # TF32: what was measured is fp32's
        reference = replace(reference, exact={}, rounding={}, baseline={})
    records = []
    for index, profile in enumerate(runner.profiles):
        sizes = sorted({profile.min, profile.opt, profile.max})
        on_profile = _OnProfile(runner, index, f"{runner.name}, profile {profile}")
        found = evaluate(on_profile, reference, input_format, sizes, GATES[manifest.rounds_as])
        records.append(found.require(f"the engine, run in profile {profile}"))
    worst = min(records, key=lambda record: record.cosine_min or 0.0)
    every = sorted({size for record in records for size in record.batches})
    return replace(worst, batches=tuple(every))


PACKAGES = ("onnx", "onnx-ir", "onnxsim", "onnxruntime-gpu", "onnxruntime")


def _engine_record(job: TrtJob, graph: Compilable, result: BuildResult) -> EngineRecord:
    figures = summary(result.census)
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
        options=kept(job),
    )


def _accepted(graph: Compilable) -> tuple[str, ...]:
    if not graph.accepted:
        return ()
    return (f"in fp32 though no island says so, accepted: {', '.join(graph.accepted)}",)


def to_manifest(
    job: TrtJob,
    source: GraphFile,
    graph: Compilable,
    sample: Sample,
    check: CheckRecord | None,
    result: BuildResult,
) -> Manifest:
    """Write down all that is known before the engine has run; profiles and seal come later."""
    origin = source.manifest
    engine = _engine_record(job, graph, result)
    return Manifest(
        kind="engine",
        output=result.output.name,
        sha256=sha256_of(result.output),
        bytes=result.bytes,
        dtype=graph.dtype,
        inputs=tensor_specs(list(source.graph.graph.inputs)),
        outputs=graph.outputs,
        profiles=(),
        preprocessing=source.preprocessing,
        nodes=graph.nodes,
        ops=graph.ops,
        attention=AttentionRecord(graph.cores, engine.fused_attention, "kernel"),
        check=check,
        opset=graph.opset,
        target=engine.backend,
        labels=source.labels,
        scores=source.scores,
        checkpoint=origin.checkpoint if origin else None,
        config=origin.config if origin else None,
        fit=origin.fit if origin else None,
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


EXACT = 4  # pictures that an fp32 graph computes in fp64 too


@dataclass(frozen=True, slots=True)
class Checked:
    """Results of checking the typed graph; None where no check was asked for."""

    record: CheckRecord | None
    reference: Reference | None
    golden: GoldenRecord | None


def run_trt(job: TrtJob, progress: Progress = SILENT) -> tuple[Path, Manifest]:
    """Compile a graph into an engine with its manifest.

    Returns:
        The engine's path and its manifest.

    Raises:
        MsnExportError: whatever kept the engine from its gate; the output path is as it was.
    """
    started = time.monotonic()
    output = job.output or Path(job.model.with_suffix(".engine").name)
    _require_outputs(job, output)
    backend = find_backend(job.backend)
    with progress.step("read the graph"):
        source = GraphFile.read(job.model, job.preprocess, job.exif)
        profiles = _profiles(job, source)
        spec = _spec(job, profiles, backend)
        check_options(spec, backend, find_driver())  # the build does too, but after all the checks
        targets = _targets(spec, backend)
    with progress.step("read images"):
        sample = draw(job.images, source.preprocessing, max_batch=max_batch_of(source.graph))
        if job.check:
            require_different(sample)
    with staging(output.parent) as stage:
        graph = prepare(job, source, backend, sample, stage, progress)
        checked = _check(job, source, graph, sample, profiles, progress)
        spec = replace(spec, precision=graph.dtype)

        def build(written: Compilable) -> BuildResult:
            to_build, to = replace(spec, model=written.path), stage / output.name
            return _compile(job, written, to_build, backend, to, progress)

        against = AttentionGate(
            checked.reference, GATES[graph.dtype], source.input_format, source.fixed_batch
        )
        first = () if job.allow_unfused else first_bf16(graph, targets, job.bf16_attention)
        result, sums = settle(graph, first, build, against, targets, progress)
        manifest = replace(
            with_sums(to_manifest(job, source, graph, sample, checked.record, result), sums),
            profiles=profiles,
            golden=checked.golden,
        )
        with progress.step("run the engine, where a GPU is"):
            engine = execute(result.output, manifest, checked.reference, source.input_format)
        manifest = replace(
            manifest,
            engine=engine,
            seconds=round(time.monotonic() - started, 3),
            peak_rss_bytes=max(peak_rss(), result.peak_rss),
        )
        publish(result.output, output, seal(manifest), force=job.force)
    return output, manifest


def _require_outputs(job: TrtJob, output: Path) -> None:
    read = [job.model, manifest_path(job.model)]
    written = [output, manifest_path(output)]
    if job.timing_cache is not None:
        if same_file(job.timing_cache, job.model):  # what is no cache is replaced by one
            raise SpecError(f"--timing-cache {job.timing_cache} is the graph; name another file")
        read.append(job.timing_cache)
    if job.log is not None and (job.log.is_file() or not job.log.exists()):  # no terminal, no pipe
        written.append(job.log)
    require_writable(written, force=job.force, sources=read)


def _profiles(job: TrtJob, source: GraphFile) -> tuple[BatchRange, ...]:
    """Take the batch ranges asked for, or the graph's own."""
    profiles = job.profiles or (source.batch,)
    for profile in profiles:
        fixed = source.batch.is_static and profile != source.batch
        if fixed:
            raise SpecError(
                f"--batch {profile}: the graph has a fixed batch of {source.batch.max}; "
                f"export it again with --batch {profile}"
            )
    return profiles


def _check(
    job: TrtJob,
    source: GraphFile,
    graph: Compilable,
    sample: Sample,
    profiles: tuple[BatchRange, ...],
    progress: Progress,
) -> Checked:
    """Compare the typed graph with the graph that was given, at each profile's sizes."""
    if not job.check:
        return Checked(None, None, _golden_of(source))
    with progress.step("run the given graph"):
        reference, recorded = _run_given(source, sample, graph.path.parent)
    with progress.step("measure what the precision costs"):
        reference = _with_limit(source, graph, reference, graph.path.parent)
    max_batch = sample.max_batch
    every = {min(size, max(p.min, max_batch)) for p in profiles for size in (p.min, p.opt, p.max)}
    sizes = tuple(sorted(every))
    apart = not graph.mixing and len(profiles) == 1
    if apart:
        sizes = sizes_without_largest(sizes, len(sample))
    with (
        progress.step("compare the typed graph"),
        cpu_runner(graph.path, graph.dtype, graph.path.parent) as runner,
    ):
        gate = GATES[graph.dtype]
        found = evaluate(runner, reference, source.input_format, sizes, gate)
        record = found.require(f"the {graph.dtype} graph")
        record = replace(record, images_apart=apart)
        if recorded.output in record.limits:
            least = record.limits[recorded.output]["image"] or 0.0
            recorded = golden.with_limit(
                recorded, runner, source.preprocessing, source.input_format, least
            )
    return Checked(record, reference, recorded)


def _run_given(source: GraphFile, sample: Sample, stage: Path) -> tuple[Reference, GoldenRecord]:
    """Run the graph that was given; its session is closed before the next one opens.

    The run that measured what overflows gives no reference: that graph had been rewritten by then
    (opset, form of attention), and what rewriting breaks is to be found here. One run for both
    would save a third of the two.
    """
    with cpu_runner(source.path, source.dtype, stage) as runner:
        runner.name = f"{source.path.name} in {runner.name}"
        source.require_golden(runner)
        reference = run_reference(runner, sample, source.input_format, fixed=source.fixed_batch)
        reference = reference.require_finite()
        source.require_apart(runner, sample)
        return reference, _golden_of(source) or golden.record(
            runner, runner.name, source.preprocessing, source.input_format, sample.max_batch
        )


def _golden_of(source: GraphFile) -> GoldenRecord | None:
    """Give the graph's golden result; None where its input is made by another preprocessing."""
    manifest = source.manifest
    if manifest is None or manifest.preprocessing is None:
        return None
    same = source.preprocessing.normalises_as(manifest.preprocessing)
    return manifest.golden if same or source.input_format is InputFormat.UINT8 else None


def _targets(spec: BuildSpec, backend: Backend) -> tuple[ComputeCapability, ...]:
    """Name the GPU generations that are compiled for; none where it is all from Ampere on."""
    if backend.row.targets_capabilities:
        return spec.capabilities
    driver = find_driver()
    return () if isinstance(driver, NoDriver) else (driver.devices[0].capability,)


def _with_limit(
    source: GraphFile, graph: Compilable, reference: Reference, stage: Path
) -> Reference:
    """Measure what the typed graph's errors may be, and the engine's after it.

    The file is read again: what was rewritten since is what the limit is for.
    """
    try:
        given = Artifact.open(source.path, is_graph=True).graph
        assert given is not None  # it is an ONNX file
        if source.dtype is not Dtype.FP32:
            runner = open_widened(given, stage)
        elif graph.dtype is Dtype.FP32:
            with open_exact(given, stage) as exact:
                return measure_rounding(
                    reference, exact, EXACT, source.input_format, fixed=source.fixed_batch,
                    joins=graph.mixing,
                )  # fmt: skip
        else:
            runner = open_rounded(given, graph.dtype, reference.sample, source.input_format, stage)
    except GraphError as error:  # a graph of another tool that only simplifying makes plain
        return replace(reference, unmeasured=str(error))
    with runner:
        taken = InputFormat.of(runner.inputs[0].dtype)  # widened, a float16 input is float32
        return add_baseline(
            reference, runner, taken, margin=ROUNDED_MARGIN, fixed=source.fixed_batch
        )


def _compile(
    job: TrtJob,
    graph: Compilable,
    spec: BuildSpec,
    backend: Backend,
    output: Path,
    progress: Progress,
) -> BuildResult:
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
            quantised=graph.quantised,
            asked=graph.asked if graph.dtype is not Dtype.FP32 else {},
        )
    return result


def _spec(job: TrtJob, profiles: tuple[BatchRange, ...], backend: Backend) -> BuildSpec:
    """Describe what to compile, as far as it is known before the graph is typed."""
    shared = [field.name for field in fields(BuildSpec) if hasattr(job, field.name)]
    asked: dict[str, Any] = {name: getattr(job, name) for name in shared}
    asked |= {"profiles": profiles}
    asked |= {"timing_cache": job.timing_cache or _default_timing_cache(backend)}
    return BuildSpec(**asked)


def _default_timing_cache(backend: Backend) -> Path | None:
    """Name the user's cache for this TensorRT and GPU; None where the backend keeps no timings."""
    driver = find_driver()
    if isinstance(driver, NoDriver) or "timing_cache" in backend.row.ignored:
        return None
    device = driver.devices[0]
    return compile.default_path(backend.version, device.name, device.capability)
