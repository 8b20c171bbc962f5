"""Passed means right: what is wrong fails in every precision, and what is sound does not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from msn_export import manifest
from msn_export.commands.calibrate import CalibrateJob, run_calibrate
from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.commands.validate import ValidateJob, run_validate
from msn_export.compare.sides import Validation
from msn_export.errors import ImageError, ToleranceError
from msn_export.runtime import open_runner
from msn_export.spec import BatchRange, Dtype, Head, InputFormat, Target
from tests.builders.checkpoints import TINY, hugging_face, processor
from tests.builders.tiny_artifacts import pictures
from tests.contracts import faults

BATCH = BatchRange(1, 2, 3)
EVERY = (Dtype.FP32, Dtype.FP16, Dtype.BF16, Dtype.INT8)


class Models:
    """Tiny checkpoints with their graphs, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = pictures(folder / "images", 12)
        self.large = pictures(folder / "large", 3)

    def checkpoint(self, name: str) -> Path:
        """``plain``, ``many`` (3137 tokens), ``sharp N`` (q, k of block 1 times N), ``mean N``."""
        folder = self.folder / name.replace(" ", "-")
        if folder.exists():
            return folder
        size = 448 if name == "many" else TINY["image_size"]
        hugging_face(folder, labels=4, image_size=size)
        processor(
            folder, size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        kind, _, number = name.partition(" ")
        state = load_file(folder / "model.safetensors")
        if kind == "sharp":
            for key in state:
                if ".1." in key and ("q_proj" in key or "k_proj" in key or "query" in key):
                    state[key] = state[key] * float(number)
        if kind == "mean":
            key = next(key for key in state if key.endswith("layernorm.bias"))
            state[key] += float(number) / TINY["hidden_size"] ** 0.5
        save_file(state, folder / "model.safetensors", {"format": "pt"})
        return folder

    def graph(
        self,
        name: str,
        dtype: Dtype,
        target: Target = Target.TENSORRT,
        input_format: InputFormat = InputFormat.FLOAT,
        heads: tuple[Head, ...] = (Head.CLS, Head.LOGITS),
    ) -> Path:
        """Export a checkpoint; 8 bits by calibration of the fp32 graph."""
        images = self.large if name == "many" else self.images
        batch = BatchRange(1, 1, 2) if name == "many" else BATCH
        output = self.folder / "-".join(
            (name.replace(" ", "-"), target, input_format, *heads, f"{dtype}.onnx")
        )
        if output.exists():
            return output
        if dtype.is_quantised:
            source = self.graph(name, Dtype.FP32, target, input_format, heads)
            job = CalibrateJob(
                source, dtype, images=images, output=output, compile=False, gate_cosine=0.9
            )
            return run_calibrate(job)[0]
        return run_onnx(
            OnnxJob(
                str(self.checkpoint(name)), output, heads=heads, input_format=input_format,
                target=target,
                dtype=dtype, images=images, batch=batch,
            )
        )[0]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Models(tmp_path_factory.mktemp("verdicts"))
    torch.set_num_threads(threads)


def validated(reference: Path, candidate: Path, images: Path, **options) -> Validation:
    return run_validate(ValidateJob(str(reference), str(candidate), images=images, **options))


def faulty(graph: Path, folder: Path, fault) -> Path:
    return faults.plant(graph, folder / "faulty.onnx", fault)


# --- what is sound passes -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("input_format", [InputFormat.FLOAT, InputFormat.UINT8])
@pytest.mark.parametrize("target", [Target.TENSORRT, Target.ONNXRUNTIME])
def test_a_graph_errs_as_much_as_its_precision_costs_the_checkpoint(
    dtype, input_format, target, models
) -> None:
    """The baseline is made of the checkpoint, apart from the candidate, and errs the same."""
    validation = validated(
        models.checkpoint("plain"),
        models.graph("plain", dtype, target, input_format),
        models.images,
    )
    assert validation.passed, validation.reasons
    check = validation.check
    assert check.twin_error == pytest.approx(check.relative, rel=0.1)
    assert check.limits_from.startswith("1.5 times the errors of the reference ")


@pytest.mark.parametrize("name", ["sharp 30", "sharp 100", "mean 10", "mean 30"])
@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.FP16, Dtype.BF16])
def test_sharp_attention_and_a_large_mean_are_no_fault(name, dtype, models) -> None:
    assert validated(models.checkpoint(name), models.graph(name, dtype), models.images).passed


# --- what is wrong fails --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("factor", [2.0, 0.5, 100.0, 1.05])
@pytest.mark.parametrize("output", ["embedding", "logits"])
def test_another_scale_is_another_output(dtype, factor, output, models, tmp_path) -> None:
    candidate = faulty(models.graph("plain", dtype), tmp_path, faults.scaled(output, factor))
    validation = validated(models.checkpoint("plain"), candidate, models.images)
    assert not validation.passed
    assert validation.reasons[0].startswith(f"output {output!r}: relative error ")


@pytest.mark.parametrize("dtype", [Dtype.FP16, Dtype.INT8])
@pytest.mark.parametrize("kind", ["halved", "negated", "zeroed", "rolled"])
def test_cls_is_judged_by_itself_among_3137_tokens(dtype, kind, models, tmp_path) -> None:
    graph = models.graph("many", dtype, heads=(Head.TOKENS,))
    candidate = faulty(graph, tmp_path, faults.changed_cls("last_hidden_state", kind))
    validation = validated(
        models.graph("many", Dtype.FP32, heads=(Head.TOKENS,)), candidate, models.large,
        limit=2, batch=BatchRange(1, 1, 1),
    )  # fmt: skip
    assert not validation.passed
    assert any("relative error of [CLS]" in reason for reason in validation.reasons)


