"""What the commands' jobs have in common: a field of another type or size is refused at once.

The command line and a type checker never come to it. Python code that neither has read would else
learn of ``output="model.onnx"`` from an AttributeError minutes later.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from msn_export.errors import SpecError


@dataclasses.dataclass(frozen=True, slots=True)
class Within:
    """The bounds of a number; both may be taken."""

    least: float
    most: float = math.inf

    def __str__(self) -> str:
        return f"from {self.least:g}" + (f" to {self.most:g}" if self.most < math.inf else "")


Count = Annotated[int, Within(1)]
Index = Annotated[int, Within(0)]

_UNIONS = (typing.Union, types.UnionType)


class Job:
    """A frozen dataclass whose fields are what they are declared to be, bounds of numbers included.

    Raises:
        SpecError: one is not; the message names it and what is expected.
    """

    __slots__ = ()

    def __post_init__(self) -> None:
        kind: Any = type(self)
        hints = _hints(kind)
        for name, hint in hints.items():
            value = getattr(self, name)
            if not _fits(value, hint):
                raise SpecError(f"{kind.__name__}.{name} is {value!r}; expected {_told(hint)}")
        self.require_consistent()

    def require_consistent(self) -> None:
        """Refuse what the fields' types cannot; a job that has such a thing says what it is.

        Raises:
            SpecError: the fields cannot be had together, or one of them at all.
        """


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _fits(value: Any, hint: Any) -> bool:
    origin, of = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return any(_fits(value, one) for one in of)
    if origin is Annotated:
        return _fits(value, of[0]) and of[1].least <= value <= of[1].most
    if origin is Literal:
        return value in of
    if origin is tuple:  # of any length
        return isinstance(value, tuple) and all(_fits(item, of[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(_fits(item, of[1]) for item in value.values())
    if isinstance(value, bool):  # an int, to Python
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _told(hint: Any) -> str:
    origin, of = get_origin(hint), get_args(hint)
    if origin in _UNIONS:
        return " or ".join(map(_told, of))
    if origin is Literal:
        return " or ".join(map(repr, of))
    if origin is Annotated:
        return f"{_told(of[0])} {of[1]}"
    if origin is tuple:
        return f"a tuple of {_told(of[0])}"
    if origin is Mapping:
        return f"a mapping to {_told(of[1])}"
    return "None" if hint is types.NoneType else str(hint.__name__)
