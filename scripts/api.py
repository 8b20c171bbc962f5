"""Write docs/api.md, the Python API, from the docstrings and signatures of the public functions and classes.

    python scripts/api.py

The page is Markdown in the repository, so a code host and the site show the same text.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import griffe

import msn_export
from msn_export import errors, images, progress, runtime
from msn_export.api import _FLAG, _arguments, _word
from msn_export.cli import GROUPS
from msn_export.compare.sides import Validation
from msn_export.embedding.job import Embedded
from msn_export.options import opts_of
from msn_export.runtime.runner import Guess, Precision, SelfTest

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
HEAD = """# Python API

Every public function and class with its arguments, made from the docstrings by `python scripts/api.py`. Examples:
[python.md](python.md); the runtime in a service: [runtime.md](runtime.md).

Shapes: `b` images, `c` channels, `h` and `w` pixels, `n` tokens. A path may be text or a `pathlib.Path`. All errors are
`msn_export.errors.MsnExportError` or a subclass, with one line that says what, where, what was expected and what to do.
"""
RUNTIME = (runtime.open_runner, runtime.Runner, runtime.Outputs, Guess, SelfTest, Precision)
RESULTS = (msn_export.Exported, Validation, Embedded)
PICTURES = (images.preprocess, images.decode)
SPECIAL = {"__call__"}
NAMES = {"onnx": "export", "trt": "compile"}


def sections(value: Any) -> list[Any]:
    """Parse a docstring of Google's style."""
    text = inspect.cleandoc(value.__doc__ or "").split("\nOptions:\n")[0]
    parent: Any = None
    if callable(value) and not inspect.isclass(value):
        parent = griffe.Function(value.__name__)
    docstring = griffe.Docstring(text, parent=parent)
    return docstring.parse("google", warn_unknown_params=False, warn_missing_types=False)


def described(value: Any) -> str:
    """Lay out a docstring: its text, arguments, result and errors."""
    lines: list[str] = []
    for section in sections(value):
        kind = section.kind.value
        if kind == "text":
            lines.append(marked(section.value))
        elif kind == "parameters":
            lines += ["", "| argument | |", "|---|---|"]
            lines += [
                f"| `{one.name}` | {cell(one.description)} |"
                for one in section.value
                if one.name != "options"  # they have a table of their own
            ]
        elif kind == "returns":
            lines += ["", "Returns: " + " ".join(cell(one.description) for one in section.value)]
        elif kind == "raises":
            lines += ["", "| error | when |", "|---|---|"]
            lines += [f"| `{one.annotation}` | {cell(one.description)} |" for one in section.value]
    return "\n".join(lines)


def marked(text: str) -> str:
    """Turn the literals of reStructuredText into Markdown's."""
    return re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)


def cell(text: str) -> str:
    """Fit a text into a cell of a table."""
    return marked(" ".join(text.split())).replace("|", "\\|")


def signature(function: Callable[..., Any], name: str) -> str:
    """Write a signature without the job's fields, which have a table of their own."""
    shown = []
    for parameter in inspect.signature(inspect.unwrap(function)).parameters.values():
        own = getattr(function, "__wrapped__", function).__code__.co_varnames
        if parameter.name in own and parameter.name not in {"self", "options"}:
            shown.append(parameter.replace(annotation=inspect.Parameter.empty))
    text = str(inspect.Signature(shown))
    return f"{name}{text}"


def options(job: Any, taken: set[str]) -> str:
    """Lay out the fields of a job that are arguments of its function."""
    opts = opts_of(job)
    words = _arguments(opts)
    rows = []
    for field in fields(job):
        if field.name in taken or field.name not in opts:
            continue
        text = _FLAG.sub(lambda flag: _word(flag[0], words), opts[field.name].help or "")
        if field.default is True:  # the text is that of its flag, --no-…
            text = f"`False`: {text}"
        rows.append(f"| `{field.name}` | {default_of(field)} | {cell(text)} |")
    return "\n".join(["", "| option | default | |", "|---|---|---|", *rows]) if rows else ""


def default_of(field: Any) -> str:
    """Write a field's default as a caller would give it; nothing where it is None."""
    value = field.default
    if value is MISSING and field.default_factory is not MISSING:
        value = field.default_factory()
    if value is None or value is MISSING or value in ((), {}):
        return ""
    if isinstance(value, tuple):
        return f"`{[plain(one) for one in value]}`"
    return f"`{plain(value)!r}`"


def plain(value: Any) -> Any:
    """Turn an enumeration, a path or a range into what a caller would give."""
    return value if isinstance(value, bool | int | float) else str(value)


def function_entry(function: Callable[..., Any], name: str, job: Any = None) -> str:
    """Write the entry of a function."""
    parts = [f"### {name.rpartition('.')[2]}", f"```text\n{signature(function, name)}\n```"]
    parts.append(described(function))
    if job is not None:
        parts.append(options(job, set(function.__code__.co_varnames)).strip())
    return "\n\n".join(part for part in parts if part)


def class_entry(kind: type, name: str) -> str:
    """Write the entry of a class with its public methods and properties."""
    parts = [f"### {name.rpartition('.')[2]}", described(kind)]
    for attribute, value in vars(kind).items():
        if attribute.startswith("_") and attribute not in SPECIAL:
            continue
        if isinstance(value, property) and value.__doc__:
            parts.append(f"#### {kind.__name__}.{attribute}\n\n{described(value)}")
        elif inspect.isfunction(value) and value.__doc__:
            call = signature(value, "runner" if attribute == "__call__" else f"{attribute}")
            title = "call" if attribute == "__call__" else attribute
            code = f"```text\n{call}\n```"
            parts.append(f"#### {kind.__name__}.{title}\n\n{code}\n\n{described(value)}")
    return "\n\n".join(part for part in parts if part)


def error_rows() -> str:
    """Lay out the tree of errors."""
    rows = []
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, errors.MsnExportError):
            parent = value.__mro__[1].__name__
            rows.append(f"| `{name}` | `{parent}` | {cell(inspect.getdoc(value) or '')} |")
    return "\n".join(["| error | is a | |", "|---|---|---|", *rows])


def page() -> str:
    """Give the text of the page."""
    jobs = {job.__name__.removesuffix("Job").lower(): job for job in _jobs()}
    parts = [HEAD, "## Commands"]
    for commands in GROUPS.values():
        for command in commands:
            name = NAMES.get(str(command.name), str(command.name))
            function = getattr(msn_export, name)
            entry = function_entry(function, f"msn_export.{name}", jobs.get(str(command.name)))
            parts.append(entry)
    parts += ["## Results"] + [class_entry(kind, kind.__name__) for kind in RESULTS]
    parts += ["## Runtime", "`msn_export.load` is `open_runner`."]
    for value in RUNTIME:
        name = f"msn_export.runtime.{value.__name__}"
        entry = class_entry if inspect.isclass(value) else function_entry
        parts.append(entry(value, name))
    parts.append("## Pictures")
    parts += [function_entry(one, f"msn_export.images.{one.__name__}") for one in PICTURES]
    parts += ["## Progress", class_entry(progress.Progress, "Progress")]
    parts += ["## Errors", error_rows()]
    return "\n\n".join(parts) + "\n"


def _jobs() -> list[Any]:
    return [getattr(msn_export, name) for name in msn_export.__all__ if name.endswith("Job")]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
