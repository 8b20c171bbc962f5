"""A ranges file says what it was taken of, reads back as it was written, and refuses the rest."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msn_export.calibration import ranges as ranges_file
from msn_export.calibration.ranges import (
    BINS,
    Histogram,
    ImagesRecord,
    Ranges,
    SmoothingRecord,
    TensorRange,
)
from msn_export.errors import GraphError, ManifestError, SpecError
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize

HF = preset("hf", ImageSize(32, 32))
PATH = Path("r.json")


def counted(*values: float) -> Histogram:
    histogram = Histogram()
    histogram.add(np.asarray(values, np.float32))
    return histogram


def ranges(**changes: Any) -> Ranges:
    taken = Ranges(
        graph="a" * 64,
        images=ImagesRecord("pictures", 512, 0, ("0123", "4567"), ("broken.png",)),
        preprocessing=HF,
        smoothing=SmoothingRecord(0.5, {"x": (1, -2, 0)}, {"off": 0.1, "0.5": 0.05}),
        tensors={"x": TensorRange.of(counted(1.0, -2.5)), "zero": TensorRange.of(counted(0.0))},
    )
    return replace(taken, **changes)


def written(tmp_path: Path, **changes: Any) -> Path:
    """Write ranges with some plain values replaced."""
    path = tmp_path / "r.json"
    ranges_file.write(ranges(), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def test_they_read_back_as_they_were_written(tmp_path) -> None:
    ranges_file.write(ranges(), tmp_path / "r.json")
    assert ranges_file.read(tmp_path / "r.json") == ranges()


def test_the_same_ranges_are_the_same_bytes(tmp_path) -> None:
    for name in ("a", "b"):
        ranges_file.write(ranges(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_histogram_survives(tmp_path) -> None:
    ranges_file.write(ranges(), tmp_path / "r.json")
    got = ranges_file.read(tmp_path / "r.json").histograms({"x": ""}, PATH)["x"]
    wanted = counted(1.0, -2.5)
    assert (got.peak, got.limit) == (wanted.peak, wanted.limit) == (2.5, 4.0)
    np.testing.assert_array_equal(got.counts, wanted.counts)


def test_ranges_of_another_graph_are_refused() -> None:
    ranges().require("a" * 64, HF, PATH)
    with pytest.raises(
        GraphError,
        match=r"--ranges r\.json were taken of another graph \(sha256 aaaaaaaaaaaa…, this one has "
        r"bbbbbbbbbbbb…\); leave --ranges out to take them anew",
    ):
        ranges().require("b" * 64, HF, PATH)


def test_ranges_of_other_preprocessing_are_refused() -> None:
    other = preset("msn-eval", ImageSize(32, 32))
    with pytest.raises(
        GraphError,
        match=r"were taken with preprocessing hf: resized .*, this graph has msn-eval: .*; leave",
    ):
        ranges().require("a" * 64, other, PATH)


@pytest.mark.parametrize(
    ("option", "who"), [("--quantize-attention", "--quantize-attention"), ("", "this graph")]
)
def test_a_tensor_that_was_not_seen_is_named_with_who_needs_it(option, who) -> None:
    with pytest.raises(GraphError, match=rf"r\.json have no tensor 'q', which {who} needs; leave"):
        ranges().histograms({"x": "", "q": option}, PATH)


def test_what_is_no_ranges_file_is_refused(tmp_path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "manifest.json").write_text('{"kind": "onnx"}')
    (tmp_path / "half.json").write_text('{"kind": "ra')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name, message in {
        "list.json": "list.json is no ranges file; expected one that calibrate wrote",
        "manifest.json": "manifest.json is no ranges file; expected one that calibrate wrote",
        "half.json": r"half.json is not JSON .Unterminated string",
        "deep.json": r"deep.json is not JSON .maximum recursion depth",
        "none.json": r"none.json does not exist",
    }.items():
        with pytest.raises(ManifestError, match=message):
            ranges_file.read(tmp_path / name)


def test_a_file_larger_than_ranges_can_be_is_not_read(tmp_path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(ManifestError, match=r"large\.json is larger than a ranges file can be"):
        ranges_file.read(tmp_path / "large.json")


def test_a_later_schema_is_refused(tmp_path) -> None:
    with pytest.raises(ManifestError, match="has schema 99, this version reads up to 1; upgrade"):
        ranges_file.read(written(tmp_path, schema=99))


def damaged(**changes: Any) -> dict[str, Any]:
    plain = {"peak": 2.5, "limit": 4.0, "counts": [0] * BINS}
    plain["counts"][2560] = 1
    plain["counts"][7] = 3
    return {"x": {**plain, **changes}}


HOSTILE: dict[str, dict[str, Any]] = {
    "few bins": damaged(counts=[1]),
    "negative": damaged(counts=[-1] * BINS),
    "past int64": damaged(counts=[*[0] * 2560, 2**63, *[0] * (BINS - 2561)]),
    "NaN": damaged(peak=float("nan")),
    "infinite": damaged(limit=float("inf")),
    "odd limit": damaged(limit=5.0),
    "peak above": damaged(peak=4.0),
    "least limit": damaged(peak=0.0, limit=5e-324),
    "no counts": damaged(counts=[0] * BINS),
    "values above the peak": damaged(peak=1.0),
}


def test_a_whole_histogram_is_read(tmp_path) -> None:
    got = ranges_file.read(written(tmp_path, tensors=damaged()))
    assert got.tensors["x"].peak == 2.5


@pytest.mark.parametrize("tensors", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_damaged_histogram_is_refused(tmp_path, tensors) -> None:
    with pytest.raises(
        ManifestError,
        match=r"r\.json\.tensors\.x.* (expected a finite number|expected an integer of 64 bits|"
        r"not a histogram of 4096 bins)",
    ):
        ranges_file.read(written(tmp_path, tensors=tensors))


@pytest.mark.parametrize(
    "smoothing",
    [{"strength": 0.5, "exponents": {"x": [1000]}}, {"strength": 2.0, "exponents": {"x": [1]}},
     {"strength": 0.5}],
    ids=["exponent", "strength", "nothing said"],
)  # fmt: skip
def test_damaged_smoothing_is_refused(tmp_path, smoothing) -> None:
    with pytest.raises(ManifestError, match=r"r\.json\.smoothing: not a smoothing: a strength fro"):
        ranges_file.read(written(tmp_path, smoothing=smoothing))


def test_a_record_that_is_none_cannot_be_made() -> None:
    with pytest.raises(SpecError, match="not a histogram of 4096 bins up to a power of two"):
        TensorRange(1.0, 3.0, (0,) * BINS)
