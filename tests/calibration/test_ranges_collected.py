"""What a graph computes inside is seen batch by batch, the same whichever way images are dealt."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from msn_export.calibration import ranges
from msn_export.calibration.ranges import (
    Histogram,
    Watch,
    finite,
    histograms,
    require_finite,
)
from msn_export.errors import GraphError
from msn_export.graph import io
from msn_export.graph.precision import floats_of
from tests.builders.calibrated_graphs import feeds, planned, vit
from tests.builders.graphs import parse, run

IMAGES = feeds(10)["x"]


def batches(size: int, images=IMAGES) -> Iterator[tuple[np.ndarray, list[str]]]:
    for start in range(0, len(images), size):
        part = images[start : start + size]
        yield part, [f"{start + i}.png" for i in range(len(part))]


def observed(model, name: str) -> np.ndarray:
    copy = model.clone()
    copy.graph.outputs[:] = [v for node in copy.graph for v in node.outputs if v.name == name]
    return run(copy, {"x": IMAGES})


def test_it_shows_the_values_of_the_tensors_that_are_named(tmp_path) -> None:
    model = vit(tmp_path)
    names = ["blocks.1.gelu_out", "blocks.0.norm1_out"]
    seen = Watch(model, names, tmp_path)(IMAGES)
    assert list(seen) == names
    for name in names:
        np.testing.assert_allclose(seen[name], observed(model, name), rtol=1e-4, atol=1e-5)


def test_an_input_can_be_watched(tmp_path) -> None:
    np.testing.assert_array_equal(Watch(vit(tmp_path), ["x"], tmp_path)(IMAGES)["x"], IMAGES)


def test_the_graph_is_as_it_was_and_nothing_is_left(tmp_path) -> None:
    model = vit(tmp_path)
    (tmp_path / "vit.onnx").unlink()
    before = [node.name for node in model.graph]
    Watch(model, ["blocks.0.norm1_out"], tmp_path)
    assert [node.name for node in model.graph] == before
    assert [value.name for value in model.graph.outputs] == ["norm_out"]
    assert list(tmp_path.iterdir()) == []


def test_what_lies_behind_the_last_tensor_is_not_run(tmp_path) -> None:
    model = parse("g (float[b,2] x) => (float[b,2] y) { m = Relu (x)  y = Log (m) }")
    model.graph[1].op_type = "Unknown"
    seen = Watch(model, ["m"], tmp_path)(np.array([[-1.0, 2.0]], np.float32))
    assert seen["m"].tolist() == [[0.0, 2.0]]


def test_ranges_are_those_of_all_values_at_once(tmp_path) -> None:
    plan = planned(tmp_path)
    names = list(plan.watched)
    found = histograms(Watch(plan.model, names, tmp_path), batches(3))
    for name in names:
        whole = Histogram()
        whole.add(observed(plan.model, name))
        assert found[name].counts.sum() == whole.counts.sum()
        # another session adds in another order: a value next to an edge may cross it
        assert found[name].peak == pytest.approx(whole.peak, rel=1e-5)
        assert np.abs(np.cumsum(found[name].counts - whole.counts)).max() <= 2


def test_the_largest_of_every_float_is_kept_where_asked_for(tmp_path) -> None:
    plan = planned(tmp_path)
    watch = Watch(plan.model, ["blocks.0.norm2_out"], tmp_path, maxima=True)
    for images, _ in batches(4):
        assert list(watch(images)) == ["blocks.0.norm2_out"]
    assert tuple(watch.maxima) == floats_of(plan.model)
    for name in ("blocks.0.norm2_out", "blocks.1.gelu_out", "norm_out"):
        want = np.abs(observed(plan.model, name)).max()
        assert watch.maxima[name] == pytest.approx(want, rel=1e-5)
    assert Watch(plan.model, ["norm_out"], tmp_path).maxima == {}


def test_a_maximum_that_is_no_number_stays_none(tmp_path) -> None:
    model = parse("g (float[b,2] x) => (float[b,2] y) { m = Log (x)  y = Relu (m) }")
    io.infer_shapes(model)
    watch = Watch(model, ["y"], tmp_path, maxima=True)
    watch(np.array([[-1.0, 2.0]], np.float32))
    watch(np.array([[1.0, 2.0]], np.float32))
    assert np.isnan(watch.maxima["m"])


def test_counts_go_on_in_histograms_of_earlier_images(tmp_path) -> None:
    watch = Watch(vit(tmp_path), ["x", "blocks.0.norm1_out"], tmp_path)
    found = {"x": histograms(watch, batches(4))["x"]}
    more = histograms(watch, batches(5, IMAGES[:5]), found=found)
    assert more is found
    assert found["x"].counts.sum() == IMAGES.size * 3 // 2


def test_progress_hears_of_every_batch(tmp_path) -> None:
    heard: list[int] = []
    histograms(Watch(vit(tmp_path), ["x"], tmp_path), batches(4), heard.append)
    assert heard == [4, 8, 10]


def test_a_fixed_batch_is_filled_up_and_the_filling_is_not_counted(tmp_path) -> None:
    watch = Watch(vit(tmp_path, batch=4), ["x"], tmp_path)
    assert watch.batch == 4
    found = histograms(watch, batches(4))
    assert found["x"].counts.sum() == IMAGES.size


def test_the_batch_depends_on_the_graph_alone(tmp_path, monkeypatch) -> None:
    model = vit(tmp_path)
    assert Watch(model, ["x"], tmp_path).batch == 8
    # one image's gelu is 5 x 128 floats
    monkeypatch.setattr(ranges, "_BATCH_BYTES", 3 * 4 * 5 * 128 + 1)
    assert Watch(model, ["blocks.0.gelu_out"], tmp_path).batch == 3
    monkeypatch.setattr(ranges, "_BATCH_BYTES", 3 * 4 * 5 * 128 - 1)
    assert Watch(model, ["blocks.0.gelu_out"], tmp_path).batch == 2
    monkeypatch.setattr(ranges, "_BATCH_BYTES", 1)
    assert Watch(model, ["blocks.0.gelu_out"], tmp_path).batch == 1


def test_the_batch_leaves_room_for_scores_and_probabilities(tmp_path, monkeypatch) -> None:
    model = parse("g (float[b,2,5,4] x) => (float[b,2,5,4] y) { y = Attention (x, x, x) }")
    each = 2 * 4 * 2 * 5 * 5  # two of float32 [2, 5, 5]
    monkeypatch.setattr(ranges, "_BATCH_BYTES", 3 * each)
    assert Watch(model, ["y"], tmp_path).batch == 3
    monkeypatch.setattr(ranges, "_BATCH_BYTES", 3 * each - 1)
    assert Watch(model, ["y"], tmp_path).batch == 2


def test_outputs_that_are_not_finite_name_the_first_tensor_and_image(tmp_path) -> None:
    model = parse("g (float[b,2] x) => (float[b,2] y) { m = Log (x)  y = Abs (m) }")
    images = np.array([[1, 2], [3, 4], [5, -1]], np.float32)
    outputs = {"y": np.abs(np.array([[0, 1], [1, 1], [2, np.nan]], np.float32))}
    labels = ["0.png", "1.png", "2.png"]

    def image(at: int) -> np.ndarray:
        return images[at : at + 1]

    with pytest.raises(GraphError, match=r"tensor 'm' is NaN on image 2\.png; "):
        require_finite(model, outputs, labels, image, tmp_path)
    require_finite(model, {"y": np.ones((3, 2), np.float32)}, labels, image, tmp_path)
    with pytest.raises(GraphError, match=r"tensor 'y' is NaN on image 2\.png; "):  # not again
        require_finite(model, outputs, labels, lambda _at: images[:1], tmp_path)


@pytest.mark.parametrize(
    ("text", "what"), [("y = Log (x)", "NaN"), ("y = Reciprocal (x)", "infinite")]
)
def test_a_value_that_is_not_finite_names_tensor_and_image(tmp_path, text, what) -> None:
    model = parse(f"g (float[b,2] x) => (float[b,2] y) {{ {text} }}")
    images = np.ones((5, 2), np.float32)
    images[3, 1] = -1.0 if what == "NaN" else 0.0
    watch = Watch(model, ["y"], tmp_path)
    message = (
        f"tensor 'y' is {what} on image 3.png; nothing can be calibrated on that: check the "
        "weights and the preprocessing"
    )
    with pytest.raises(GraphError, match=re.escape(message)):
        histograms(watch, batches(2, images))


def test_finite_values_pass_through() -> None:
    seen = {"a": np.ones((2, 3), np.float32)}
    assert finite(seen, ["x", "y"]) is seen


def test_a_quantised_graph_runs_as_it_is_written(tmp_path: Path) -> None:
    """onnxruntime's own 8-bit kernels would saturate sums or round otherwise."""
    model = parse("""
        g (float[b,2] x) => (float[b,2] y)
        <float s = {0.5}, int8 z = {0}, int8[2,2] w = {127, 127, -127, 3},
         float[2] t = {0.01, 0.02}>
        {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            m = DequantizeLinear <axis = 1> (w, t)
            y = MatMul (d, m)
        }""")
    x = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32) * 20
    carried = np.clip(np.rint(x / 0.5), -128, 127) * 0.5
    wanted = carried @ (np.array([[127, 127], [-127, 3]]) * [0.01, 0.02])
    np.testing.assert_allclose(Watch(model, ["y"], tmp_path)(x)["y"], wanted, rtol=1e-5)
