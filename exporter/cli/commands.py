"""The commands: words to jobs, results to tables."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from msn_export.cli.options import (
    EXISTING,
    IMAGES,
    SOURCE,
    JobCommand,
    command_line,
    json_option,
    timeout_option,
)

if TYPE_CHECKING:
    from msn_export.calibration.job import CalibrateJob
    from msn_export.cli.console import Console
    from msn_export.commands.doctor import Diagnosis, GraphSupport


@click.command(cls=JobCommand, job="msn_export.commands.jobs:OnnxJob")
@click.argument("checkpoint", type=SOURCE)
@json_option
def onnx(as_json: bool, **options: Any) -> None:
    """Export CHECKPOINT to a checked ONNX graph.

    CHECKPOINT is a hub id, a Hugging Face folder, a weights file, or random:VARIANT[:SEED].

    \b
    Examples:
      msn-export onnx facebook/vit-msn-small --images pictures -o small.onnx
      msn-export onnx checkpoint/ --dtype fp16 --input uint8 -o small-fp16.onnx
    """
    from msn_export.cli.console import Console
    from msn_export.commands.jobs import OnnxJob

    console = Console(as_json=as_json)
    job = OnnxJob(command=command_line(), **options)
    job.validate_paths()
    with console.loading("torch"):  # seconds, which no mistake is to wait for
        from msn_export.cli.tables import show_artifact
        from msn_export.commands.onnx import run_onnx

    with console.progress() as progress:
        output, manifest = run_onnx(job, progress)
    show_artifact(console, output, manifest)


@click.command(cls=JobCommand, job="msn_export.commands.fit_job:FitJob")
@click.argument("checkpoint", type=SOURCE)
@click.argument("labelled", type=IMAGES)
@json_option
def fit(as_json: bool, **options: Any) -> None:
    """Fit a classifier on CHECKPOINT's features of LABELLED, as one checked ONNX graph.

    The backbone stays as it is: logistic regression on its [CLS]. LABELLED is a folder with a
    subfolder for each class, or a .csv or .parquet with the columns path and label.

    \b
    Examples:
      msn-export fit facebook/vit-msn-small flowers/ -o flowers.onnx
      msn-export fit facebook/vit-msn-small flowers/ --shots 5 --test held-out/
    """
    from msn_export.cli.console import Console
    from msn_export.commands.fit_job import FitJob

    console = Console(as_json=as_json)
    job = FitJob(command=command_line(), **options)
    job.validate_paths()
    with console.loading("torch"):  # seconds, which no mistake is to wait for
        from msn_export.cli.tables import show_fit
        from msn_export.commands.fit import run_fit

    with console.progress() as progress:
        output, manifest = run_fit(job, progress)
    show_fit(console, output, manifest)


@click.command(cls=JobCommand, job="msn_export.commands.jobs:TrtJob")
@click.argument("model", type=EXISTING)
@click.option("--int8", "quantised", is_flag=True, hidden=True)
@click.option("--fp8", "quantised", is_flag=True, hidden=True)
@click.option("--dtype", "typed", hidden=True)
@json_option
def trt(as_json: bool, quantised: bool, typed: str | None, **options: Any) -> None:
    """Compile the ONNX graph MODEL into a TensorRT engine.

    \b
    Examples:
      msn-export trt small.onnx --fp16 --images pictures
      msn-export trt small.onnx --fp16 --backend tensorrt-rtx --compute-capability 8.9
    """
    if typed is not None and typed.lower() not in {"int8", "fp8"}:
        raise click.UsageError("No such option '--dtype' of trt; use --fp32, --fp16 or --bf16")
    if quantised or typed is not None:
        raise click.UsageError(
            "8 bits take ranges: quantise the fp32 graph with msn-export calibrate --int8 or --fp8,"
            " and compile what that writes"
        )
    from msn_export.cli.console import Console

    console = Console(as_json=as_json)
    with console.loading("onnx"):
        from msn_export.cli.tables import show_artifact
        from msn_export.commands.trt import TrtJob, run_trt
    job = TrtJob(command=command_line(), **options)
    with console.progress() as progress:
        output, manifest = run_trt(job, progress)
    show_artifact(console, output, manifest)


@click.command(cls=JobCommand, job="msn_export.calibration.job:CalibrateJob")
@click.argument("model", type=EXISTING)
@timeout_option
@json_option
def calibrate(as_json: bool, **options: Any) -> None:
    """Quantise the fp32 ONNX graph MODEL to int8 or fp8, with ranges taken on images.

    \b
    Examples:
      msn-export calibrate small.onnx --int8 --images pictures -o small-int8.onnx
      msn-export calibrate small.onnx --fp8 --images pictures --labelled flowers/
    """
    if "dtype" not in options:
        raise click.UsageError("give --int8 or --fp8")
    from msn_export.calibration.job import CalibrateJob

    job = CalibrateJob(command=command_line(), **options)
    _require_consistent(job)
    from msn_export.cli.console import Console

    console = Console(as_json=as_json)
    with console.loading("onnx"):
        from msn_export.cli.tables import show_artifact
        from msn_export.commands.calibrate import run_calibrate
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
@click.argument("reference", type=SOURCE)
@click.argument("candidate", type=SOURCE)
@timeout_option
@json_option
@click.pass_context
def validate(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Compare CANDIDATE with REFERENCE on the same images; the exit code is the verdict.

    Each is a checkpoint, an .onnx file or an engine with its manifest.

    \b
    Examples:
      msn-export validate facebook/vit-msn-small small.engine --images pictures
      msn-export validate small.onnx small-int8.onnx --labelled flowers/
    """
    from msn_export.cli.console import Console

    console = Console(as_json=as_json)
    with console.loading("onnx"):
        from msn_export.cli.tables import show_validation
        from msn_export.commands.validate import ValidateJob, run_validate
    with console.progress() as progress:
        validation = run_validate(ValidateJob(**options), progress)
    show_validation(console, validation)
    ctx.exit(0 if validation.passed else 1)


