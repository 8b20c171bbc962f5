"""A command's options are its job's fields, and its function gets those that were given."""

from dataclasses import dataclass
from typing import Annotated, Any

import click
import pytest
from click.testing import CliRunner

from msn_export.cli.options import JobCommand
from msn_export.options import Opt
from msn_export.schema import Count, Job, Within
from msn_export.spec import BatchRange, Dtype


@dataclass(frozen=True, slots=True)
class BakeJob(Job):
    minutes: Annotated[Count, Opt("Baking time.")] = 7
    check: Annotated[bool, Opt("Bake blindly.")] = True
    batch: Annotated[BatchRange, Opt()] = BatchRange()
    sizes: Annotated[tuple[Count, ...], Opt("Repeatable.", "--size")] = ()
    dtype: Annotated[Dtype | None, Opt(each={"fp32": None, "fp16": "Half."})] = None
    share: Annotated[Annotated[float, Within(0, 1, above=True)] | None, Opt()] = None


GIVEN: dict[str, Any] = {}


@click.command(cls=JobCommand, job=f"{__name__}:BakeJob")
def bake(**options: Any) -> None:
    GIVEN.clear()
    GIVEN.update(options)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ([], {}),
        (["--minutes", "7"], {"minutes": 7}),
        (["--no-check", "--batch", "1:2:4"], {"check": False, "batch": BatchRange(1, 2, 4)}),
        (["--size", "1", "--size", "2"], {"sizes": (1, 2)}),
        (["--fp16"], {"dtype": Dtype.FP16}),
    ],
)
def test_what_was_given_is_handed_on_and_no_default(arguments, given) -> None:
    assert CliRunner().invoke(bake, arguments).exit_code == 0
    assert given == GIVEN


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "0"], "--minutes"),
        (["--share", "0"], "--share"),
        (["--batch", "4:2:1"], "batch range 4:2:1 is not ordered"),
        (["--fp16", "--fp32"], "contradict each other; give one"),
    ],
)
def test_what_the_field_would_not_take_is_a_usage_error(arguments, message) -> None:
    result = CliRunner().invoke(bake, arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_the_help_has_each_option_with_its_default() -> None:
    text = CliRunner().invoke(bake, ["--help"]).output
    for part in ("--minutes", "[default: 7", "--no-check", "MIN:OPT:MAX", "--size", "Half."):
        assert part in text
