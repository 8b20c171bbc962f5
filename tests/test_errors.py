"""One class catches all that this package raises on purpose; narrower ones are of their kind."""

import copy
import pickle

import pytest

from msn_export import errors
from msn_export.errors import DeviceError, FusionError, GraphError, MsnExportError, RunnerError

CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type)]


def test_every_error_is_one_of_ours() -> None:
    assert len(CLASSES) > 10
    assert all(issubclass(kind, MsnExportError) for kind in CLASSES)


def test_who_catches_the_wider_one_catches_the_narrower() -> None:
    assert issubclass(FusionError, GraphError)
    assert issubclass(DeviceError, RunnerError)
    parents = {kind.__name__: kind.__mro__[1] for kind in CLASSES}
    assert {name for name, parent in parents.items() if parent is not MsnExportError} == {
        "MsnExportError", "FusionError", "DeviceError",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("model.onnx does not exist", "model.onnx does not exist"),
        ("Größe 日本 😀", "Größe 日本 😀"),
        ("a\x1b[31m\x07b\x9b", "a\\u001b[31m\\u0007b\\u009b"),
        ("two\nlines\tand a tab\r", "two\\nlines\\tand a tab\\u000d"),
        ("name\u202egpj.exe\u2066", "name\\u202egpj.exe\\u2066"),
        ("not UTF-8: \udc80", "not UTF-8: \ufffd"),
    ],
)
def test_a_message_is_one_line_that_no_terminal_obeys(message, told) -> None:
    error = GraphError(message)
    assert str(error) == told
    assert error.args == (message,)
    str(error).encode()
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301  our own
        assert str(again) == told


def test_a_long_message_keeps_its_beginning_and_its_end() -> None:
    told = str(GraphError("begin " + "x" * 10**6 + "; do this"))
    assert len(told) == 2000
    assert told.startswith("begin x")
    assert told.endswith("x; do this")