@click.command(cls=JobCommand, job="msn_export.commands.jobs:DriftJob")
@click.argument("reference", type=SOURCE)
@click.argument("candidate", type=SOURCE)
@timeout_option
@json_option
@click.pass_context
def drift(ctx: click.Context, /, as_json: bool, **options: Any) -> None:
    """Compare CANDIDATE with REFERENCE block by block: where do they part?

    Each is a checkpoint, an .onnx file, or an engine where its GPU is: its graph, beside it, is
    compiled once more with the blocks as outputs. Each block of a candidate that is no engine is
    given the reference's own stream; its error is judged beside what its precision costs there.
    Exit code 0: no block parts.

    \b
    Examples:
      msn-export drift small.onnx small-fp16.onnx --images pictures
      msn-export drift facebook/vit-msn-small other.onnx --limit 4
    """
    from msn_export.cli.console import Console

    console = Console(as_json=as_json)
    with console.loading("onnx"):
        from msn_export.cli.tables import show_drift
        from msn_export.commands.drift import DriftJob, run_drift
    with console.progress() as progress:
        found = run_drift(DriftJob(**options), progress)
    show_drift(console, found)
    ctx.exit(0 if found.passed else 1)


@click.command(cls=JobCommand, job="msn_export.commands.jobs:ReportJob")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT…", type=SOURCE)
@timeout_option
@click.pass_context
def report(ctx: click.Context, /, **options: Any) -> None:
    """Write one page of all that is known of ARTIFACT… and was measured.

    With --images every artifact that runs here is compared with the first, block by block too.
    Exit code 1 where one does not agree; the page is written all the same.

    \b
    Examples:
      msn-export report small.onnx small.engine --images pictures
      msn-export report small.onnx small-int8.onnx --markdown README.md
    """
    from rich.markup import escape

    from msn_export.cli.console import Console

    console = Console(as_json=False)
    with console.loading("onnx"):
        from msn_export.commands.report import ReportJob, run_report
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
    type=EXISTING,
)
@click.option("--all", "whole", is_flag=True, help="Of two, show what is alike too.")
@click.option(
    "--providers",
    type=click.Choice(["openvino"]),
    help="Compile a graph there, and read back what its products run in.",
)
@json_option
@click.pass_context
def inspect(
    ctx: click.Context,
    /,
    artifacts: tuple[Path, ...],
    providers: str | None,
    as_json: bool,
    whole: bool,
) -> None:
    """Show what an engine, an ONNX file or a manifest is made of; of two, what differs.

    Exit code 1 where a manifest is damaged or of another file; the file is shown all the same.

    \b
    Examples:
      msn-export inspect small.engine
      msn-export inspect small.onnx small-fp16.onnx
    """
    if len(artifacts) > 2:
        raise click.UsageError("give one artifact, or two to compare")
    from msn_export.cli.console import Console
    from msn_export.cli.tables import show_inspections
    from msn_export.compare.inspection import inspect as inspect_artifact

    asked = [providers] if providers is not None else []
    found = [inspect_artifact(path, asked) for path in artifacts]
    show_inspections(Console(as_json=as_json), found, whole=whole)
    ctx.exit(1 if any(one.distrusted for one in found) else 0)


