"""An option is made of its job's field: what text may stand for it, and what a manifest keeps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import pytest

from msn_export.commands.jobs import TrtJob
from msn_export.errors import SpecError
from msn_export.options import One, Opt, kept, names, number_or_all, opts_of, value_of
from msn_export.schema import Within
from msn_export.spec import BatchRange, ComputeCapability, Dtype, Head, ImageSize, parse_bytes

VALUES = [
    (Path | None, "m.onnx", Path("m.onnx")),
    (tuple[Head, ...], "cls", (Head.CLS,)),
    (tuple[Head, ...], ["cls", Head.MEAN], (Head.CLS, Head.MEAN)),
    (tuple[ComputeCapability, ...], ["8.9", 12.0], (ComputeCapability(8, 9),
                                                   ComputeCapability(12, 0))),
    (BatchRange, "1:2:4", BatchRange(1, 2, 4)),
    (BatchRange, 8, BatchRange(8, 8, 8)),
    (ImageSize | None, 224, ImageSize(224, 224)),
    (Dtype | None, None, None),
    (bool, True, True),
    (int, "7", "7"),  # a job refuses text where a number belongs
    (Mapping[str, float], {"cosine": 0.9}, {"cosine": 0.9}),
]  # fmt: skip


@pytest.mark.parametrize(("hint", "given", "wanted"), VALUES, ids=lambda value: str(value)[:24])
def test_text_and_paths_become_what_the_field_holds(hint, given, wanted) -> None:
    assert value_of(hint, Opt(), given) == wanted


def test_a_word_that_is_no_choice_names_those_that_are() -> None:
    with pytest.raises(SpecError, match="is 'int8'; expected fp32, fp16 or bf16"):
        value_of(Dtype, Opt(words=("fp32", "fp16", "bf16")), "int8")


def test_an_options_own_reader_reads_text_and_nothing_else() -> None:
    opt = Opt(read=parse_bytes)
    assert value_of(int | None, opt, "2GiB") == 2 << 30
    assert value_of(int | None, opt, 5) == 5
    assert value_of(tuple[str, ...], Opt(read=names), "cpu,cuda") == ("cpu", "cuda")


@pytest.mark.parametrize(
    ("hint", "kind", "several"),
    [
        (tuple[Head, ...], Head, True),
        (Annotated[Path | None, Opt()], Path, False),
        (Mapping[str, float], float, False),
    ],
)
def test_one_value_of_a_field_is_found_in_its_annotation(hint, kind, several) -> None:
    assert One.of(hint)[::2] == (kind, several)


def test_bounds_stay_with_the_value() -> None:
    assert One.of(Annotated[int, Within(0, 5)] | None).within == Within(0, 5)
    assert One.of(Literal["a", "b"]).kind == Literal["a", "b"]


@pytest.mark.parametrize(("text", "number"), [("all", None), ("64", 64)])
def test_a_number_of_pictures_is_read(text, number) -> None:
    assert number_or_all(text) == number


@pytest.mark.parametrize("text", ["0", "-1", "two", "", "1.5", "٣"])
def test_what_is_no_number_of_pictures_is_refused(text) -> None:
    with pytest.raises(SpecError, match="is no number of pictures; expected 1 or more, or all"):
        number_or_all(text)


def test_a_manifest_keeps_what_was_chosen_and_a_level_of_0_is_chosen() -> None:
    job = TrtJob(Path("m.onnx"), optimization_level=0, tf32=True)
    assert kept(job) == {"optimization_level": 0, "tf32": True}
    assert kept(TrtJob(Path("m.onnx"))) == {}


def test_every_option_has_a_sentence_or_is_one_of_several_flags() -> None:
    plain = [name for name, opt in opts_of(TrtJob).items() if not (opt.help or opt.each)]
    assert plain == []
