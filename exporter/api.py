"""One function for each command, for Python: ``import msn_export; msn_export.export(...)``.

What is a path or a choice may be given as text. The options of a function are the fields of its
job, which ``help`` lists; an error names them, and none of the command line's flags.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, fields
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msn_export.calibration.job import CalibrateJob
from msn_export.commands.fit_job import FitJob
from msn_export.commands.hub_job import HubJob
from msn_export.commands.jobs import (
    BenchJob,
    DriftJob,
    EvaluateJob,
    OnnxJob,
    ReportJob,
    SearchJob,
    TritonJob,
    TrtJob,
    ValidateJob,
)
from msn_export.embedding.job import EmbedJob
from msn_export.errors import MsnExportError, SpecError
from msn_export.models.checkpoint import in_memory
from msn_export.options import Opt, opts_of, value_of
from msn_export.progress import SILENT, Progress
from msn_export.runtime.opening import open_runner as load
from msn_export.schema import Result, annotated_hints

if TYPE_CHECKING:
    from msn_export.benchmark.results import Bench
    from msn_export.commands.doctor import Diagnosis
    from msn_export.commands.evaluate import Evaluated
    from msn_export.commands.hub import HubFolder
    from msn_export.commands.search import Searched
    from msn_export.commands.triton import Written
    from msn_export.compare.drift import Drift
    from msn_export.compare.inspection import Inspection
    from msn_export.compare.sides import Validation
    from msn_export.embedding.job import Embedded
    from msn_export.manifest import Manifest
    from msn_export.reporting.gather import Page

__all__ = [
    "BenchJob", "CalibrateJob", "DriftJob", "EmbedJob", "EvaluateJob", "Exported", "FitJob",
    "HubJob", "OnnxJob", "ReportJob", "SearchJob", "TritonJob", "TrtJob", "ValidateJob", "bench",
    "calibrate", "compile", "doctor", "drift", "embed", "evaluate", "export", "fit", "hub",
    "inspect", "load", "report", "search", "triton", "validate",
]  # fmt: skip
Name = str | os.PathLike[str]
# fields that no caller gives
_ITS_OWN = ("command", "bf16_attention", "stages", "classifier", "pictures")
_COMMAND = re.compile(r"(msn-export [a-z]+ [^;,]*)")
_FLAG = re.compile(r"(?<![\w-])(?:--[A-Za-z][a-z0-9-]*|-o)(?![\w-])")


@dataclass(frozen=True, repr=False)
class Exported(Result):
    """A file that was written, and what is known of it; unpacks as ``path, manifest``.

    ``manifest`` is what lies beside the file, as ``<path>.json``.
    """

    path: Path
    manifest: Manifest

    def __iter__(self) -> Iterator[Any]:
        return iter((self.path, self.manifest))

    def summary(self) -> dict[str, Any]:
        """Give what a person looks at first."""
        manifest, check = self.manifest, self.manifest.check
        attention = manifest.attention
        found: dict[str, Any] = {
            "path": str(self.path),
            "dtype": str(manifest.dtype),
            "fused": f"{attention.fused} of {attention.expected}",
            "check": "not run",
        }
        if check is not None:
            found["check"] = "passed" if check.passed else "failed"
            found |= {"images": check.images, "relative": check.relative}
        if manifest.fit is not None and manifest.fit.accuracy is not None:
            found["accuracy"] = manifest.fit.accuracy.top1
        return found


def export(
    checkpoint: Any,
    output: Name | None = None,
    *,
    progress: bool | Progress = False,
    **options: Any,
) -> Exported:
    """Export a checkpoint to a checked ONNX graph.

    Args:
        checkpoint: a hub id, a folder, a weights file, ``random:VARIANT[:SEED]``, or a model in
            memory: transformers' ViTMSNModel or ViTMSNForImageClassification, or a ``VitMsn``.
        output: the .onnx file to write; by default named after the checkpoint.
        progress: show the steps on stderr, or to an object with the methods of ``Progress``.
        options: the other fields of ``OnnxJob``.

    Returns:
        The file, and its manifest, whose ``check`` has the agreement with the checkpoint.

    Raises:
        MsnExportError: nothing was written; the message says why.
    """
    with _job(OnnxJob, progress, options, checkpoint=checkpoint, output=output) as (job, steps):
        job.validate_paths()
        from msn_export.commands.onnx import run_onnx

        return Exported(*run_onnx(job, steps))


def fit(
    checkpoint: Any,
    labelled: Name,
    output: Name | None = None,
    *,
    progress: bool | Progress = False,
    **options: Any,
) -> Exported:
    """Fit a classifier on a checkpoint's features, and export both as one checked ONNX graph.

    Args:
        checkpoint: as of ``export``.
        labelled: a folder with a subfolder for each class, or a .csv or .parquet with the columns
            path and label.
        output: the .onnx file to write; ``classifier.onnx`` by default.
        progress: as of ``export``.
        options: the other fields of ``FitJob``.

    Returns:
        The file, and its manifest, whose ``fit`` has the accuracy.

    Raises:
        MsnExportError: nothing was written; the message says why.
    """
    given = {"checkpoint": checkpoint, "labelled": labelled, "output": output}
    with _job(FitJob, progress, options, **given) as (job, steps):
        job.validate_paths()
        from msn_export.commands.fit import run_fit

        return Exported(*run_fit(job, steps))


def compile(
    model: Name, output: Name | None = None, *, progress: bool | Progress = False, **options: Any
) -> Exported:
    """Compile an ONNX graph into a TensorRT engine.

    Args:
        model: the .onnx file, with its manifest beside it if it is ours.
        output: the .engine file to write; by default named after the graph.
        progress: as of ``export``.
        options: the other fields of ``TrtJob``.

    Returns:
        The engine, and its manifest, whose ``engine`` has the kernels and what ran of it.

    Raises:
        MsnExportError: nothing was written; the message says why.
    """
    with _job(TrtJob, progress, options, model=model, output=output) as (job, steps):
        from msn_export.commands.trt import run_trt

        return Exported(*run_trt(job, steps))


def calibrate(
    model: Name,
    dtype: str,
    images: Name,
    output: Name | None = None,
    *,
    progress: bool | Progress = False,
    **options: Any,
) -> Exported:
    """Quantise an fp32 ONNX graph to 8 bits, with ranges taken on images.

    Args:
        model: the .onnx file.
        dtype: ``int8`` or ``fp8``.
        images: a folder of pictures like those to come.
        output: the .onnx file to write; by default named after the graph.
        progress: as of ``export``.
        options: the other fields of ``CalibrateJob``.

    Returns:
        The graph, and its manifest, whose ``quantization`` has the cost and the gain.

    Raises:
        MsnExportError: nothing was written; the message says why.
    """
    given = {"model": model, "dtype": dtype, "images": images, "output": output}
    with _job(CalibrateJob, progress, options, **given) as (job, steps):
        from msn_export.commands.calibrate import run_calibrate

        return Exported(*run_calibrate(job, steps))


def validate(
    reference: Any, candidate: Any, *, progress: bool | Progress = False, **options: Any
) -> Validation:
    """Compare a candidate with its reference on the same images.

    Args:
        reference: a checkpoint, a model in memory, an .onnx file or an engine.
        candidate: the same.
        progress: as of ``export``.
        options: the other fields of ``ValidateJob``.

    Returns:
        The verdict: ``passed``, and ``reasons`` where it is not.

    Raises:
        MsnExportError: nothing could be compared; the message says why.
    """
    with _job(ValidateJob, progress, options, reference=reference, candidate=candidate) as (
        job,
        steps,
    ):
        from msn_export.commands.validate import run_validate

        return run_validate(job, steps)


def drift(
    reference: Any, candidate: Any, *, progress: bool | Progress = False, **options: Any
) -> Drift:
    """Compare a candidate with its reference block by block.

    Args:
        reference: as of ``validate``.
        candidate: the same.
        progress: as of ``export``.
        options: the other fields of ``DriftJob``.

    Returns:
        Every stage compared; ``parted`` is the first that does not do what the reference's does.

    Raises:
        MsnExportError: nothing could be compared; the message says why.
    """
    with _job(DriftJob, progress, options, reference=reference, candidate=candidate) as (
        job,
        steps,
    ):
        from msn_export.commands.drift import run_drift

        return run_drift(job, steps)


def report(
    *artifacts: Name,
    output: Name = "report.html",
    progress: bool | Progress = False,
    **options: Any,
) -> Page:
    """Write one page of all that is known of artifacts and was measured.

    Args:
        artifacts: files, or checkpoints; the first is the others' reference.
        output: the page.
        progress: as of ``export``.
        options: the other fields of ``ReportJob``.

    Returns:
        What the page shows.

    Raises:
        MsnExportError: nothing was written; the message says why.
    """
    named = tuple(os.fspath(one) for one in artifacts)
    with _job(ReportJob, progress, options, artifacts=named, output=output) as (job, steps):
        from msn_export.commands.report import run_report

        return run_report(job, steps)


def bench(*artifacts: Name, progress: bool | Progress = False, **options: Any) -> Bench:
    """Time artifacts beside the PyTorch model they came from.

    Args:
        artifacts: .onnx files and engines.
        progress: as of ``export``.
        options: the other fields of ``BenchJob``.

    Returns:
        ``timings``: milliseconds of each contender at each batch, with quartiles and ratios.

    Raises:
        MsnExportError: nothing could be timed; the message says why.
    """
    with _job(BenchJob, progress, options, artifacts=tuple(map(Path, artifacts))) as (job, steps):
        from msn_export.commands.bench import run_bench

        return run_bench(job, steps)


def embed(
    model: Name, images: Name, output: Name, *, progress: bool | Progress = False, **options: Any
) -> Embedded:
    """Run a folder of pictures through a model, a row each.

    Args:
        model: an .onnx file or an engine.
        images: the folder; with ``ray`` it may be the URI of a bucket.
        output: the .npy, .parquet or .usearch file to write.
        progress: as of ``export``.
        options: the other fields of ``EmbedJob``.

    Returns:
        Where the rows are, their ``shape`` [images, dim], and what was skipped.

    Raises:
        MsnExportError: the message says why, and what of the rows is kept for ``resume=True``.
    """
    folder = images if isinstance(images, str) and "://" in images else Path(images)
    with _job(EmbedJob, progress, options, model=model, images=folder, output=output) as (
        job,
        steps,
    ):
        from msn_export.commands.embed import run_embed

        return run_embed(job, steps)


def evaluate(
    model: Any, labelled: Name, *, progress: bool | Progress = False, **options: Any
) -> Evaluated:
    """Count how often a model is right on labelled pictures.

    Args:
        model: a checkpoint, a model in memory, an .onnx file or an engine.
        labelled: a folder with a subfolder for each class, or a .csv or .parquet with the columns
            path and label.
        progress: as of ``export``.
        options: the other fields of ``EvaluateJob``.

    Returns:
        Counts and shares of top-1, top-5 and neighbours, with 95 % intervals, and the confusion.

    Raises:
        MsnExportError: nothing could be judged; the message says why.
    """
    with _job(EvaluateJob, progress, options, model=model, labelled=labelled) as (job, steps):
        from msn_export.commands.evaluate import run_evaluate

        return run_evaluate(job, steps)


def search(
    index: Name, *pictures: Name, progress: bool | Progress = False, **options: Any
) -> Searched:
    """Find the pictures of an index that are nearest to others.

    Args:
        index: a .usearch file that ``embed`` wrote, its .parquet and .json beside it.
        pictures: files.
        progress: as of ``export``.
        options: the other fields of ``SearchJob``.

    Returns:
        For each picture its neighbours, the nearest first, with their cosine.

    Raises:
        MsnExportError: nothing could be searched; the message says why.
    """
    given = tuple(map(Path, pictures))
    with _job(SearchJob, progress, options, index=index, queries=given) as (job, steps):
        from msn_export.commands.search import run_search

        return run_search(job, steps)


def triton(
    *artifacts: Name, output: Name, progress: bool | Progress = False, **options: Any
) -> Written:
    """Write a model into a Triton repository.

    Args:
        artifacts: an .onnx file, or engines for several GPUs.
        output: the repository's folder.
        progress: as of ``export``.
        options: the other fields of ``TritonJob``.

    Returns:
        The models in the repository.

    Raises:
        MsnExportError: nothing was written; the message says why.
    """
    paths = tuple(map(Path, artifacts))
    with _job(TritonJob, progress, options, artifacts=paths, output=output) as (job, steps):
        from msn_export.commands.triton import run_triton

        return run_triton(job, steps)


def hub(
    checkpoint: Any, output: Name, *, progress: bool | Progress = False, **options: Any
) -> HubFolder:
    """Write a checkpoint as a folder that optimum and transformers.js load unchanged.

    Args:
        checkpoint: as of ``export``, or an .onnx file with its manifest.
        output: the folder to write.
        progress: as of ``export``.
        options: the other fields of ``HubJob``.

    Returns:
        The graphs of the folder with their checks, and where it was uploaded.

    Raises:
        MsnExportError: nothing was written, or what was written was not uploaded; the message says
            why.
    """
    with _job(HubJob, progress, options, checkpoint=checkpoint, output=output) as (job, steps):
        from msn_export.commands.hub import run_hub

        return run_hub(job, steps)


def inspect(artifact: Name, *, providers: Sequence[str] = ()) -> Inspection:
    """Read what an engine, an ONNX file or a manifest is made of; no GPU is needed.

    Args:
        artifact: the file.
        providers: ``["openvino"]`` compiles a graph there, and reads back what it computes in.

    Returns:
        What the file says, and what was counted in it.

    Raises:
        MsnExportError: it cannot be read; the message says why.
    """
    from msn_export.compare.inspection import inspect as inspect_file

    with _naming_arguments({}):
        return inspect_file(Path(artifact), providers)


def doctor(*, progress: bool | Progress = False) -> Diagnosis:
    """Examine what this machine can export, build and run.

    Returns:
        What was found, and what to install for the rest.

    Raises:
        MissingPackageError: msn-export runs from a folder and was never installed.
    """
    from msn_export.cli import main
    from msn_export.commands.doctor import run_doctor

    with _naming_arguments({}), _shown(progress) as steps:
        return run_doctor(main.commands, steps)


@contextmanager
def _job(
    kind: Any, progress: bool | Progress, options: Mapping[str, Any], **given: Any
) -> Iterator[tuple[Any, Progress]]:
    """Make a job of what a caller gave; errors within the context name its arguments."""
    hints, opts = annotated_hints(kind), opts_of(kind)
    open_to = [name for name in hints if name not in _ITS_OWN]
    with ExitStack() as models, _naming_arguments(opts):
        values = {}
        for name, value in {**given, **options}.items():
            if name not in open_to:
                raise SpecError(f"{name!r} is no argument; expected some of {', '.join(open_to)}")
            if name in given and value is None:
                continue
            if hasattr(value, "state_dict"):
                values[name] = models.enter_context(in_memory(value))
                continue
            if name in {"checkpoint", "reference", "candidate"} and isinstance(value, Path):
                values[name] = str(value)
                continue
            try:
                values[name] = value_of(hints[name], opts.get(name, Opt()), value)
            except SpecError as error:
                is_sentence = str(error).startswith(("is ", repr(value)))
                raise SpecError(f"{name}{' ' if is_sentence else ': '}{error}") from None
        with _shown(progress) as steps:
            yield kind(**values), steps


@contextmanager
def _naming_arguments(opts: Mapping[str, Opt]) -> Iterator[None]:
    """Let an error's message name arguments where the command line's names flags."""
    try:
        yield
    except MsnExportError as error:
        parts = _COMMAND.split(re.sub(r"\b[A-Z]\w+Job\.", "", str(error)))
        words = _arguments(opts)
        parts[::2] = [_FLAG.sub(lambda flag: _word(flag[0], words), part) for part in parts[::2]]
        error.args = ("".join(parts),)
        raise


def _arguments(opts: Mapping[str, Opt]) -> dict[str, str]:
    """Give for each flag of a job's options the argument that is the same."""
    words = {}
    for name, opt in opts.items():
        for flag in opt.flag.split():
            words[flag] = name
        for key in opt.each:
            flag = f"--{key.replace('_', '-')}"
            words[flag] = f"{name}={{{key!r}: …}}" if name == "numbers" else f"{name}={key!r}"
    return words


