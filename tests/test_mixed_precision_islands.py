"""Which tensors stay fp32 is measured on images, read from a file, or none."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from msn_export.errors import GraphError
from msn_export.graph.precision import MAXIMA, choose, observe
from msn_export.metrics.evaluate import Sample
from msn_export.metrics.tolerances import HEADROOM
from msn_export.mixed_precision import choose_fp32_islands, measure
from msn_export.preprocessing import preset
from msn_export.spec import Dtype, ImageSize, InputFormat
from tests.builders.graphs import parse, run

MODEL = """
g (float[b,3,2,2] x) => (float[b,3,2,2] y) <float gain = {30000.0}>
{
    big = Mul (x, gain)
    y = Tanh (big)
}
"""


@pytest.fixture
def sample() -> Sample:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 3), dtype=np.uint8)
    return Sample(pixels, ("a", "b", "c"), "test", preset("hf", ImageSize(2, 2)))


def test_observing_gives_the_maxima_alone_and_leaves_the_graph_as_it_was() -> None:
    model = parse(MODEL)
    observed = observe(model)
    assert observed.names == ("big", "y")
    assert [value.name for value in observed.model.graph.outputs] == [MAXIMA]
    assert len(model.graph) == 2
    x = np.full((1, 3, 2, 2), -2.0, np.float32)
    np.testing.assert_array_equal(run(observed.model, {"x": x}), np.float32([60000, 1]))


def test_every_value_of_an_untyped_graph_is_observed() -> None:
    """A foreign graph may tell the types of its inputs and outputs alone."""
    bare = parse(MODEL)
    for node in bare.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None
    assert observe(bare).names == ("big", "y")


def test_maxima_are_the_largest_over_all_batches(sample, tmp_path) -> None:
    x = sample.preprocess(range(3), InputFormat.FLOAT)
    for max_batch in (1, 2, 8):
        some = replace(sample, max_batch=max_batch)
        peaks = measure(parse(MODEL), some, InputFormat.FLOAT, tmp_path)
        assert peaks == {"big": np.abs(x * np.float32(30000)).max(), "y": 1.0}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_graph_of_one_batch_size_is_measured_at_it(sample, tmp_path, batch) -> None:
    """Two do not divide three images, five are more than there are."""
    fixed = parse(MODEL.replace("float[b,", f"float[{batch},"))
    peaks = measure(fixed, sample, InputFormat.FLOAT, tmp_path)
    assert peaks == measure(parse(MODEL), sample, InputFormat.FLOAT, tmp_path)


def test_what_comes_within_the_headroom_of_overflow_stays_fp32() -> None:
    # 65504 / 4 = 16376
    maxima = {"low": 16000.0, "high": 17000.0, "unknown": float("nan")}
    assert choose(maxima, headroom=HEADROOM).keys() == {"high", "unknown"}
    assert choose(maxima, headroom=1.0).keys() == {"unknown"}


def test_none_and_bf16_have_no_islands(sample, tmp_path) -> None:
    for choice, dtype in (("none", Dtype.FP16), ("measured", Dtype.BF16)):
        assert (
            choose_fp32_islands(parse(MODEL), choice, dtype, sample, InputFormat.FLOAT, tmp_path)
            == {}
        )


def test_islands_come_from_a_file(sample, tmp_path) -> None:
    path = tmp_path / "islands.json"
    path.write_text(json.dumps({"big": 70000, "weight": None}))  # as a manifest has them
    chosen = choose_fp32_islands(
        parse(MODEL), str(path), Dtype.FP16, sample, InputFormat.FLOAT, tmp_path
    )
    assert chosen == {"big": 70000.0, "weight": math.inf}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "is not a JSON object of tensor name to largest value"),
        ('{"a": true}', "is not a JSON object of tensor name to largest value"),
        ('{"a": ' + "9" * 401 + "}", "is not a JSON object of tensor name to largest value"),
        ("[" * 100_000, "is not JSON"),
        ("{", "is not JSON"),
        (None, "does not exist"),
    ],
)
def test_a_bad_islands_file_is_named(text, message, sample, tmp_path) -> None:
    path = tmp_path / "islands.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(GraphError, match=f"islands file .*islands.json {message}"):
        choose_fp32_islands(
            parse(MODEL), str(path), Dtype.FP16, sample, InputFormat.FLOAT, tmp_path
        )
