"""A candidate is run over the reference's pictures at each batch size, and compared."""

from dataclasses import replace

import numpy as np
import pytest

from msn_export.errors import ToleranceError
from msn_export.metrics.evaluate import (
    Recalibrated,
    Reference,
    Sample,
    Trial,
    add_rounding,
    compare_alone,
    draw,
    evaluate,
    measure_rounding,
    run_reference,
)
from msn_export.metrics.metrics import Errors
from msn_export.metrics.tolerances import Gate
from msn_export.preprocessing import preset
from msn_export.spec import ImageSize, InputFormat

PREPROCESSING = preset("hf", ImageSize(4, 4))


class Doubling:
    """Stands for a model: its outputs tell each image and, in ``shift``, how wrong it is."""

    def __init__(self, shift: float = 0.0, outputs: tuple[str, ...] = ("a", "b")) -> None:
        self.name = "doubling"
        self.shift = shift
        self.outputs = outputs
        self.batches: list[int] = []

    def __call__(self, images):
        self.batches.append(len(images))
        flat = images.reshape(len(images), -1).astype(np.float32)
        return dict.fromkeys(self.outputs, flat * 2 + self.shift)


GATE = Gate(max_abs=1e-4)


@pytest.fixture
def sample() -> Sample:
    drawn = draw(None, PREPROCESSING)
    return replace(drawn, pixels=np.concatenate([drawn.pixels] * 5)[:19], names=("x",) * 19)


def reference_of(sample: Sample) -> Reference:
    return run_reference(Doubling(), sample)


def test_the_reference_runs_each_picture_once_as_wide_as_memory_affords(sample) -> None:
    runner = Doubling()
    reference = run_reference(runner, sample)
    assert runner.batches == [8, 8, 3]
    assert reference.name == "doubling"
    assert reference.outputs["a"].shape == (19, 48)
    narrow = Doubling()
    run_reference(narrow, replace(sample, max_batch=2))
    assert narrow.batches == [2] * 9 + [1]


def test_the_rounding_is_that_of_the_run_that_rounds_most(sample) -> None:
    known = measure_rounding(run_reference(Doubling(1e-3), sample), Doubling(), 5)
    assert len(known.exact["a"]) == 5
    less, more = add_rounding(known, Doubling(1e-4)), add_rounding(known, Doubling(-1e-2))
    assert less.rounding == known.rounding
    for name, rounding in more.rounding.items():
        assert rounding.relative == pytest.approx(10 * known.rounding[name].relative, rel=1e-3)


def test_a_candidate_runs_every_size_and_is_compared_image_by_image(sample) -> None:
    runner = Doubling()
    found = evaluate(runner, reference_of(sample), InputFormat.FLOAT, [1, 4, 8], GATE)
    assert runner.batches == [1, 4, 8, 8]  # 19 images, and two that start over
    assert found.sizes == (1, 4, 8)
    assert found.outputs.keys() == {"a", "b"}
    for agreement in found.outputs.values():
        assert agreement.images == 19  # pictures, however often each was run
        assert agreement.max_abs == 0


def test_what_ran_once_is_compared_as_often_as_what_ran_at_every_size(sample) -> None:
    reference, runner = reference_of(sample), Doubling(0.5)
    sizes = [1, 4, 16]  # 19 images: two of them come twice, and weigh twice
    ran, repeated = Trial(), Trial()
    ran.run(runner, reference, InputFormat.FLOAT, sizes)
    repeated.repeat(run_reference(runner, sample).outputs, reference, sizes)
    assert repeated.rows == ran.rows
    assert len(ran.rows) == 21
    assert repeated.errors() == ran.errors()
    once = Trial()
    once.run(runner, reference, InputFormat.FLOAT, [19])
    assert once.errors() != ran.errors()


