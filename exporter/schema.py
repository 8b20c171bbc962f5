"""Frozen dataclasses to JSON and back, strictly, and jobs whose fields have their types.

Manifests are hostile input and the runtime reads them with the standard library alone.

A job's fields are checked as it is made. Python code that no type checker has read would otherwise
learn of ``output="model.onnx"`` from an AttributeError minutes later.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from msn_export.errors import ManifestError, SpecError

T = TypeVar("T")

_PLAIN = {int, bool, type(None)}


def to_plain(value: Any) -> Any:
    """Turn a record into dicts, lists, numbers and text; what is no number becomes None.

    A path's bytes that are no UTF-8 become U+FFFD: JSON has no other place for them.
    """
    if type(value) in _PLAIN:  # of a ranges file's two hundred thousand counts, each
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {to_plain(str(key)): to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN; a figure that is none never passed a gate
    return value


def to_json(value: Any) -> str:
    """Write a record as indented JSON with a line end."""
    return json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def from_plain(kind: type[T], plain: Any, where: str) -> T:
    """Make a ``kind`` from parsed JSON.

    Args:
        kind: a dataclass, scalar, ``tuple[X, ...]``, ``dict[str, X]`` or union with None.
        plain: what ``json.loads`` gave.
        where: what to call it in errors.
    """
    return typing.cast(T, _read(kind, plain, where))


def _read(kind: Any, plain: Any, where: str) -> Any:
    origin = get_origin(kind)
    if kind is Any:
        return plain
    if origin is Literal:
        if plain not in get_args(kind):
            raise ManifestError(f"{where} is {_short(plain)}; expected one of {get_args(kind)}")
        return plain
    if origin in _UNIONS:
        return _read_union(kind, plain, where)
    if origin is tuple:
        item = get_args(kind)[0]
        return tuple(
            _read(item, x, f"{where}[{i}]") for i, x in enumerate(_expect(list, plain, where))
        )
    if origin in {dict, Mapping} or (isinstance(origin, type) and issubclass(origin, Mapping)):
        item = get_args(kind)[1]
        return {k: _read(item, x, f"{where}.{k}") for k, x in _expect(dict, plain, where).items()}
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, _expect(dict, plain, where), where)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(plain)
        except ValueError as error:
            raise ManifestError(f"{where} is {plain!r}, which is no {kind.__name__}") from error
    if kind is Path:
        return Path(_expect(str, plain, where))
    if kind is float:
        return _read_float(plain, where)
    if kind is int:
        return _read_int(plain, where)
    return _expect(kind, plain, where)


def _read_int(plain: Any, where: str) -> int:
    """Python's JSON has integers of any length, which no size or count here is."""
    number: int = _expect(int, plain, where)
    if not -(2**63) <= number < 2**63:
        raise ManifestError(f"{where} is {_short(plain)}; expected an integer of 64 bits")
    return number


def _read_float(plain: Any, where: str) -> float:
    is_number = isinstance(plain, int | float) and not isinstance(plain, bool)
    # Python's JSON has NaN, and integers of any length; beyond 1.8e308 there is no float
    if is_number and abs(plain) <= sys.float_info.max:
        return float(plain)
    raise ManifestError(f"{where} is {_short(plain)}; expected a finite number")


def _read_union(kind: Any, plain: Any, where: str) -> Any:
    choices = get_args(kind)
    if plain is None and type(None) in choices:
        return None
    reasons = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _read(choice, plain, where)
        except ManifestError as error:
            reasons.append(str(error))
    if len(reasons) == 1:
        raise ManifestError(reasons[0])
    raise ManifestError(f"{where} is {_short(plain)}; expected {kind}")