@click.command(cls=JobCommand, job="msn_export.commands.jobs:EvaluateJob")
@click.argument("model", type=SOURCE)
@click.argument("labelled", type=IMAGES)
@timeout_option
@json_option
def evaluate(as_json: bool, **options: Any) -> None:
    """Count how often MODEL is right on the labelled pictures of LABELLED.

    MODEL is a checkpoint, an .onnx file or an engine. LABELLED is a folder with a subfolder for
    each class, or a .csv or .parquet with the columns path and label.

    \b
    Examples:
      msn-export evaluate flowers.onnx held-out/ --report flowers.html
      msn-export evaluate facebook/vit-msn-small flowers/ --knn 5
    """
    from msn_export.cli.console import Console

    console = Console(as_json=as_json)
    with console.loading("onnxruntime"):
        from msn_export.cli.tables import show_evaluated
        from msn_export.commands.evaluate import EvaluateJob, run_evaluate
    with console.progress() as progress:
        found = run_evaluate(EvaluateJob(command=command_line(), **options), progress)
    show_evaluated(console, found)


@click.command(cls=JobCommand, job="msn_export.commands.jobs:SearchJob")
@click.argument("index", type=EXISTING)
@click.argument("queries", nargs=-1, required=True, metavar="PICTURE…", type=EXISTING)
@json_option
def search(as_json: bool, **options: Any) -> None:
    """Find the nearest pictures of each PICTURE in INDEX, a .usearch file that embed wrote.

    The pictures run through the model that the index was made with; another one is refused.

    \b
    Examples:
      msn-export search photographs.usearch query.jpg
      msn-export search photographs.usearch queries/*.jpg -k 5 -o page.html
    """
    from msn_export.cli.console import Console

    console = Console(as_json=as_json)
    with console.loading("onnxruntime"):
        from msn_export.cli.tables import show_searched
        from msn_export.commands.search import SearchJob, run_search
    with console.progress() as progress:
        found = run_search(SearchJob(command=command_line(), **options), progress)
    show_searched(console, found)


# Hugging Face's table of attention implementations for ViT-MSN: eager against SDPA, batch 1 to 8
PAPER = {"against": ("eager", "sdpa"), "batches": (1, 2, 4, 8)}


@click.command(cls=JobCommand, job="msn_export.commands.jobs:BenchJob")
@click.argument("artifacts", nargs=-1, required=True, metavar="ARTIFACT…", type=EXISTING)
@timeout_option
@json_option
def bench(as_json: bool, **options: Any) -> None:
    """Time each ARTIFACT, an .onnx or .engine file, beside the PyTorch model it came from.

    Rounds are interleaved; agreement with the fp32 reference is measured beside each time.

    \b
    Examples:
      msn-export bench small.onnx --batch 1 --batch 8 --report bench.html
      msn-export bench small.onnx small.engine --against sdpa,compile
    """
    from msn_export.cli.console import Console

    console = Console(as_json=as_json)
    with console.loading("onnx"):
        from msn_export.cli.tables import show_bench
        from msn_export.commands.bench import BenchJob, run_bench
    if "preset" in options:
        options = {**PAPER, **options}
    if "batches" in options:
        options["batches"] = tuple(dict.fromkeys(options["batches"]))
    job = BenchJob(command=command_line(), **options)
    with console.progress() as progress:
        measured = run_bench(job, progress)
    show_bench(console, measured)


