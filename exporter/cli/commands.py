"""The commands: words to jobs, results to tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msn_export.cli.options import FILE, IMAGES, JobCommand, command_line, json_option

if TYPE_CHECKING:
    from msn_export.calibration.job import CalibrateJob
    from msn_export.cli.console import Console
    from msn_export.commands.doctor import Diagnosis, GraphSupport
    from msn_export.embedding.job import Embedded


@click.command(cls=JobCommand, job="msn_export.commands.jobs:OnnxJob")
@click.argument("checkpoint")
@json_option
def onnx(as_json: bool, **options: Any) -> None:
    """Export CHECKPOINT to a checked ONNX graph.

    CHECKPOINT is a hub id, a Hugging Face folder, a weights file, or random:VARIANT[:SEED].
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_artifact
    from msn_export.commands.jobs import OnnxJob

    console = Console(as_json=as_json)
    job = OnnxJob(command=command_line(), **options)
    job.validate_paths()
    from msn_export.commands.onnx import run_onnx  # torch: seconds, which no mistake is to wait for

    with console.progress() as progress:
        output, manifest = run_onnx(job, progress)
    show_artifact(console, output, manifest)


@click.command(cls=JobCommand, job="msn_export.commands.fit_job:FitJob")
@click.argument("checkpoint")
@click.argument("labelled", type=IMAGES)
@json_option
def fit(as_json: bool, **options: Any) -> None:
    """Fit a classifier on CHECKPOINT's features of LABELLED, as one checked ONNX graph.

    The backbone stays as it is: logistic regression on its [CLS]. LABELLED is a folder with a
    subfolder for each class, or a .csv or .parquet with the columns path and label.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_fit
    from msn_export.commands.fit_job import FitJob

    console = Console(as_json=as_json)
    job = FitJob(command=command_line(), **options)
    job.validate_paths()
    from msn_export.commands.fit import run_fit  # torch: seconds, which no mistake is to wait for

    with console.progress() as progress:
        output, manifest = run_fit(job, progress)
    show_fit(console, output, manifest)


@click.command(cls=JobCommand, job="msn_export.commands.jobs:TrtJob")
@click.argument("model", type=FILE)
@json_option
def trt(as_json: bool, **options: Any) -> None:
    """Compile the ONNX graph MODEL into a TensorRT engine."""
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_artifact
    from msn_export.commands.trt import TrtJob, run_trt

    console = Console(as_json=as_json)
    job = TrtJob(command=command_line(), **options)
    with console.progress() as progress:
        output, manifest = run_trt(job, progress)
    show_artifact(console, output, manifest)


@click.command(cls=JobCommand, job="msn_export.calibration.job:CalibrateJob")
@click.argument("model", type=FILE)
@json_option
def calibrate(as_json: bool, **options: Any) -> None:
    """Quantise the fp32 ONNX graph MODEL to int8 or fp8, with ranges taken on images."""
    if "dtype" not in options:
        raise click.UsageError("give --int8 or --fp8")
    from msn_export.calibration.job import CalibrateJob

    job = CalibrateJob(command=command_line(), **options)
    _require_consistent(job)
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_artifact
    from msn_export.commands.calibrate import run_calibrate

    console = Console(as_json=as_json)
    with console.progress() as progress:
        output, manifest = run_calibrate(job, progress)
    show_artifact(console, output, manifest)


def _require_consistent(job: CalibrateJob) -> None:
    if job.dtype == "fp8" and job.observer == "entropy":
        raise click.BadParameter("fp8 has no even steps to compare with", param_hint="--observer")
    if job.dtype == "fp8" and job.base == "fp32":
        raise click.BadParameter(
            "fp32 is for onnxruntime, which multiplies no fp8 on a CPU; use fp16 or bf16",
            param_hint="--base",
        )
    if job.capability is not None and not job.compile:
        raise click.UsageError("--no-compile leaves nothing to compile for --compute-capability")


@click.command(cls=JobCommand, job="msn_export.commands.jobs:ValidateJob")
@click.argument("reference")
@click.argument("candidate")
@json_option
@click.pass_context
def validate(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Compare CANDIDATE with REFERENCE on the same images; the exit code is the verdict.

    Each is a checkpoint, an .onnx file or an engine with its manifest.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_validation
    from msn_export.commands.validate import ValidateJob, run_validate

    console = Console(as_json=as_json)
    with console.progress() as progress:
        validation = run_validate(ValidateJob(**options), progress)
    show_validation(console, validation)
    ctx.exit(0 if validation.passed else 1)


@click.command(cls=JobCommand, job="msn_export.commands.jobs:DriftJob")
@click.argument("reference")
@click.argument("candidate")
@json_option
@click.pass_context
def drift(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Compare CANDIDATE with REFERENCE block by block: where do they part?

    Each is a checkpoint, an .onnx file, or an engine where its GPU is: its graph, beside it, is
    compiled once more with the blocks as outputs. Each block of a candidate that is no engine is
    given the reference's own stream; its error is judged beside what its precision costs there.
    Exit code 0: no block parts.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_drift
    from msn_export.commands.drift import DriftJob, run_drift

    console = Console(as_json=as_json)
    with console.progress() as progress:
        found = run_drift(DriftJob(**options), progress)
    show_drift(console, found)
    ctx.exit(0 if found.passed else 1)


@click.command(cls=JobCommand, job="msn_export.commands.jobs:ReportJob")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT…")
@click.pass_context
def report(ctx: click.Context, /, **options: Any) -> None:
    """Write one page of all that is known of ARTIFACT… and was measured.

    With --images every artifact that runs here is compared with the first, block by block too.
    Exit code 1 where one does not agree; the page is written all the same.
    """
    from rich.markup import escape

    from msn_export.cli.console import Console
    from msn_export.commands.report import ReportJob, run_report

    console = Console(as_json=False)
    job = ReportJob(command=command_line(), **options)
    with console.progress() as progress:
        page = run_report(job, progress)
    console.print(escape(f"{job.output}: {page.headline}"))
    if job.markdown is not None:
        console.print(escape(str(job.markdown)))
    ctx.exit(1 if page.state == "failed" else 0)


@click.command()
@click.argument(
    "artifacts",
    nargs=-1,
    required=True,
    metavar="ARTIFACT [OTHER]",
    type=click.Path(dir_okay=False, path_type=Path),
)
@json_option
@click.pass_context
def inspect(ctx: click.Context, /, artifacts: tuple[Path, ...], as_json: bool) -> None:
    """Show what an engine, an ONNX file or a manifest is made of; two of them side by side.

    Exit code 1 where a manifest is damaged or of another file; the file is shown all the same.
    """
    if len(artifacts) > 2:
        raise click.UsageError("give one artifact, or two to compare")
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_inspections
    from msn_export.compare.inspection import inspect as inspect_artifact

    found = [inspect_artifact(path) for path in artifacts]
    show_inspections(Console(as_json=as_json), found)
    ctx.exit(1 if any(one.distrusted for one in found) else 0)


@click.command(cls=JobCommand, job="msn_export.commands.jobs:EvaluateJob")
@click.argument("model")
@click.argument("labelled", type=IMAGES)
@json_option
def evaluate(as_json: bool, **options: Any) -> None:
    """Count how often MODEL is right on the labelled pictures of LABELLED.

    MODEL is a checkpoint, an .onnx file or an engine. LABELLED is a folder with a subfolder for
    each class, or a .csv or .parquet with the columns path and label.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_evaluated
    from msn_export.commands.evaluate import EvaluateJob, run_evaluate

    console = Console(as_json=as_json)
    with console.progress() as progress:
        found = run_evaluate(EvaluateJob(command=command_line(), **options), progress)
    show_evaluated(console, found)


