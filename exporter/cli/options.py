"""Options of commands: those made of a job's fields, and what commands ask for besides."""

from __future__ import annotations

import math
import os
import pkgutil
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click
from click.core import ParameterSource

from msn_export.cli.child import go_on_in_child, graphs_of_others
from msn_export.errors import SpecError

if TYPE_CHECKING:  # a group's help shows no options, and loads nothing that describes them
    from msn_export.options import One, Opt

STARTED = time.monotonic()


class _Named(click.Path):
    """A path that is not empty: ``Path("")`` is the current folder. What lies near one is named."""

    def convert(self, value: Any, *args: Any) -> Any:
        if not os.fspath(value):
            self.fail("the path is empty; name a file or a folder", *args)
        if self.exists and not os.path.lexists(value):
            from msn_export.models.checkpoint import near

            self.fail(f"{self.name.title()} {value!r} does not exist{near(value)}", *args)
        return super().convert(value, *args)


class _Source(click.ParamType[str]):
    """A checkpoint, or an artifact that is there."""

    name = "checkpoint or artifact"

    def convert(self, value: Any, *args: Any) -> str:
        from msn_export.errors import CheckpointError
        from msn_export.models.checkpoint import require_there

        try:
            require_there(value)
        except CheckpointError as error:
            self.fail(str(error), *args)
        return str(value)


class _Words(click.Choice[str]):
    """A choice of words; of some others it says what to do instead."""

    def __init__(self, words: Sequence[str], elsewhere: Mapping[str, str]) -> None:
        super().__init__(words, case_sensitive=False)
        self.elsewhere = elsewhere

    def convert(self, value: Any, *args: Any) -> str:
        instead = self.elsewhere.get(str(value).lower())
        if instead is not None:
            self.fail(f"{value!r} is not one of {', '.join(self.choices)}; {instead}", *args)
        return super().convert(value, *args)


IMAGES = _Named(exists=True, path_type=Path)
EXISTING = _Named(exists=True, dir_okay=False, path_type=Path)
FILE = _Named(dir_okay=False, path_type=Path)
SOURCE = _Source()


class Parsed(click.ParamType[Any]):
    """A value that a function reads from text, or from what another type makes of it."""

    def __init__(
        self, form: str, read: Callable[[Any], Any], base: click.ParamType[Any] = click.STRING
    ) -> None:
        self.name = form or base.name
        self.form = form
        self.read = read
        self.base = base

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.read(self.base.convert(value, param, ctx))
        except (SpecError, ValueError) as error:
            self.fail(str(error), param, ctx)

    def get_metavar(self, *args: Any, **named: Any) -> str | None:
        return self.form or self.base.get_metavar(*args, **named)

    def shell_complete(self, *args: Any) -> list[Any]:
        return self.base.shell_complete(*args)


def _type_of(one: One, opt: Opt) -> click.ParamType[Any]:
    kind, within = one.kind, one.within
    if opt.read is not None:
        return Parsed(opt.form, opt.read, FILE if kind is Path else click.STRING)
    if kind is Path:
        return IMAGES if opt.exists else FILE
    if hasattr(kind, "parse"):
        return Parsed(kind.form, kind.parse)
    if within is not None:
        of: Any = click.IntRange if kind is int else click.FloatRange
        most = within.most if within.most < math.inf else None
        return of(within.least, most, min_open=within.above)  # type: ignore[no-any-return]
    words = opt.words
    if get_origin(kind) is Literal:
        words = get_args(kind)
    elif one.is_enum:
        words = words or tuple(member.value for member in kind)
    if not words:
        return click.STRING
    meanings = {word: kind(word) if one.is_enum else word for word in words}
    meanings = {**({opt.none: None} if opt.none else {}), **meanings}
    choice = _Words(list(meanings), opt.elsewhere)
    return Parsed("", meanings.__getitem__, choice)