class PicturesParam(click.ParamType[Any]):
    """A folder, a picture or a list that exists, a pattern, or the URI of a bucket."""

    name = "folder or URI"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Leave a URI as it is: as a path it would lose a slash; a pattern names no file."""
        if isinstance(value, str) and "://" in value:
            return value
        if any(sign in str(value) for sign in "*?[") and not Path(value).exists():
            return Path(value)
        return IMAGES.convert(value, param, ctx)


@click.command(cls=JobCommand, job="msn_export.embedding.job:EmbedJob")
@click.argument("model", type=EXISTING)
@click.argument("images", type=PicturesParam())
@timeout_option
@json_option
def embed(as_json: bool, **options: Any) -> None:
    """Run the pictures of IMAGES through MODEL, an .onnx or .engine file.

    IMAGES is a folder, a picture, a .csv, .parquet or .txt that lists pictures, or a pattern in
    quotes, as 'photographs/**/*.jpg'.

    With --ray, IMAGES may be s3://BUCKET/FOLDER or gs://BUCKET/FOLDER.

    Rows are in the order of the sorted paths. A picture that cannot be read is a row with an error.

    \b
    Examples:
      msn-export embed small.onnx pictures/ -o vectors.parquet
      msn-export embed small.engine pictures/ -o vectors.npy --batch 64
    """
    from msn_export.cli.console import Console

    console = Console(as_json=as_json)
    with console.loading("onnxruntime"):
        from msn_export.cli.tables import show_embedded
        from msn_export.commands.embed import EmbedJob, run_embed
    with console.progress() as progress:
        embedded = run_embed(EmbedJob(**options), progress)
    show_embedded(console, embedded)


@click.command(cls=JobCommand, job="msn_export.commands.jobs:TritonJob")
@click.argument(
    "artifacts",
    nargs=-1,
    metavar="[ARTIFACT]...",
    type=EXISTING,
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

    \b
    Examples:
      msn-export triton small.engine -o repository
      msn-export triton --lint repository --release 25.10
    """
    from msn_export.cli.console import Console

    console = Console(as_json=as_json)
    with console.loading("onnx"):
        from msn_export.cli.tables import show_findings, show_written
        from msn_export.commands.triton import TritonJob, run_lint, run_triton
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


@click.command(cls=JobCommand, job="msn_export.commands.hub_job:HubJob")
@click.argument("checkpoint")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The folder to write.",
)
@json_option
def hub(as_json: bool, **options: Any) -> None:
    """Write CHECKPOINT as a folder that optimum and transformers.js load unchanged.

    CHECKPOINT is as of 'msn-export onnx', or an .onnx file with its manifest, as 'msn-export fit'
    writes it. Every graph in the folder has passed its check.

    \b
    Examples:
      msn-export hub facebook/vit-msn-small -o vit-msn-small --images pictures
      msn-export hub flowers.onnx -o flowers --push me/flowers --private
    """
    from msn_export.cli.console import Console
    from msn_export.commands.hub_job import HubJob

    console = Console(as_json=as_json)
    job = HubJob(command=command_line(), **options)
    job.validate_paths()
    with console.loading("torch"):  # seconds, which no mistake is to wait for
        from msn_export.cli.tables import show_hub
        from msn_export.commands.hub import run_hub

    with console.progress() as progress:
        written = run_hub(job, progress)
    show_hub(console, written)


@click.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show what this machine can export, build and run, and what to install for the rest.

    Exit code 1 if something that is installed is broken.

    \b
    Examples:
      msn-export doctor
      msn-export doctor --json
    """
    from msn_export.cli.console import Console
    from msn_export.commands.doctor import run_doctor

    group = ctx.parent.command if ctx.parent is not None else None
    commands = group.list_commands(ctx) if isinstance(group, click.Group) else ()
    console = Console(as_json=as_json)
    with console.progress() as progress:
        diagnosis = run_doctor(commands, progress)
    _show(console, diagnosis)
    if not diagnosis.healthy:
        ctx.exit(1)


def _graphs(found: GraphSupport) -> str:
    """Name the graphs that an installed runtime does not load, by target and dtype."""
    from msn_export.version_table import NO_KERNEL

    if not found.refuses:
        return "every graph that is written here"
    others = {name: found.refuses[name] for name in found.refuses if name not in found.built_by_trt}
    needs = [f"{name} ({least or 'no version'})" for name, least in others.items()]
    if found.built_by_trt:
        built = ", ".join(found.built_by_trt)
        needs.append(f"{built} as they are ({NO_KERNEL}; msn-export trt builds them)")
    return f"every graph but {', '.join(needs)}"


def _show(console: Console, found: Diagnosis) -> None:
    """Print a diagnosis; no table of others is loaded, whose packages may be broken."""
    if console.as_json:
        console.print_json(found)
        return
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