# Hugging Face's table of attention implementations for ViT-MSN: eager against SDPA, batch 1 to 8
PAPER = {"against": ("eager", "sdpa"), "batches": (1, 2, 4, 8)}


@click.command(cls=JobCommand, job="msn_export.commands.jobs:BenchJob")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT…", type=FILE)
@json_option
def bench(as_json: bool, **options: Any) -> None:
    """Time each ARTIFACT, an .onnx or .engine file, beside the PyTorch model it came from.

    Rounds are interleaved; agreement with the fp32 reference is measured beside each time.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_bench
    from msn_export.commands.bench import BenchJob, run_bench

    console = Console(as_json=as_json)
    if "preset" in options:
        options = {**PAPER, **options}
    if "batches" in options:
        options["batches"] = tuple(dict.fromkeys(options["batches"]))
    job = BenchJob(command=command_line(), **options)
    with console.progress() as progress:
        measured = run_bench(job, progress)
    show_bench(console, measured)


class PicturesParam(click.ParamType[Any]):
    """A folder that exists, or the URI of a bucket."""

    name = "folder or URI"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Leave a URI as it is: as a path it would lose a slash."""
        if isinstance(value, str) and "://" in value:
            return value
        return IMAGES.convert(value, param, ctx)


@click.command(cls=JobCommand, job="msn_export.embedding.job:EmbedJob")
@click.argument("model", type=FILE)
@click.argument("images", type=PicturesParam())
@json_option
def embed(as_json: bool, **options: Any) -> None:
    """Run the pictures of the folder IMAGES through MODEL, an .onnx or .engine file.

    With --ray, IMAGES may be s3://BUCKET/FOLDER or gs://BUCKET/FOLDER.

    Rows are in the order of the sorted paths. A picture that cannot be read is a row with an error.
    """
    from msn_export.cli.console import Console
    from msn_export.commands.embed import EmbedJob, run_embed

    console = Console(as_json=as_json)
    with console.progress() as progress:
        embedded = run_embed(EmbedJob(**options), progress)
    _show_embedded(console, embedded)


