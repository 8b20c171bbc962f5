"""The command line: parse, build a job, run it, print. Heavy packages load inside a command."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from msn_export import __version__
from msn_export.errors import MsnExportError, SpecError
from msn_export.spec import (
    BatchRange,
    ComputeCapability,
    Dtype,
    Head,
    ImageSize,
    InputKind,
    Target,
    parse_bytes,
)

INSTALL = "pip install 'msn-export[export]'"


class Parsed(click.ParamType[Any]):
    """A value that a noun of ``spec`` reads from text."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the text, or name the option that is wrong."""
        if not isinstance(value, str):
            return value
        try:
            return self.parse(value)
        except (SpecError, ValueError) as error:
            self.fail(str(error), param, ctx)


BATCH = Parsed("N or MIN:OPT:MAX", BatchRange.parse)
SIZE = Parsed("N or HxW", ImageSize.parse)
MEMORY = Parsed("bytes, as in 4GiB", parse_bytes)
CAPABILITY = Parsed("M.m", ComputeCapability.parse)
FOLDER = click.Path(exists=True, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


def choice(kind: Any) -> click.Choice[str]:
    """Offer the values of an enumeration."""
    return click.Choice([member.value for member in kind])


class Commands(click.Group):
    """Turns our errors into one line and exit code 1, and an interrupt into 130."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        signal.signal(signal.SIGTERM, _interrupt)  # so that staging folders are removed
        try:
            return super().invoke(ctx)
        except MsnExportError as error:
            self._fail(ctx, " ".join(str(error).split()), 1)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("msn_export"):
                raise
            self._fail(ctx, f"package {error.name} is not installed; {INSTALL}", 1)
        except KeyboardInterrupt:
            self._fail(ctx, "interrupted; nothing was written", 130)

    def _fail(self, ctx: click.Context, message: str, code: int) -> None:
        if ctx.params.get("verbose"):
            raise  # noqa: PLE0704  called from an except clause: -v shows the traceback
        click.echo(f"error: {message}", err=True)
        ctx.exit(code)


def _interrupt(signum: int, frame: Any) -> None:  # noqa: ARG001  the signature of a handler
    raise KeyboardInterrupt


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="msn-export")
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error.")
def main(verbose: bool) -> None:
    """Take a ViT-MSN checkpoint to a proven ONNX graph and TensorRT engine."""


def artifact_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command that writes an artifact has."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
        click.option("--force", is_flag=True, help="Replace an existing output."),
        click.option(
            "--no-check",
            "check",
            is_flag=True,
            default=True,
            flag_value=False,
            help="Write without comparing; the manifest says so.",
        ),
        click.option(
            "--islands",
            default="measured",
            show_default=True,
            metavar="measured|none|FILE",
            help="fp16: which tensors stay fp32.",
        ),
        click.option("--images", type=FOLDER, help="Pictures to check on; without, seeded noise."),
    ):
        command = option(command)
    return command


@main.command()
@click.argument("checkpoint")
@click.option("-o", "--output", type=FILE, help="The .onnx file to write.")
@click.option("--variant", help="Published shape, where a weights file does not say.")
@click.option(
    "--head",
    "heads",
    type=choice(Head),
    multiple=True,
    help="Output; repeatable. Default: logits for a classifier, else cls.",
)
@click.option(
    "--input",
    "stem",
    type=choice(InputKind),
    default="float",
    show_default=True,
    help="Normalised planes, or bytes [b, h, w, 3].",
)
@click.option("--dtype", type=choice(Dtype), default="fp32", show_default=True)
@click.option("--batch", type=BATCH, default="1:8:32", show_default=True)
@click.option("--image-size", type=SIZE, help="Interpolate the position embedding to this size.")
@click.option(
    "--target",
    type=choice(Target),
    default="tensorrt",
    show_default=True,
    help="Form of attention and opset.",
)
@click.option(
    "--preprocess", type=click.Choice(["auto", "hf", "msn-eval"]), default="auto", show_default=True
)
@click.option("--no-simplify", "simplify", is_flag=True, default=True, flag_value=False)
@artifact_options
def onnx(checkpoint: str, **options: Any) -> None:
    """Export CHECKPOINT to a checked ONNX graph.

    CHECKPOINT is a hub id, a Hugging Face folder, a weights file, or random:VARIANT[:SEED].
    """
    from msn_export.console import Console
    from msn_export.run_onnx import OnnxJob, run_onnx

    as_json = options.pop("as_json")
    job = OnnxJob(
        checkpoint,
        command=_command_line(),
        heads=tuple(Head(head) for head in options.pop("heads")),
        stem=InputKind(options.pop("stem")),
        dtype=Dtype(options.pop("dtype")),
        target=Target(options.pop("target")),
        **options,
    )
    console = Console(as_json=as_json)
    with console.progress() as progress:
        output, manifest = run_onnx(job, progress)
    console.show(output, manifest)


@main.command()
@click.argument("model", type=click.Path(dir_okay=False, path_type=Path))
@click.option("-o", "--output", type=FILE, help="The .engine file to write.")
@click.option("--fp32", "precision", flag_value="fp32", help="Default: as the graph is typed.")
@click.option("--fp16", "precision", flag_value="fp16")
@click.option("--bf16", "precision", flag_value="bf16")
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "tensorrt-rtx"]),
    default="auto",
    show_default=True,
)
@click.option(
    "--compute-capability",
    "capabilities",
    type=CAPABILITY,
    multiple=True,
    help="GPU generation to compile for, as in 8.9; repeatable (tensorrt-rtx).",
)
@click.option(
    "--batch",
    "profiles",
    type=BATCH,
    multiple=True,
    help="Repeatable: one profile each. Default: the graph's.",
)
@click.option("--workspace", type=MEMORY, help="Scratch memory a kernel may use.")
@click.option("--optimization-level", type=click.IntRange(0, 5))
@click.option("--timing-cache", type=FILE)
@click.option("--version-compatible", is_flag=True, help="Loads in the lean runtime of others.")
@click.option("--timeout", type=click.FloatRange(min=1), help="Seconds the compiler may take.")
@click.option("--memory-limit", type=MEMORY, help="Resident memory the compiler may take.")
@click.option("--allow-unfused", is_flag=True, help="Accept attention that is not fused.")
@click.option("--log", type=FILE, help="Write everything TensorRT says here.")
@artifact_options
def trt(model: Path, **options: Any) -> None:
    """Compile the ONNX graph MODEL into a TensorRT engine."""
    from msn_export.console import Console
    from msn_export.run_trt import TrtJob, run_trt

    as_json = options.pop("as_json")
    precision = options.pop("precision")
    job = TrtJob(
        model,
        command=_command_line(),
        precision=Dtype(precision) if precision else None,
        **options,
    )
    console = Console(as_json=as_json)
    with console.progress() as progress:
        output, manifest = run_trt(job, progress)
    console.show(output, manifest)


@main.command()
@click.argument(
    "artifacts",
    nargs=-1,
    required=True,
    metavar="ARTIFACT [OTHER]",
    type=click.Path(dir_okay=False, path_type=Path),
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def inspect(artifacts: tuple[Path, ...], as_json: bool) -> None:
    """Show what an engine, an ONNX file or a manifest is made of; two of them side by side."""
    if len(artifacts) > 2:
        raise click.UsageError("give one artifact, or two to compare")
    from msn_export.console import show_inspections
    from msn_export.inspection import inspect as inspect_artifact

    show_inspections([inspect_artifact(path) for path in artifacts], as_json=as_json)


def _command_line() -> str:
    return shlex.join(["msn-export", *sys.argv[1:]])


if __name__ == "__main__":
    main()