def test_a_second_baseline_bounds_the_error_of_all_images_together_alone(sample) -> None:
    first = Errors(1e-2, 2e-2, 1e-2, 2e-2, 3e-2, 4e-2)
    reference = replace(reference_of(sample), baseline={"a": first}, baseline_name="the first")
    plain = reference.limit("a")
    assert plain is not None
    assert reference.limits_from == "1.5 times the errors of the first"

    def bounded(relative: float, margin: float) -> Reference:
        again = Recalibrated({"a": Errors(relative, relative)}, "the second", margin)
        return replace(reference, recalibrated=again)

    limit = bounded(4e-3, 2.0).limit("a")
    assert limit is not None
    assert limit.errors == replace(plain.errors, relative=pytest.approx(8e-3))
    assert bounded(4e-3, 2.0).limits_from == (
        "1.5 times the errors of the first; over all images together 2 times that of the second"
    )
    assert bounded(2e-2, 1.5).limit("a") == plain  # the smaller of the two counts


def test_only_pictures_that_were_computed_in_fp64_are_judged_as_such(sample) -> None:
    reference = reference_of(sample)
    exact = reference.outputs["a"][:3].astype(np.float64) + 1
    reference = replace(reference, exact={"a": exact})
    found = evaluate(Doubling(), reference, InputFormat.FLOAT, [1], GATE).outputs
    assert found["a"].relative == pytest.approx(np.sqrt(3 * 48 / np.square(exact).sum()))
    assert (found["a"].others, found["b"].others) == (Errors(0, 0), None)


def test_images_in_another_order_do_not_agree(sample) -> None:
    class Reversing(Doubling):
        def __call__(self, images):
            return {name: output[::-1] for name, output in super().__call__(images).items()}

    found = evaluate(Reversing(), reference_of(sample), InputFormat.FLOAT, [4], GATE)
    assert found.outputs["a"].max_abs > 0.1


def test_the_record_has_the_worst_figures_and_each_outputs_own(sample) -> None:
    class Uneven(Doubling):
        def __call__(self, images):
            outputs = super().__call__(images)
            return {**outputs, "b": outputs["b"] + 0.5, "extra": outputs["a"]}

    found = evaluate(Uneven(), reference_of(sample), InputFormat.FLOAT, [2], Gate(max_abs=1.0))
    record = found.require("the graph")
    assert record.passed
    assert record.max_abs == pytest.approx(0.5)
    assert record.outputs["a"]["max_abs"] == 0
    assert record.outputs["b"]["max_abs"] == pytest.approx(0.5)
    assert record.outputs.keys() == {"a", "b"}
    assert (record.images, record.source) == (19, "seeded noise (no --images given)")
    assert (record.reference, record.executed_on, record.batches) == ("doubling", "doubling", (2,))


def test_a_gate_that_does_not_hold_names_the_output(sample) -> None:
    found = evaluate(
        Doubling(0.5), reference_of(sample), InputFormat.FLOAT, [8], Gate(max_abs=1e-4)
    )
    assert not found.check.passed
    with pytest.raises(ToleranceError) as raised:
        found.require("the fp32 graph")
    assert str(raised.value).startswith(
        "the fp32 graph, output 'a', does not agree with its reference: max_abs 5.00e-01, "
    )


def test_a_missing_output_and_a_shape_of_its_own_are_told(sample) -> None:
    with pytest.raises(ToleranceError, match="the candidate has no output 'b'; it has a, c"):
        evaluate(Doubling(outputs=("a", "c")), reference_of(sample), InputFormat.FLOAT, [8], GATE)

    class Short(Doubling):
        def __call__(self, images):
            return {name: x[:, :-1] for name, x in super().__call__(images).items()}

    with pytest.raises(ToleranceError, match=r"output has shape \[8, 47\] and its reference"):
        evaluate(Short(), reference_of(sample), InputFormat.FLOAT, [8], GATE)


# --- images that change each other's results ------------------------------------------------------


class Joining(Doubling):
    """Adds a share of the batch's mean to each image: what an image gives alone stays right."""

    def __init__(self, share: float) -> None:
        super().__init__(outputs=("a",))
        self.share = share

    def __call__(self, images):
        (found,) = super().__call__(images).values()
        return {"a": found + self.share * (found.mean(axis=0) - found)}


def test_pictures_run_alone_in_the_smallest_batch_and_beside_others_in_the_largest(sample) -> None:
    runner = Doubling()
    found = compare_alone(runner, sample, InputFormat.FLOAT, (2, 4, 16), ("a",))
    assert runner.batches == [2] * 8 + [16]
    assert list(found) == ["a"]
    assert (found["a"].images, found["a"].relative) == (8, 0)