def _show_embedded(console: Console, embedded: Embedded) -> None:
    if console.as_json:
        console.print_json(embedded)
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(embedded.output), title_justify="left", show_header=False)
    shape = ", ".join(str(size) for size in embedded.shape)
    rows = [
        ("rows", f"{embedded.output_name} [{shape}] float32"),
        *((("scores", str(embedded.scores)),) if embedded.scores else ()),
        ("broken", f"{embedded.broken} of {embedded.images} pictures"),
        *(("", text) for text in embedded.errors),
        *(("skipped", f"{count} {reason}") for reason, count in embedded.skipped.items()),
        ("turned", _turned(embedded)),
        ("files", ", ".join(embedded.files)),
        ("runner", f"{embedded.runner}, batch {embedded.batch}"),
        *((("cluster", embedded.cluster),) if embedded.cluster else ()),
        ("preprocessing", str(embedded.preprocessing)),
        ("selftest", embedded.selftest),
        *(("note", note) for note in embedded.notes),
        ("took", _took(embedded)),
    ]
    for name, text in rows:
        table.add_row(name, escape(text))
    console.print(table)


def _turned(embedded: Embedded) -> str:
    if embedded.exif == "ignore":
        return "none: EXIF orientation is ignored"
    return f"{embedded.turned} of {embedded.images} pictures by their EXIF orientation"


def _took(embedded: Embedded) -> str:
    resumed = f", resumed at row {embedded.resumed_at}" if embedded.resumed_at else ""
    return (
        f"{embedded.seconds:.1f} s{resumed}, {embedded.images_per_second:.1f} images/s, "
        f"{embedded.workers} decoding; peak memory {embedded.peak_rss_bytes / 1e9:.2f} GB"
    )


