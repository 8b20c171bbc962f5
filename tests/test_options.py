"""A job's field says all that its option needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from msn_export import options
from msn_export.errors import SpecError
from msn_export.options import One, Opt, kept, names, number_or_all, opts_of
from msn_export.schema import Count, Job, Within
from msn_export.spec import Dtype


@dataclass(frozen=True, slots=True)
class BakeJob(Job):
    oven: Path
    minutes: Annotated[Count, Opt("How long.", kept=True)] = 1
    glaze: Annotated[bool, Opt(kept=True)] = False
    dtype: Annotated[Dtype | None, Opt()] = None
    images: options.Images = None


def test_a_field_is_an_option_where_its_annotation_says_so() -> None:
    assert list(opts_of(BakeJob)) == ["minutes", "glaze", "dtype", "images"]
    assert opts_of(BakeJob)["images"].exists


def test_the_manifest_keeps_what_is_set_and_is_to_be_kept() -> None:
    assert kept(BakeJob(Path("a"), minutes=3)) == {"minutes": 3}
    assert kept(BakeJob(Path("a"), glaze=True, dtype=Dtype.FP16)) == {"minutes": 1, "glaze": True}


@pytest.mark.parametrize(
    ("hint", "one"),
    [
        (Annotated[Count | None, Opt()], One(int, Within(1))),
        (tuple[Dtype, ...], One(Dtype, several=True)),
        (Annotated[tuple[Count, ...], Opt()], One(int, Within(1), several=True)),
        (Path | None, One(Path)),
    ],
)
def test_a_value_has_the_innermost_type_and_bounds(hint, one) -> None:
    assert One.of(hint) == one
    assert One.of(hint).is_enum is (one.kind is Dtype)


def test_pictures_are_counted_or_all_are_meant() -> None:
    assert number_or_all("12") == 12
    assert number_or_all("all") is None
    for text in ("0", "-1", "many", "²"):
        with pytest.raises(SpecError) as raised:
            number_or_all(text)
        assert str(raised.value) == (
            f"{text!r} is no number of pictures; expected 1 or more, or all"
        )


def test_words_stand_between_commas() -> None:
    assert names("cuda,,cpu") == ("cuda", "cpu")
    assert names("") == ()