def _read_record(kind: Any, plain: dict[str, Any], where: str) -> Any:
    hints, fields = _hints(kind), dataclasses.fields(kind)
    required = {
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    for name in sorted(required - plain.keys()):
        raise ManifestError(f"{where}.{name} is missing")
    for name in sorted(plain.keys() - {field.name for field in fields}):
        raise ManifestError(f"{where}.{name} is unknown to this version")
    values = {name: _read(hints[name], plain[name], f"{where}.{name}") for name in plain}
    try:
        return kind(**values)
    except SpecError as error:
        raise ManifestError(f"{where}: {error}") from error


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _expect(kind: type, plain: Any, where: str) -> Any:
    right = isinstance(plain, kind) and not (isinstance(plain, bool) and kind is not bool)
    if not right:
        raise ManifestError(f"{where} is {_short(plain)}; expected {kind.__name__}")
    return plain


def _short(plain: Any) -> str:
    text = repr(plain)
    return text if len(text) <= 40 else text[:37] + "..."


@dataclasses.dataclass(frozen=True, slots=True)
class Within:
    """The bounds of a number; both may be taken, the lower not where it is to be ``above`` it."""

    least: float
    most: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        least = f"{'above' if self.above else 'from'} {self.least}"
        return least + (f" to {self.most}" if self.most < math.inf else "")


Count = Annotated[int, Within(1)]
Index = Annotated[int, Within(0)]

_SHOWN = 6  # fields of a result on one line
_UNIONS = (typing.Union, types.UnionType)


class Job:
    """A frozen dataclass whose fields are what they are declared to be, numbers within bounds."""

    __slots__ = ()

    def __post_init__(self) -> None:
        kind: Any = type(self)
        hints = annotated_hints(kind)
        for name, hint in hints.items():
            value = getattr(self, name)
            if not _fits(value, hint):
                raise SpecError(f"{kind.__name__}.{name} is {value!r}; expected {_described(hint)}")
        self.require_consistent()

    def require_consistent(self) -> None:
        """Refuse what the fields' types cannot; a job that has such a thing says what it is."""


@cache
def annotated_hints(kind: Any) -> dict[str, Any]:
    """Give each field's annotation, with what is said of it besides its type."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fits(value: Any, hint: Any) -> bool:
    origin, of = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return any(_fits(value, one) for one in of)
    if origin is Annotated:
        bounds = (extra for extra in of[1:] if isinstance(extra, Within))
        return _fits(value, of[0]) and all(value in each for each in bounds)
    if origin is Literal:
        return value in of
    if origin is tuple:  # of any length
        return isinstance(value, tuple) and all(_fits(item, of[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(item, of[1]) for item in value.values())
    if isinstance(value, bool):  # an int, to Python
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _described(hint: Any) -> str:
    origin, of = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return " or ".join(map(_described, of))
    if origin is Literal:
        return " or ".join(map(repr, of))
    if origin is Annotated:
        return " ".join(
            [_described(of[0]), *(str(extra) for extra in of[1:] if isinstance(extra, Within))]
        )
    if origin is tuple:
        return f"a tuple of {_described(of[0])}"
    if origin is Mapping:
        return f"a mapping to {_described(of[1])}"
    return "None" if hint is types.NoneType else str(hint.__name__)


class Result:
    """A result that shows itself on a line, and as a table in a notebook."""

    __slots__ = ()

    def summary(self) -> dict[str, Any]:
        """Give its plain fields that are set, and how many its lists hold."""
        found = {}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, str | int | float | Path):
                found[field.name] = value
            elif isinstance(value, tuple) and value:
                found[field.name] = value[0] if len(value) == 1 else f"{len(value)} of them"
        return {name: value for name, value in found.items() if value != ""}

    def __repr__(self) -> str:
        parts = [f"{name}={_short(value)}" for name, value in self.summary().items()]
        return f"{type(self).__name__}({', '.join(parts[:_SHOWN])}{', …' * (len(parts) > _SHOWN)})"

    def _repr_html_(self) -> str:
        import html

        rows = (
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in self.summary().items()
        )
        return f"<table>{''.join(rows)}</table>"