def test_a_largest_batch_below_eight_is_filled_several_times(sample) -> None:
    runner = Doubling()
    found = compare_alone(runner, sample, InputFormat.FLOAT, (1, 3), ("a",))
    assert runner.batches == [1] * 8 + [3, 3, 3]
    assert found["a"].relative == 0


@pytest.mark.parametrize(("size", "images"), [(3, 8), (16, 4), (64, 2)])
def test_a_batch_of_one_size_alone_holds_a_picture_and_its_copies(sample, size, images) -> None:
    runner = Joining(0.1)
    found = compare_alone(runner, sample, InputFormat.FLOAT, (size,), ("a",))
    assert runner.batches[:images] == [size] * images
    assert found["a"].images == images
    assert found["a"].relative > 0.01


@pytest.mark.parametrize("apart", [1, 8, 16, 31])
def test_images_that_are_any_number_of_places_apart_are_seen_to_join(sample, apart) -> None:
    class Rolling(Doubling):
        def __call__(self, images):
            (found,) = super().__call__(images).values()
            return {"a": found + 0.1 * np.roll(found, apart, axis=0)}

    runner = Rolling(outputs=("a",))
    found = compare_alone(runner, sample, InputFormat.FLOAT, (1, 32), ("a",))
    assert found["a"].image > 0.01


@pytest.mark.parametrize(("margin", "allowed"), [(1.0, 1e-3), (1.5, 1.5e-3), (2.5, 1.5e-3)])
def test_an_image_may_change_by_what_its_precision_costs_and_no_more(
    sample, margin, allowed
) -> None:
    right, joining = Doubling(outputs=("a",)), Joining(0.1)
    reference = run_reference(right, sample)
    reference = replace(reference, baseline={"a": Errors(1e-3, 1.0)}, margin=margin)
    sizes = (1, 8)
    found = evaluate(right, reference, InputFormat.FLOAT, sizes, Gate(relative=1.0))
    assert found.with_alone(joining, InputFormat.FLOAT, sizes, "") is found  # none may join them
    found = found.with_alone(joining, InputFormat.FLOAT, sizes, "ReduceMean 'm'")
    assert found.disagreements == ()
    assert found.dependences == (
        "output 'a': an image's result depends on the batch it is in: relative error "
        f"{found.alone['a'].relative:.2e}, {allowed:.1e} allowed",
    )
    assert found.failures == found.dependences
    assert not found.check.passed
    about = (
        f"8 images beside others and alone differ by {found.alone['a'].relative:.1e}; they were "
        "compared because ReduceMean 'm' is not shown to keep them apart"
    )
    assert found.about_joins == about


@pytest.mark.parametrize("asked", [{"max_abs": 1e-4}, {"cosine_p1": 0.9999}])
def test_numbers_that_were_asked_for_are_asked_of_images_alone_too(sample, asked) -> None:
    right = Doubling(outputs=("a",))
    gate = Gate(**asked, asked=tuple(asked))
    found = evaluate(right, run_reference(right, sample), InputFormat.FLOAT, (1, 8), gate)
    assert found.with_alone(Joining(0.3), InputFormat.FLOAT, (1, 8), "a node").dependences
    assert not found.with_alone(right, InputFormat.FLOAT, (1, 8), "a node").dependences


def test_where_images_may_join_fp64_runs_in_the_batches_of_fp32(sample) -> None:
    """Else the rounding would hold what the images do to each other."""
    joining = Joining(0.1)
    pixels = np.random.default_rng(0).integers(0, 256, sample.pixels.shape, np.uint8)
    reference = run_reference(joining, replace(sample, pixels=pixels))
    exact = measure_rounding(reference, joining, 19, joins="a node")
    assert len(exact.exact["a"]) == 16
    assert exact.rounding["a"].relative < 1e-6
    assert measure_rounding(reference, joining, 4, joins="a node").rounding["a"].relative < 1e-6
    assert measure_rounding(reference, joining, 4).rounding["a"].relative > 1e-3
