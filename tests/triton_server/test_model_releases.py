"""An engine needs the Triton that ships its TensorRT; a graph one whose onnxruntime knows it."""

import pytest

from msn_export.errors import SpecError
from msn_export.spec import Dtype, Target
from msn_export.triton_server.model import (
    RELEASES,
    Release,
    for_tensorrt,
    parse_release,
    same_tensorrt,
    takes,
)
from msn_export.version_table import numbers, row_of


def test_the_newest_release_with_the_engines_tensorrt_is_chosen() -> None:
    assert for_tensorrt("10.13.3.9").name == "25.10"
    assert for_tensorrt("10.14.1.48.post1").name == "26.01"
    assert for_tensorrt("8.6.3").image == "nvcr.io/nvidia/tritonserver:24.04-py3"


def test_a_tensorrt_that_no_release_has_names_the_nearest() -> None:
    with pytest.raises(SpecError) as error:
        for_tensorrt("10.12.0.36")
    assert str(error.value) == (
        "no Triton release is known to ship TensorRT 10.12.0.36 (25.08 ships 10.13.2.6 and 25.06 "
        "ships 10.11.0.33); build the engine with one of those, or name your release with "
        "--release YY.MM"
    )
    with pytest.raises(SpecError, match=r"\(26\.05 ships 10\.16\.1\.11\)"):
        for_tensorrt("11.4.0.1")


def test_versions_are_compared_up_to_the_patch() -> None:
    assert same_tensorrt("10.13.3.9", "10.13.3")
    assert not same_tensorrt("10.13.3.9", "10.13.2.6")
    assert not same_tensorrt(None, "10.13.2.6")
    assert not same_tensorrt("", "")
    assert numbers("10.9.0.34+cuda12") == (10, 9, 0, 34)


@pytest.mark.parametrize(
    ("target", "dtype", "first"),
    [
        (Target.ONNXRUNTIME, Dtype.FP32, "25.08"),
        (Target.TENSORRT, Dtype.FP16, "25.08"),
        (Target.ONNXRUNTIME, Dtype.INT8, "26.02"),  # onnxruntime 1.23, before, has no kernel
        (Target.TENSORRT, Dtype.INT8, "26.02"),
        (Target.PORTABLE, Dtype.FP32, "24.04"),
        (Target.PORTABLE, Dtype.INT8, "24.04"),
    ],
)
def test_a_release_takes_a_graph_that_its_onnxruntime_takes(target, dtype, first) -> None:
    row = row_of(target, dtype)
    assert {release.name for release in RELEASES if takes(release, row)} == {
        release.name for release in RELEASES if release.name >= first
    }


def test_what_is_not_known_is_not_judged() -> None:
    assert takes(parse_release("30.01"), row_of(Target.TENSORRT, Dtype.FP32)) is None
    assert takes(RELEASES[0], None) is None
    assert takes(RELEASES[0], row_of(Target.TENSORRT, Dtype.BF16)) is False  # on a CPU


@pytest.mark.parametrize("text", ["25.13", "25.1", "2.59", "latest", "25.10-py3", ""])
def test_what_is_no_release_is_refused(text) -> None:
    with pytest.raises(SpecError, match="is no release; expected YY"):
        parse_release(text)


def test_the_table_runs_from_new_to_old_without_a_gap_in_order() -> None:
    names = [release.name for release in RELEASES]
    assert names == sorted(names, reverse=True)
    known = [numbers(release.tensorrt) for release in RELEASES if release.tensorrt]
    assert known == sorted(known, reverse=True)
    assert parse_release("31.01") == Release("31.01", None, None)