@pytest.mark.parametrize("name", ["plain", "mean 30", "mean 10000"])
@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.FP16])
def test_what_ignores_its_image_fails_whatever_all_images_share(
    name, dtype, models, tmp_path
) -> None:
    graph = models.graph(name, Dtype.FP32)
    with open_runner(graph) as runner:
        rng = np.random.default_rng(0)
        mean = runner(rng.standard_normal((3, 3, 32, 32), np.float32))["embedding"].mean(axis=0)
    candidate = faulty(graph, tmp_path, faults.constant("embedding", mean))
    validation = validated(models.checkpoint(name), candidate, models.images, gate=dtype)
    assert not validation.passed


@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.FP16, Dtype.INT8])
def test_one_wrong_image_among_many_fails(dtype, models, tmp_path) -> None:
    with open_runner(models.graph("plain", Dtype.FP32)) as runner:
        paths = sorted(models.images.rglob("*.png"))
        means = np.sort([runner.preprocess([path]).mean() for path in paths])
    between = float(means[-2:].mean())  # the brightest alone is above
    candidate = faulty(
        models.graph("plain", dtype), tmp_path, faults.brightest_negated("embedding", between)
    )
    validation = validated(models.checkpoint("plain"), candidate, models.images)
    assert not validation.passed
    assert any("of the worst image" in reason for reason in validation.reasons)
    wrong = [image.name for image in validation.check.per_image if image.cosine < 0]
    assert len(wrong) == 1


# --- what was run is part of the verdict ----------------------------------------------------------


def test_the_verdict_counts_what_was_run_of_what_was_given(models) -> None:
    some = validated(
        models.checkpoint("plain"), models.graph("plain", Dtype.FP16), models.images, limit=5
    )
    assert (some.check.images, some.check.given) == (5, 12)
    whole = validated(
        models.checkpoint("plain"), models.graph("plain", Dtype.FP16), models.images, limit=None
    )
    assert (whole.check.images, whole.check.given) == (12, 12)
    known = manifest.read(models.graph("plain", Dtype.FP16))
    assert (known.check.images, known.check.given) == (12, 12)


@pytest.mark.parametrize("part", [3, 5])
@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.FP16])
def test_a_set_that_is_run_part_by_part_gives_the_same_figures(
    part, dtype, models, monkeypatch
) -> None:
    pair = (models.checkpoint("plain"), models.graph("plain", dtype), models.images)
    whole = validated(*pair, batch=BatchRange(1, 1, 1))
    monkeypatch.setattr("msn_export.metrics.evaluate.draw_parts.__kwdefaults__", {
        "max_batch": 8, "limit": 16, "part": part
    })  # fmt: skip
    parts = validated(*pair, batch=BatchRange(1, 1, 1))
    assert parts.passed
    assert [i.name for i in parts.check.per_image] == [i.name for i in whole.check.per_image]
    assert parts.check.images == whole.check.images == 12
    tolerance = 0.5 if dtype is Dtype.FP32 else 1e-6  # later parts' references are not in fp64
    assert parts.check.relative == pytest.approx(whole.check.relative, rel=tolerance)
    assert parts.check.neighbours == whole.check.neighbours


@pytest.mark.parametrize(("limit", "bounded"), [(4, False), (8, True)])
def test_ranges_are_bounded_by_pictures_enough_and_else_that_is_noted(
    limit, bounded, models
) -> None:
    validation = validated(
        models.graph("plain", Dtype.FP32), models.graph("plain", Dtype.INT8), models.images,
        limit=limit,
    )  # fmt: skip
    assert validation.passed
    assert ("ranges of" in validation.check.limits_from) is bounded
    noted = "ranges of activations were not bounded: that takes 8 pictures" in validation.notes
    assert noted is not bounded


# --- nothing to judge by --------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["onnx", "validate"])
def test_one_picture_or_many_alike_show_nothing(command, models, tmp_path) -> None:
    def run(images: Path) -> None:
        if command == "onnx":
            run_onnx(OnnxJob(str(models.checkpoint("plain")), tmp_path / "m.onnx", images=images))
        else:
            validated(models.checkpoint("plain"), models.graph("plain", Dtype.FP32), images)

    one = pictures(tmp_path / "one", 1)
    with pytest.raises(ImageError, match="gives 1 picture; a check needs at least 2 different"):
        run(one)
    (picture,) = one.rglob("*.png")
    (picture.parent / "again.png").write_bytes(picture.read_bytes())
    with pytest.raises(ImageError, match=r"all 2 pictures of .* are alike once they are resized"):
        run(one)
    assert not (tmp_path / "m.onnx").exists()


def test_a_reference_that_is_not_finite_is_named_with_its_image(models, tmp_path) -> None:
    broken = faulty(
        models.graph("plain", Dtype.FP32), tmp_path, faults.scaled("embedding", float("nan"))
    )
    with pytest.raises(ToleranceError, match=r"the reference itself is not finite: output 'emb"):
        validated(broken, models.graph("plain", Dtype.FP16), models.images)


def test_an_output_that_only_one_side_has_was_not_judged(models) -> None:
    both, one = (
        models.graph("plain", Dtype.FP32),
        models.graph("plain", Dtype.FP32, heads=(Head.CLS,)),
    )
    for reference, candidate in ((both, one), (one, both)):
        validation = validated(reference, candidate, models.images)
        assert not validation.passed
        assert validation.reasons == (f"not compared, only {both} has it: logits",)
