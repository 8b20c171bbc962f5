"""The nouns cannot be wrong: what they print they read, what makes no sense is one message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.errors import SpecError
from msn_export.spec import (
    AttentionForm,
    BatchRange,
    ComputeCapability,
    Head,
    ImageSize,
    InputFormat,
    Target,
    Targets,
    parse_bytes,
)

PARSERS = (BatchRange.parse, ImageSize.parse, ComputeCapability.parse, parse_bytes)


def message_of(parse, text: str) -> str:
    with pytest.raises(SpecError) as raised:
        parse(text)
    return str(raised.value)


# --- batch ----------------------------------------------------------------------------------------

sizes = st.integers(1, 999_999)


@given(st.lists(sizes, min_size=3, max_size=3).map(sorted))
def test_a_batch_range_reads_what_it_prints(ordered) -> None:
    batch = BatchRange(*ordered)
    assert BatchRange.parse(str(batch)) == batch
    assert batch.is_static == (batch.min == batch.max)


@given(sizes)
def test_one_number_is_a_static_batch(size) -> None:
    assert BatchRange.parse(str(size)) == BatchRange(size, size, size)


@given(st.lists(st.integers(0, 999), min_size=3, max_size=3))
def test_a_batch_range_is_ordered_or_refused(given_sizes) -> None:
    low, opt, high = given_sizes
    if 1 <= low <= opt <= high:
        assert BatchRange.parse(f"{low}:{opt}:{high}").opt == opt
    else:
        assert message_of(BatchRange.parse, f"{low}:{opt}:{high}") == (
            f"batch range {low}:{opt}:{high} is not ordered; expected 1 <= MIN <= OPT <= MAX"
        )


@pytest.mark.parametrize(
    "text", ["", "x", "1:2", "9:1", "1:2:3:4", "-1", "1.5", " 1", "1\n", "٣", "1:8:", "1234567"]
)
def test_what_is_no_batch_says_what_one_is(text) -> None:
    assert message_of(BatchRange.parse, text) == (
        f"batch {text!r} is not a size; expected N or MIN:OPT:MAX, as in 1:8:32"
    )


def test_zero_images_are_no_batch() -> None:
    assert "batch range 0:0:0 is not ordered" in message_of(BatchRange.parse, "0")


# --- image size -----------------------------------------------------------------------------------

sides = st.integers(1, 16384)


@given(sides, sides)
def test_an_image_size_reads_what_it_prints(height, width) -> None:
    size = ImageSize(height, width)
    assert ImageSize.parse(str(size)) == size
    assert ImageSize.parse(str(height)) == ImageSize(height, height)


@pytest.mark.parametrize("text", ["", "x", "224x", "x224", "224x224x3", "224X224", "-1", "2.5"])
def test_what_is_no_size_says_what_one_is(text) -> None:
    assert message_of(ImageSize.parse, text) == (
        f"image size {text!r} is not a size; expected N or HxW, as in 224 or 224x320"
    )


@pytest.mark.parametrize(
    ("text", "shown"), [("0", "0x0"), ("1x0", "1x0"), ("16385", "16385x16385")]
)
def test_a_size_nobody_has_is_refused(text, shown) -> None:
    assert message_of(ImageSize.parse, text) == (
        f"image size {shown} is out of range; expected 1 to 16384 pixels a side"
    )


# --- compute capability ---------------------------------------------------------------------------


@given(st.integers(0, 99), st.integers(0, 9))
def test_a_compute_capability_reads_what_it_prints(major, minor) -> None:
    capability = ComputeCapability(major, minor)
    assert ComputeCapability.parse(str(capability)) == capability


@pytest.mark.parametrize("text", ["89", "sm_89", "SM89", "8.9"])
def test_a_capability_may_be_written_as_compilers_write_it(text) -> None:
    assert ComputeCapability.parse(text) == ComputeCapability(8, 9)
    assert ComputeCapability.parse("120") == ComputeCapability(12, 0)


def test_capabilities_are_ordered_as_numbers_not_as_text() -> None:
    texts = ["12.0", "8.9", "9.0", "8.6", "10.0"]
    assert [str(c) for c in sorted(map(ComputeCapability.parse, texts))] == [
        *("8.6", "8.9", "9.0", "10.0", "12.0"),
    ]


@pytest.mark.parametrize("text", ["", "8.90", "sm-89", "8900", "8", "8.", ".9", "8,9", "100.0"])
def test_what_is_no_capability_says_what_one_is(text) -> None:
    assert message_of(ComputeCapability.parse, text) == (
        f"compute capability {text!r} is not a version; expected as in 8.9"
    )


# --- bytes ----------------------------------------------------------------------------------------

UNITS = {
    "": 1,
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "G": 2**30,
    "m": 2**20,
}


@given(st.integers(1, 10**15 - 1), st.sampled_from(sorted(UNITS)), st.sampled_from(["", " "]))
def test_an_amount_of_memory_is_the_number_times_its_unit(number, unit, space) -> None:
    assert parse_bytes(f"{number}{space}{unit}") == number * UNITS[unit]


@pytest.mark.parametrize("text", ["", "0", "0GiB", "much", "4GB", "4iB", "-1", "1.5GiB", "GiB"])
def test_what_is_no_amount_says_what_one_is(text) -> None:
    assert message_of(parse_bytes, text) == (
        f"{text!r} is no amount of memory; expected as in 4GiB or 512MiB"
    )


# --- all of them ----------------------------------------------------------------------------------


@given(st.sampled_from(PARSERS), st.text() | st.from_regex(r"\A[-0-9:x. KMGTiB]{1,12}\Z"))
def test_whatever_is_typed_is_read_or_refused_in_one_line(parse, text) -> None:
    try:
        parse(text)
    except SpecError as error:
        assert "expected" in str(error)
        assert len(str(error).splitlines()) == 1


def test_every_head_has_an_output_of_its_own() -> None:
    assert {head: head.output for head in Head} == {
        Head.CLS: "embedding",
        Head.MEAN: "mean_embedding",
        Head.TOKENS: "last_hidden_state",
        Head.LOGITS: "logits",
        Head.FEATURES: "features",
        Head.ATTENTION: "attention",
    }


def test_every_target_has_an_opset_that_its_attention_exists_in() -> None:
    for target in Target:
        assert target.opset in {17, 23}
        if target.attention is not AttentionForm.PLAIN:
            assert target.opset >= 23


def test_portable_has_another_name() -> None:
    assert Target("tensorrt-8") is Target.PORTABLE
    assert Target.of("tensorrt-8") is Target.PORTABLE  # in a manifest that was written before
    assert (Target.of("portable"), Target.of("tensorrt-rtx")) == (Target.PORTABLE, None)
    with pytest.raises(ValueError, match="'tensorrt-9' is not a valid Target"):
        Target("tensorrt-9")


def test_inputs_are_named_after_what_they_hold() -> None:
    assert InputFormat.FLOAT.tensor == "pixel_values"
    assert InputFormat.UINT8.tensor == "images"


# --- GPUs -----------------------------------------------------------------------------------------

ADA, HOPPER = ComputeCapability(8, 9), ComputeCapability(9, 0)


def test_an_engine_is_for_the_generations_it_names() -> None:
    targets = Targets((ComputeCapability(8, 6), ADA))
    assert ADA in targets
    assert HOPPER not in targets
    assert str(targets) == "SM 8.6, 8.9"


def test_an_engine_for_later_gpus_too_is_for_no_earlier_one() -> None:
    targets = Targets((ComputeCapability(8, 0),), later=True)
    assert HOPPER in targets
    assert ComputeCapability(7, 5) not in targets
    assert str(targets) == "SM 8.0 and later"


def test_where_nothing_is_named_nothing_is_known() -> None:
    assert not Targets()
    assert HOPPER not in Targets(later=True)
    assert str(Targets()) == "its builder's GPU"
