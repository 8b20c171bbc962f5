"""The command line: parse, build a job, run it, print. Heavy packages load inside a command."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import click

from msn_export import __version__
from msn_export.cli.child import go_on_in_child, too_little
from msn_export.cli.commands import (
    bench,
    calibrate,
    doctor,
    drift,
    embed,
    evaluate,
    fit,
    hub,
    inspect,
    onnx,
    report,
    search,
    triton,
    trt,
    validate,
)
from msn_export.cli.options import OwnProcess, is_interrupted
from msn_export.errors import MsnExportError, SpecError, out_of_memory

_ARGUMENTS = "msn_export.cli.arguments"
_OF_GRAPHS = {"onnxruntime", "onnx", "onnx_ir", "google"}  # what they raise is about a graph
_LONGEST = 2000  # characters of a message
_OF_CHECKPOINTS = {"torch", "safetensors", "huggingface_hub"}  # what [export] adds to [graph]


class Commands(click.Group):
    """Turns our errors into one line and exit code 1, and an interrupt into 130."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the commands in groups, each with the whole of its first sentence."""
        width = max(map(len, self.commands))
        for title, group in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(f"{c.name:{width}}", c.get_short_help_str(limit=200)) for c in group]
                )

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """List the commands in the order of a job, not of the alphabet."""
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.find_object(OwnProcess) is None:  # else it is done
            signal.signal(signal.SIGTERM, _interrupt)  # so that staging folders are removed
        logging.lastResort = _remarks()
        try:
            for argument in ctx.meta[_ARGUMENTS]:
                _require_text(argument)
            _guard_memory(ctx)
            return super().invoke(ctx)
        except MsnExportError as error:
            message = str(error)
            if "memory" not in message:
                message = _out_of_memory(error) or message
            self._fail(ctx, _one_line(message), 1)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("msn_export"):
                raise
            needs = (
                ctx.invoked_subcommand in {"onnx", "fit", "hub"} or error.name in _OF_CHECKPOINTS
            )
            line = f"pip install 'msn-export[{'export' if needs else 'graph'}]'"
            self._fail(ctx, f"package {error.name} is not installed; {line}", 1)
        except OSError as error:  # of a file that no step expects to fail, as when a disk breaks
            if error.errno == errno.EPIPE and not _placed():
                raise  # whoever read our output is gone: click ends quietly
            where = f"{error.filename}: " if error.filename else ""
            self._fail(ctx, _one_line(f"{where}{error.strerror or error}{_placed()}"), 1)
        except KeyboardInterrupt as stop:
            what = _placed() or "; nothing was written"
            self._fail(ctx, _one_line(str(stop)) or _one_line(f"interrupted{what}"), 130)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise  # click's own: usage, and the end of a command
        except Exception as error:  # noqa: BLE001  files are hostile, and libraries raise what they like
            self._fail(ctx, *_unforeseen(ctx, error))

    def _fail(self, ctx: click.Context, message: str, code: int) -> None:
        if ctx.params.get("verbose"):
            raise  # noqa: PLE0704  called from an except clause: -v shows the traceback
        click.echo(f"{click.style('error:', fg='red', bold=True)} {message}", err=True)
        ctx.exit(code)


def _unforeseen(ctx: click.Context, error: Exception) -> tuple[str, int]:
    """Give the message and the exit code for an error that no step expects."""
    if is_interrupted(ctx):  # while a library was imported: it made another error of it
        return _one_line(f"interrupted{_placed() or '; nothing was written'}"), 130
    if (memory := _out_of_memory(error)) is not None:
        return _one_line(memory), 1
    library = type(error).__module__.partition(".")[0]
    if library in _OF_GRAPHS:
        return _one_line(f"{library} refuses a graph that was made of what was given: {error}"), 1
    reason = _one_line(f"{type(error).__name__}: {error}")
    from msn_export.host import address_space_limit

    limit = address_space_limit()
    if limit is not None:  # SystemError, AttributeError: a library is half loaded
        return f"{reason}; {too_little(limit)}", 1
    return f"unexpected {reason}; -v shows where, please report it", 1


def _out_of_memory(error: BaseException) -> str | None:
    """Give the message for an error whose cause is that memory did not suffice."""
    reason = out_of_memory(error)
    if reason is None:
        return None
    from msn_export.host import address_space_limit

    more = "use a machine with more" if address_space_limit() is None else "allow more (ulimit -v)"
    return f"there is not enough memory{f' ({reason})' if reason else ''}; {more}{_placed()}"


def _guard_memory(ctx: click.Context) -> None:
    """Go on in a child where the address space is limited: libraries end their process then."""
    from msn_export.host import address_space_limit

    own, memory = ctx.find_object(OwnProcess), address_space_limit()
    if own is not None and memory is not None:
        outputs = {Path(argument).parent for argument in ctx.meta[_ARGUMENTS]} | {Path()}
        own.tell = go_on_in_child([], None, outputs, memory)
        threading.excepthook = _end_without_memory
        # libraries, and processes of theirs that lose their parent, print what they like
        sys.stderr = os.fdopen(os.dup(2), "w", 1, encoding="utf-8", errors="backslashreplace")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _end_without_memory(failed: threading.ExceptHookArgs) -> None:
    """End a process that lost a thread of a library's: it would wait for what that had to do."""
    if failed.exc_value is None or out_of_memory(failed.exc_value) is None:
        threading.__excepthook__(failed)
    else:
        os._exit(1)  # this one's parent says why


def _placed() -> str:
    """Name what was written before the end, for the line that tells it."""
    from msn_export.files import written

    names = written()
    return f"; {', '.join(names)} {'was' if len(names) == 1 else 'were'} written" if names else ""


def _require_text(argument: str) -> None:
    """Refuse a path that is not UTF-8: most libraries take no other, and no page can show it."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise SpecError(f"path {argument!r} is not UTF-8; rename it") from error


def _one_line(message: str) -> str:
    """Fit a message into one line, without the characters that a terminal obeys.

    Keys, labels and paths of hostile files reach messages, and may be of any length.
    """
    printable = "".join(c if c.isprintable() else " " for c in message[:_LONGEST])
    return " ".join(printable.split()) + (" …" if len(message) > _LONGEST else "")


def _remarks() -> logging.Handler:
    """Print what libraries warn of, which names what is in files, as messages are printed."""

    class OneLine(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return _one_line(record.getMessage())

    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(OneLine())
    return handler


def _interrupt(signum: int, frame: Any) -> None:  # noqa: ARG001  the signature of a handler
    raise KeyboardInterrupt


# the help is as wide as the terminal
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 1000}


@click.group(cls=Commands, context_settings=SETTINGS)
@click.version_option(__version__, "-V", "--version", prog_name="msn-export")
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error.")
def main(verbose: bool) -> None:
    """Take a ViT-MSN checkpoint to a proven ONNX graph and TensorRT engine."""


GROUPS = {
    "Make": (onnx, fit, calibrate, trt),
    "Prove": (validate, drift, evaluate, report, inspect),
    "Run": (bench, embed, search),
    "Deploy": (triton, hub, doctor),
}
for _group in GROUPS.values():
    for _command in _group:
        main.add_command(_command)