def _word(flag: str, words: Mapping[str, str]) -> str:
    if flag in words:
        return words[flag]
    if flag.startswith("--no-"):
        return f"{flag[5:].replace('-', '_')}=False"
    return {"-o": "output", "--force": "force=True"}.get(flag, flag[2:].replace("-", "_"))


@contextmanager
def _shown(progress: bool | Progress) -> Iterator[Progress]:
    """Show steps on stderr, nowhere, or where the caller wants them."""
    if progress is not True:
        yield progress or SILENT
        return
    from msn_export.cli.console import Console

    with Console(as_json=False).progress() as steps:
        yield steps


def _describe(function: Callable[..., Any], job: Any) -> None:
    """Give a function its job's fields as keyword arguments, in its signature and its help."""
    shown = signature(function)
    own = [p for p in shown.parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
    taken = {parameter.name for parameter in own} | set(_ITS_OWN)
    hints, opts = annotated_hints(job), opts_of(job)
    lines = []
    for field in fields(job):
        if field.name in taken:
            continue
        default = field.default if field.default is not MISSING else Parameter.empty
        own.append(
            Parameter(
                field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
            )
        )
        text = opts[field.name].help if field.name in opts else None
        lines.append(f"    {field.name}: {text or 'as the command line has it.'}")
    function.__signature__ = shown.replace(parameters=own)  # type: ignore[attr-defined]
    options = "\n".join(["Options:", *lines])
    function.__doc__ = f"{function.__doc__}\n{options}\n"


for _function, _kind in (
    (export, OnnxJob),
    (fit, FitJob),
    (compile, TrtJob),
    (calibrate, CalibrateJob),
    (validate, ValidateJob),
    (drift, DriftJob),
    (report, ReportJob),
    (bench, BenchJob),
    (embed, EmbedJob),
    (evaluate, EvaluateJob),
    (search, SearchJob),
    (triton, TritonJob),
    (hub, HubJob),
):
    _describe(_function, _kind)
