"""Records survive JSON exactly, and what is read has the types that are declared."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from enum import StrEnum
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.errors import ManifestError, SpecError
from msn_export.manifest import Manifest
from msn_export.schema import from_plain, to_json, to_plain
from tests.builders.manifests import example


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Inner:
    size: int
    ratio: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 0:
            raise SpecError(f"size {self.size} is below zero")


@dataclass(frozen=True, slots=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    colour: Colour
    flag: bool
    inner: Inner | None
    many: tuple[Inner, ...] = ()
    shape: tuple[int | str, ...] = ()
    table: dict[str, float | None] = field(default_factory=dict)
    anything: Any = None


OUTER: dict[str, Any] = {
    "name": "x",
    "kind": "a",
    "colour": "red",
    "flag": True,
    "inner": None,
}

# --- there and back -------------------------------------------------------------------------------

# Type, and values of it; a record is made of fields of these types.
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
scalars: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers(-(2**63), 2**63 - 1)),
    (float, st.floats(allow_nan=False, allow_infinity=False)),
    (bool, st.booleans()),
    (str, text),
    (Colour, st.sampled_from(Colour)),
    (Literal["a", "b"], st.sampled_from(["a", "b"])),
    (Inner, st.builds(Inner, st.integers(0, 2**63 - 1), st.floats(-1, 1))),
]


def composed(kind: Any, values: st.SearchStrategy[Any]) -> list[tuple[Any, st.SearchStrategy[Any]]]:
    return [
        (kind, values),
        (kind | None, st.none() | values),
        (tuple[kind, ...], st.lists(values, max_size=3).map(tuple)),
        (dict[str, kind], st.dictionaries(text, values, max_size=3)),
        (tuple[dict[str, kind], ...], st.tuples(st.dictionaries(text, values, max_size=2))),
    ]


fields = st.sampled_from(
    [pair for scalar in scalars[:5] + scalars[6:] for pair in composed(*scalar)]
)


@st.composite
def records(draw: st.DrawFn) -> Any:
    """Make a dataclass with up to five fields, and a value of it."""
    drawn = draw(st.lists(fields, min_size=1, max_size=5))
    kind = make_dataclass(
        "Drawn", [(f"f{i}", declared) for i, (declared, _) in enumerate(drawn)], frozen=True
    )
    return kind(*(draw(values) for _, values in drawn))


@given(records())
def test_a_record_survives_json(record) -> None:
    read = json.loads(to_json(record))
    again = from_plain(type(record), read, "r")
    assert again == record
    assert to_plain(again) == read == to_plain(record)


def test_a_whole_manifest_survives_json() -> None:
    assert from_plain(Manifest, json.loads(to_json(example())), "m") == example()


def test_a_union_of_scalars_keeps_each() -> None:
    assert from_plain(Outer, {**OUTER, "shape": ["batch", 3, 224]}, "o").shape == ("batch", 3, 224)


def test_what_is_no_number_becomes_none() -> None:
    assert to_plain({"a": math.nan, "b": [math.inf, -math.inf, 1.5]}) == {
        "a": None,
        "b": [None, None, 1.5],
    }


def test_bytes_of_a_path_that_are_no_text_are_replaced() -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")  # as Python reads latin-1 names
    assert to_plain({name: name, "\ud800": "é 😀"}) == {
        "caf\ufffd.png": "caf\ufffd.png",
        "\ufffd": "é 😀",
    }
    to_json({name: name}).encode()


# --- what is refused ------------------------------------------------------------------------------

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=8,
)
names = st.sampled_from([*Outer.__dataclass_fields__, "size", "unknown"])


@given(anything | st.dictionaries(names, anything))
def test_arbitrary_json_raises_nothing_but_a_manifest_error(plain) -> None:
    for kind in (Outer, Manifest, tuple[Outer, ...], dict[str, Inner], int | str):
        try:
            from_plain(kind, plain, "m")
        except ManifestError as error:
            assert str(error).startswith("m")


WRONG = [
    ([], "o is []; expected dict"),
    (None, "o is None; expected dict"),
    ({"name": "x"}, "o.colour is missing"),
    ({**OUTER, "extra": 1}, "o.extra is unknown to this version"),
    ({**OUTER, "name": 1}, "o.name is 1; expected str"),
    ({**OUTER, "kind": "c"}, "o.kind is 'c'; expected one of ('a', 'b')"),
    ({**OUTER, "kind": ["a"]}, "o.kind is ['a']; expected one of ('a', 'b')"),
    ({**OUTER, "colour": "green"}, "o.colour is 'green', which is no Colour"),
    ({**OUTER, "colour": {}}, "o.colour is {}, which is no Colour"),
    ({**OUTER, "flag": 1}, "o.flag is 1; expected bool"),
    ({**OUTER, "inner": 3}, "o.inner is 3; expected dict"),
    ({**OUTER, "inner": {"size": 1.0}}, "o.inner.size is 1.0; expected int"),
    ({**OUTER, "inner": {"size": True}}, "o.inner.size is True; expected int"),
    ({**OUTER, "inner": {"size": -1}}, "o.inner: size -1 is below zero"),
    ({**OUTER, "many": {"size": 1}}, "o.many is {'size': 1}; expected list"),
    ({**OUTER, "many": [{"size": 1}, {}]}, "o.many[1].size is missing"),
    ({**OUTER, "shape": [1, 2.5]}, "o.shape[1] is 2.5; expected int | str"),
    ({**OUTER, "table": {"a": "b"}}, "o.table.a is 'b'; expected a finite number"),
    ({**OUTER, "table": {"a": math.nan}}, "o.table.a is nan; expected a finite number"),
    ({**OUTER, "table": {"a": True}}, "o.table.a is True; expected a finite number"),
    ({**OUTER, "table": {"a": 10**400}}, f"o.table.a is 1{'0' * 36}...; expected a finite"),
    ({**OUTER, "name": list(range(99))}, "o.name is [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11...; "),
]


@pytest.mark.parametrize(("plain", "message"), WRONG)
def test_the_message_has_the_path_of_what_is_wrong(plain, message) -> None:
    with pytest.raises(ManifestError) as raised:
        from_plain(Outer, plain, "o")
    assert str(raised.value).startswith(message)


def test_mappings_are_read_as_dicts() -> None:
    assert from_plain(Mapping[str, int], {"a": 1}, "m") == {"a": 1}


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**400])
def test_an_integer_that_no_64_bits_hold_is_refused(number) -> None:
    with pytest.raises(ManifestError, match=r"^bytes is -?\d+\.*; expected an integer of 64 bits$"):
        from_plain(int, number, "bytes")
    assert from_plain(int, 2**63 - 1, "bytes") == 2**63 - 1