@click.command(cls=JobCommand, job="msn_export.commands.jobs:TritonJob")
@click.argument(
    "artifacts",
    nargs=-1,
    metavar="[ARTIFACT]...",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "-o", "--output", type=click.Path(file_okay=False, path_type=Path), help="The repository."
)
@click.option(
    "--lint", "linted", type=click.Path(path_type=Path), help="Check a repository instead."
)
@json_option
def triton(
    artifacts: tuple[Path, ...],
    linted: Path | None,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Write ARTIFACT as a model of a Triton repository, or check one with --lint.

    ARTIFACT is an .onnx file, or one model's engines for several GPU generations.
    """
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_findings, show_written
    from msn_export.commands.triton import TritonJob, run_lint, run_triton

    console = Console(as_json=as_json)
    if linted is not None:
        if artifacts or output is not None:
            raise click.UsageError("--lint takes a repository alone, no ARTIFACT and no -o")
        findings = run_lint(linted, options.get("release"))
        show_findings(console, linted, findings)
        if any(finding.level == "wrong" for finding in findings):
            raise click.exceptions.Exit(1)
        return
    if not artifacts or output is None:
        raise click.UsageError("give ARTIFACT and -o REPO, or --lint REPO")
    job = TritonJob(artifacts, output, **options)
    if job.images is not None and not job.warmup:
        raise click.UsageError("--images is what --warmup runs; give both or neither")
    with console.progress() as progress:
        written = run_triton(job, progress)
    show_written(console, written)


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show what this machine can export, build and run, and what to install for the rest.

    Exit code 1 if something that is installed is broken.
    """
    from msn_export.cli.console import Console
    from msn_export.commands.doctor import run_doctor

    group = ctx.parent.command if ctx.parent is not None else None
    commands = group.list_commands(ctx) if isinstance(group, click.Group) else ()
    console = Console(as_json=as_json)
    with console.progress() as progress:
        diagnosis = run_doctor(commands, progress)
    if as_json:
        console.print_json(diagnosis)
    else:
        _show_machine(console, diagnosis)
    if not diagnosis.healthy:
        ctx.exit(1)


def _graphs(found: GraphSupport) -> str:
    """Name the graphs that an installed runtime does not load, by target and dtype."""
    if not found.refuses:
        return "every graph that is written here"
    needs = [f"{name} ({least or 'no version'})" for name, least in found.refuses.items()]
    return f"every graph but {', '.join(needs)}"


def _show_machine(console: Console, found: Diagnosis) -> None:
    from rich.markup import escape
    from rich.table import Table

    machine = found.machine
    about = Table(show_header=False)
    driver = f"driver {machine.driver or 'of unknown release'}, CUDA {machine.cuda}"
    for name, text in (
        ("msn-export", f"{found.product} in {found.location}"),
        ("python", f"{machine.python}, {found.interpreter}"),
        ("machine", f"{machine.cores} cores of {machine.cpu}, {machine.memory / 2**30:.0f} GiB"),
        ("system", machine.system),
        ("GPU", found.no_gpu or f"{'; '.join(machine.gpus)}; {driver}"),
    ):
        about.add_row(name, escape(text))
    console.print(about)
    packages = Table("package", "installed", "wanted", "for", "")
    colours = {"ok": "green", "missing": "dim", "broken": "red"}
    for package in found.packages:
        extras = ", ".join(extra or "everything" for extra in package.extras)
        state = f"[{colours[package.state]}]{package.state}[/] {escape(package.detail)}"
        packages.add_row(
            package.name, package.version or "-", package.range, escape(extras), state.strip()
        )
    console.print(packages)
    commands = Table("command", "can", "", "what it takes")
    for verdict in found.commands:
        works = "[green]yes[/]" if verdict.works else "[yellow]no[/]"
        commands.add_row(verdict.command, verdict.does, works, escape(verdict.mend))
    console.print(commands)
    for one in found.graphs:
        console.print(f"[bold]{one.client} {escape(one.version)}[/] loads {_graphs(one)}")
    for fault in found.faults:
        console.print(f"[red]broken[/] {escape(f'{fault.package}: {fault.what}')}")
        console.print(f"       {escape(fault.mend)}")
    if found.healthy:
        console.print("Nothing that is installed is broken.")
