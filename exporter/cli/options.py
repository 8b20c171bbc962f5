"""What the commands' options have in common: values read by a noun of ``spec``, shared options."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from msn_export.errors import SpecError
from msn_export.spec import BatchRange, ComputeCapability, ImageSize, parse_bytes


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


def _limit(text: str) -> int | None:
    """Read ``N``, or ``all``, which is None."""
    if text == "all":
        return None
    if not text.isascii() or not text.isdigit() or not int(text):
        raise SpecError(f"{text!r} is no number of pictures; expected 1 or more, or all")
    return int(text)


LIMIT = Parsed("N|all", _limit)
IMAGES = click.Path(exists=True, path_type=Path)
FILE = click.Path(dir_okay=False, path_type=Path)


def choice(kind: Any) -> click.Choice[str]:
    """Offer the values of an enumeration."""
    return click.Choice([member.value for member in kind])


def flag_off(*names: str, help: str | None = None) -> Callable[..., Any]:
    """Make an option that is on unless it is given, as ``--no-check`` is."""
    return click.option(*names, is_flag=True, default=True, flag_value=False, help=help)


def flags_of(*values: str, **help: str) -> Callable[..., Any]:
    """Offer a flag for each of some values, of which one may be given: ``--fp16``, ``--bf16``.

    The command gets them as booleans; ``the_one`` says which it was.
    """

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for value in reversed(values):
            command = click.option(f"--{value}", is_flag=True, help=help.get(value))(command)
        return command

    return add


def the_one(options: dict[str, Any], *values: str) -> str | None:
    """Take the flags of ``flags_of`` out of a command's options: the one that is set, or None."""
    given = [value for value in values if options.pop(value)]
    if len(given) > 1:
        told = " and ".join(f"--{value}" for value in given)
        raise click.UsageError(f"{told} contradict each other; give one")
    return given[0] if given else None


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)
force_option = click.option("--force", is_flag=True, help="Replace an existing output.")
images_option = click.option(
    "--images", type=IMAGES, help="Pictures to check on; without, seeded noise."
)
islands_option = click.option(
    "--islands",
    default="measured",
    show_default=True,
    metavar="measured|none|FILE",
    help="fp16: which tensors stay fp32.",
)
exif_option = click.option(
    "--exif",
    type=click.Choice(["apply", "ignore"]),
    help="Turn pictures by their EXIF orientation? Default: as the manifest says, else apply.",
)


def preprocess_option(**options: Any) -> Callable[..., Any]:
    """Make ``--preprocess``, which takes a preset or a JSON file."""
    kind = Parsed("hf|msn-eval|raw|FILE.json", _preprocess)
    return click.option("--preprocess", type=kind, **options)


def _preprocess(text: str) -> str:
    from msn_export.processor_config import require_choice

    require_choice(text)
    return text


def picture_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say how pictures become a model's input."""
    help_text = "How pictures are made into its input. Default: as its manifest says, else hf."
    for option in (exif_option, preprocess_option(help=help_text)):
        command = option(command)
    return command


check_option = flag_off(
    "--no-check", "check", help="Write without comparing; the manifest says so."
)


def artifact_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command that writes a checked artifact has."""
    for option in (json_option, force_option, check_option, islands_option, images_option):
        command = option(command)
    return command


variant_option = click.option(
    "--variant", help="Published shape, where a weights file does not say."
)
weights_option = click.option(
    "--weights", metavar="KEY", help="Which of several weights in one file, as model_ema."
)


def checkpoint_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what every command that takes a checkpoint asks where it does not say."""
    labels = click.option("--labels", type=FILE, help="Names of the classes: a line each, or JSON.")
    return variant_option(weights_option(labels(command)))


def runner_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that say where an artifact runs."""
    for option in (
        click.option("--trust", is_flag=True, help="Run an engine that has no manifest."),
        click.option("--device", type=click.IntRange(min=0), help="GPU to run on."),
        click.option(
            "--providers",
            type=Parsed("NAME,…", lambda text: tuple(filter(None, text.split(",")))),
            default=(),
            help="onnxruntime's, in order: cpu, cuda, tensorrt, … Default: cuda, else cpu.",
        ),
    ):
        command = option(command)
    return command


def command_line() -> str:
    """Give the command as the user typed it, for the manifest."""
    return shlex.join(["msn-export", *sys.argv[1:]])