class JobCommand(click.Command):
    """A command whose options are its job's fields; the job is loaded when they are asked for.

    Its function gets the arguments and those options that were given: the defaults are the job's.
    """

    def __init__(self, *args: Any, job: str, **attributes: Any) -> None:
        self._job = job
        self._panels: dict[str, str] = {}
        self._opts: dict[str, tuple[One, Opt]] | None = None
        self._params: list[click.Parameter] = []
        super().__init__(*args, **attributes)

    @property
    def params(self) -> list[click.Parameter]:
        """The arguments, the job's options, and ``--json``."""
        if self._opts is None:
            from msn_export.options import One, opts_of
            from msn_export.schema import annotated_hints

            self._opts = {}
            job = pkgutil.resolve_name(self._job)
            last = [param for param in self._params if param.name in {"timeout", "as_json"}]
            self._params = [param for param in self._params if param not in last]
            by_name = {field.name: field for field in fields(job)}
            for name, opt in opts_of(job).items():
                self._opts[name] = One.of(annotated_hints(job)[name]), opt
                choices = list(_options(by_name[name], *self._opts[name]))
                self._panels |= {str(option.name): opt.panel for option in choices}
                self._params += choices
            self._params += last
        return self._params

    @params.setter
    def params(self, params: list[click.Parameter]) -> None:
        self._params = params

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in their panels; what is written to comes last."""
        from msn_export.options import WRITTEN

        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):
                panels.setdefault(self._panels.get(str(param.name), WRITTEN), []).append(record)
        for title in sorted(panels, key=lambda title: title == WRITTEN):
            with formatter.section(title):
                formatter.write_dl(panels[title])

    def invoke(self, ctx: click.Context) -> Any:
        for name, (one, opt) in (self._opts or {}).items():
            values = {key: ctx.params.pop(key) for key in opt.each or [name]}
            default = ParameterSource.DEFAULT
            given = {k: v for k, v in values.items() if ctx.get_parameter_source(k) is not default}
            if opt.each and one.is_enum and len(given) > 1:
                flags = " and ".join(f"--{key}" for key in given)
                raise click.UsageError(f"{flags} contradict each other; give one", ctx)
            if opt.each and given:
                ctx.params[name] = one.kind(*given) if one.is_enum else given
            else:
                ctx.params |= given
        self._go_on_in_child(ctx)
        return super().invoke(ctx)

    def _go_on_in_child(self, ctx: click.Context) -> None:
        """Leave what another tool wrote to a child, where this process is the command's own."""
        if all(param.name != "timeout" for param in self.params):
            return
        limit = ctx.params.get("timeout") or TIMEOUT
        if "timeout" not in (self._opts or {}):
            ctx.params.pop("timeout")
        graphs = graphs_of_others(ctx.params.values())
        own = ctx.find_object(OwnProcess)
        if graphs and own is not None:
            output = ctx.params.get("output")
            folder = Path.cwd() if output is None else Path(output).parent
            own.tell = go_on_in_child(graphs, limit, [folder])


class OwnProcess:
    """Marks a run of the command line that has a process to itself.

    ``signals`` receives the number of each interrupt, ``tell`` the exit code of the command.
    """

    def __init__(self, signals: list[int]) -> None:
        self.signals = signals
        self.tell: Callable[[int], object] = lambda _code: None


def is_interrupted(ctx: click.Context) -> bool:
    """True where an interrupt came, whatever was made of it."""
    process = ctx.find_object(OwnProcess)
    return process is not None and bool(process.signals)


def _options(field: Field[Any], one: One, opt: Opt) -> Iterator[click.Option]:
    """Make a field's option, or its several."""
    for key, text in opt.each.items():
        kind: dict[str, Any] = {"is_flag": True}
        if not one.is_enum:
            kind = {"type": _type_of(one, opt), "metavar": _metavar(one, opt)}
        yield click.Option([f"--{_dashed(key)}", key], help=text, **kind)
    if opt.each:
        return
    names, default = opt.flag.split() or [f"--{_dashed(field.name)}"], field.default
    attributes: dict[str, Any] = {"help": opt.help, "metavar": opt.metavar or _metavar(one, opt)}
    if one.kind is bool:
        names = [f"--no-{_dashed(field.name)}"] if default else names
        attributes |= {"is_flag": True, "default": default, "flag_value": not default}
    else:
        attributes |= {"type": _type_of(one, opt), "multiple": one.several and opt.read is None}
    if default is MISSING:
        attributes["required"] = True
    elif opt.none or not isinstance(default, NoneType | bool | tuple):
        word = default.value if isinstance(default, Enum) else default
        attributes |= {"default": opt.none if word is None else word, "show_default": True}
    if opt.bare is not None:
        attributes |= {"is_flag": False, "flag_value": opt.bare}
    yield click.Option([*names, field.name], **attributes)


def _metavar(one: One, opt: Opt) -> str | None:
    """Give a number's a letter; click has a name of its type instead."""
    is_number = one.kind in {int, float} and opt.read is None
    return ("N" if one.kind is int else "X") if is_number else None


def _dashed(name: str) -> str:
    return name.replace("_", "-")


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout."
)


TIMEOUT = 600.0  # seconds
timeout_option = click.option(
    "--timeout",
    type=click.FloatRange(1),
    default=TIMEOUT,
    show_default=True,
    metavar="SECONDS",
    help="Seconds that a graph of another tool may run.",
)


def command_line() -> str:
    """Give the command as the user typed it, for the manifest."""
    return shlex.join(["msn-export", *sys.argv[1:]])
