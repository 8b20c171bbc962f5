"""The page of the Python API is what the docstrings say, and every public name says enough."""

import inspect

import pytest

import msn_export

api = pytest.importorskip("api", reason="griffelib is not installed")
FUNCTIONS = [getattr(msn_export, name) for name in msn_export.__all__ if name[0].islower()]


@pytest.mark.skipif(not api.PAGE.parent.is_dir(), reason="there are no docs here")
def test_the_page_is_current() -> None:
    written = api.PAGE.read_text(encoding="utf-8")
    assert written == api.page(), "python scripts/api.py writes it again"


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda one: one.__name__)
def test_a_function_says_its_arguments_result_and_errors(function) -> None:
    found = {section.kind.value: section.value for section in api.sections(function)}
    own = set(inspect.unwrap(function).__code__.co_varnames[: function.__code__.co_argcount])
    assert found["raises"]
    assert own <= {one.name for one in found.get("parameters", ())}
    assert "returns" in found or function is msn_export.load


def test_arrays_have_shapes_and_dtypes() -> None:
    page = api.page()
    assert "float32 [b, c, h, w]" in page
    assert "uint8 [b, h, w, c]" in page
    assert "logits [b, classes]" in page
    assert "--" not in "".join(row for row in page.splitlines() if row.startswith("| `")), "a flag"
