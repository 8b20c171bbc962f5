"""Nine mistakes that exporters make, each caught by ``validate`` and placed by ``drift``; overflow.

The model is vit-msn-small with msn's own initialisation, not one made to show a fault.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from msn_export import images, manifest
from msn_export.calibration.job import CalibrateJob
from msn_export.commands import onnx as run_onnx_module
from msn_export.commands.calibrate import run_calibrate
from msn_export.commands.drift import DriftJob, run_drift
from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.commands.validate import ValidateJob, run_validate
from msn_export.compare.drift import Drift
from msn_export.compare.sides import Validation
from msn_export.errors import ToleranceError
from msn_export.graph.precision import type_graph
from msn_export.manifest import Manifest
from msn_export.preprocessing import preset
from msn_export.progress import Silent
from msn_export.runtime import open_runner
from msn_export.spec import BatchRange, Dtype, Head, ImageSize
from tests.builders.checkpoints import massive
from tests.contracts import faults
from tests.contracts.faults import BLOCK, describe, plant

LIMIT = 4  # pictures: these faults are no matter of chance
BATCH = BatchRange(1, 2, 4)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Seventeen tokens keep one core busy; more threads wait for each other where others run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def validated(reference: Path, candidate: Path, pictures: Path, **options) -> Validation:
    job = ValidateJob(
        str(reference), str(candidate), images=pictures, limit=LIMIT, batch=BATCH, **options
    )
    return run_validate(job, Silent())


def drifted(reference: Path, candidate: Path, pictures: Path) -> Drift:
    job = DriftJob(str(reference), str(candidate), images=pictures, limit=LIMIT)
    return run_drift(job, Silent())


def test_without_a_fault_everything_passes(small_checkpoint, small_graph, photographs) -> None:
    validation = validated(small_checkpoint, small_graph, photographs)
    assert validation.passed
    assert validation.reasons == ()
    # two fp32 runs differ by less than twice the rounding of one: docs/tolerances.md
    assert all(figures["rounding"] < 2 for figures in validation.check.outputs.values())
    assert drifted(small_checkpoint, small_graph, photographs).parted is None


IN_A_BLOCK = {
    "two heads swapped": (faults.swap_heads, "blocks.3.attn.qkv", "relative error"),
    "LayerNorm eps 1e-5": (
        faults.wrong_epsilon,
        "blocks.3.norm1",
        "epsilon is 1e-05, the reference's 1e-06 in block 3 norm before attention",
    ),
    "tanh GELU for erf": (
        faults.tanh_gelu,
        "block 3 activation",
        "activation is gelu, tanh form, the reference's gelu in block 3",
    ),
    "a dropped bias": (
        faults.dropped_bias,
        "blocks.3.attn.proj",
        "relative error of the worst image",
    ),
    "weights of 4 bits": (faults.four_bits, "blocks.3.attn.qkv", "relative error"),
}


@pytest.mark.parametrize(("fault", "tensor", "reason"), IN_A_BLOCK.values(), ids=IN_A_BLOCK.keys())
def test_a_fault_in_a_block_is_caught_and_placed(
    fault, tensor, reason, small_checkpoint, small_graph, photographs, tmp_path
) -> None:
    faulty = plant(small_graph, tmp_path / "m.onnx", fault)
    validation = validated(small_checkpoint, faulty, photographs)
    assert not validation.passed
    assert any(reason in told for told in validation.reasons), validation.reasons
    found = drifted(small_checkpoint, faulty, photographs)
    assert found.parted == found.suspect == f"block {BLOCK}"
    # inside the block, the first tensor that is wrong is the one the fault is in
    wrong = next(tensor for tensor in found.inside if tensor.relative > 5e-6)
    assert wrong.name == tensor


IN_HALF = {
    "a dropped query bias": (faults.dropped_query_bias, "attention"),
    "QuickGELU": (faults.quick_gelu, "MLP"),
    "a gain of 1.01": (faults.larger_gain, "attention"),
}


@pytest.mark.parametrize(("fault", "part"), IN_HALF.values(), ids=IN_HALF.keys())
def test_a_fault_near_the_rounding_of_fp16_is_placed(
    fault, part, small_checkpoint, small_graph, photographs, tmp_path
) -> None:
    def typed(model: ir.Model) -> None:
        fault(model)
        type_graph(model, Dtype.FP16)

    faulty = plant(small_graph, tmp_path / "m.onnx", typed)
    describe(small_graph, faulty, dtype=Dtype.FP16)
    found = drifted(small_checkpoint, faulty, photographs)
    assert found.parted == found.suspect == f"block {BLOCK}"
    # and no other block errs more than fp16 costs
    past = [stage.own for stage in found.stages if not stage.own.inside]
    assert [own.tensor for own in past] == [f"block {BLOCK} {part}"]
    assert all(s.own.times < 1.1 for s in found.stages if s.own.inside)


@pytest.mark.parametrize(("block", "gain", "parts"), [(4, 1.02, False), (1, 1.2, True)])
def test_a_fault_in_8_bits_is_placed_even_where_it_is_lost_in_them(
    block, gain, parts, small_checkpoint, small_graph, photographs, tmp_path
) -> None:
    """An error below what 8 bits cost is no proof, but its block is the one to look into."""
    larger = partial(faults.larger_gain, block=block, factor=gain)
    faulty = plant(small_graph, tmp_path / "m.onnx", larger)
    describe(small_graph, faulty, golden=None)  # it is another graph's
    output = tmp_path / "q.onnx"
    job = CalibrateJob(faulty, Dtype.INT8, photographs, output, smooth=0.5, compile=False)
    run_calibrate(job, Silent())
    found = drifted(small_checkpoint, output, photographs)
    assert found.suspect == f"block {block}"
    assert (found.parted == f"block {block}") is parts


def test_an_epsilon_is_caught_by_its_numbers_alone(
    small_checkpoint, small_graph, photographs, tmp_path
) -> None:
    """A fixed 1e-4 does not see it; what a graph of the reference rounds does."""
    faulty = plant(small_graph, tmp_path / "m.onnx", faults.wrong_epsilon)
    validation = validated(small_checkpoint, faulty, photographs, numbers_only=True)
    assert validation.check.max_abs < 1e-4
    assert not validation.passed
    assert all("relative error" in reason for reason in validation.reasons)


@pytest.mark.parametrize("block", [0, 2, 5])
def test_an_epsilon_is_read_wherever_it_is(block, small_graph, photographs, tmp_path) -> None:
    """In later blocks it is lost in rounding; the graph says it all the same."""
    faulty = plant(small_graph, tmp_path / "m.onnx", lambda m: faults.wrong_epsilon(m, block))
    validation = validated(small_graph, faulty, photographs)
    assert not validation.passed
    assert f"in block {block} norm before attention" in validation.reasons[-1]
    found = drifted(small_graph, faulty, photographs)
    assert found.suspect == f"block {block}"


def test_channels_in_the_other_order_are_caught_and_named(
    small_checkpoint, small_graph, photographs, tmp_path
) -> None:
    faulty = plant(small_graph, tmp_path / "m.onnx", faults.bgr)
    validation = validated(small_checkpoint, faulty, photographs)
    assert not validation.passed
    assert validation.cause is not None
    assert "agrees when it is given BGR" in validation.cause
    assert drifted(small_checkpoint, faulty, photographs).parted == "patch embedding"


def test_a_transposed_position_embedding_is_caught(
    small_checkpoint, small_graph, photographs, tmp_path
) -> None:
    faulty = plant(small_graph, tmp_path / "m.onnx", faults.transposed_positions)
    assert not validated(small_checkpoint, faulty, photographs).passed
    assert drifted(small_checkpoint, faulty, photographs).parted == "patch embedding"


def test_another_resize_is_a_preprocessing_mismatch_not_a_model_error(
    small_checkpoint, small_graph, photographs, tmp_path
) -> None:
    known = manifest.read(small_graph)
    nearest = replace(known.preprocessing, resample="nearest")
    faulty = describe(small_graph, tmp_path / "m.onnx", preprocessing=nearest)
    validation = validated(small_checkpoint, faulty, photographs)
    assert not validation.passed
    assert validation.check.passed
    assert validation.own is not None
    assert not validation.own.passed
    (reason,) = validation.reasons
    assert reason.startswith("a preprocessing mismatch, the model itself agrees: with the same")


def test_shifted_class_names_are_caught(small_graph, photographs, tmp_path) -> None:
    labels = tuple(np.roll([f"class {i}" for i in range(8)], 1).tolist())
    faulty = describe(small_graph, tmp_path / "m.onnx", labels=labels)
    validation = validated(small_graph, faulty, photographs)
    assert validation.check.passed
    assert not validation.passed
    assert validation.reasons == ("the candidate's class names are the reference's shifted by +1",)


def test_shifted_classes_are_caught_and_named(
    small_checkpoint, small_graph, photographs, tmp_path
) -> None:
    faulty = plant(small_graph, tmp_path / "m.onnx", faults.shifted_classes)
    validation = validated(small_checkpoint, faulty, photographs)
    assert not validation.passed
    assert validation.check.classes == 0
    assert validation.cause == "the candidate's classes are the reference's shifted by +1"
    assert drifted(small_checkpoint, faulty, photographs).parted == "logits"


# --- what only a batch of several images, or of the most, shows in an export ----------------------


IN_LARGEST = partial(faults.wrong_in_batches_of, BATCH.max)


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        pytest.param(faults.mixed_batch, Dtype.FP32, id="images mixed"),
        pytest.param(
            partial(faults.wrong_in_batches_of, BATCH.opt), Dtype.FP32, id="in one between"
        ),
        pytest.param(IN_LARGEST, Dtype.FP32, id="in the largest"),
        pytest.param(IN_LARGEST, Dtype.BF16, id="in the largest, in bf16"),
    ],
)
def test_an_export_that_is_wrong_in_some_batches_is_refused(
    fault, dtype, small_checkpoint, photographs, tmp_path, monkeypatch
) -> None:
    convert = run_onnx_module.convert

    def faulty(model: ir.Model, *options: object) -> object:
        fault(model)
        return convert(model, *options)

    def simplified(model: ir.Model) -> tuple[ir.Model, str]:
        fault(model)
        return model, ""

    if dtype is Dtype.FP32:
        monkeypatch.setattr(run_onnx_module, "simplify", simplified)
    else:  # behind the check of the fp32 graph
        monkeypatch.setattr(run_onnx_module, "convert", faulty)
    with pytest.raises(ToleranceError, match=f"the {dtype} graph, output 'embedding', does not"):
        exported(small_checkpoint, tmp_path / "m.onnx", photographs, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


# --- an activation that fp16 cannot hold ----------------------------------------------------------


@pytest.fixture(scope="module")
def massive_graph(small_checkpoint, photographs, tmp_path_factory) -> Path:
    folder = massive(small_checkpoint, tmp_path_factory.mktemp("massive") / "checkpoint")
    return exported(folder, folder.parent / "fp32.onnx", photographs)[0]


def exported(checkpoint: Path, output: Path, photographs: Path, **options) -> tuple[Path, Manifest]:
    job = OnnxJob(
        str(checkpoint), output, images=photographs, batch=BATCH, heads=(Head.CLS,), **options
    )
    return run_onnx(job, Silent())


def test_without_islands_it_overflows_and_nothing_is_written(
    massive_graph, photographs, tmp_path
) -> None:
    checkpoint = massive_graph.parent / "checkpoint"
    with pytest.raises(ToleranceError, match=r"[1-9]\d* NaN and \d+ infinite values"):
        exported(checkpoint, tmp_path / "m.onnx", photographs, dtype=Dtype.FP16, islands="none")
    assert list(tmp_path.iterdir()) == []


def test_an_overflow_that_nobody_checked_is_caught_and_placed(
    massive_graph, photographs, tmp_path
) -> None:
    checkpoint = massive_graph.parent / "checkpoint"
    faulty, _ = exported(
        checkpoint, tmp_path / "m.onnx", photographs,
        dtype=Dtype.FP16, islands="none", check=False,
    )  # fmt: skip
    validation = validated(massive_graph, faulty, photographs)
    assert not validation.passed
    figures = validation.check.outputs["embedding"]
    assert figures["nan"] == 384 * (1 + 2 + 3 + 4)  # every value, at each batch size
    assert "NaN" in validation.reasons[0]
    # the sum of patches and positions stays fp32 even so: its weight is itself too large for fp16
    assert drifted(massive_graph, faulty, photographs).parted == "block 0"


def test_measured_islands_keep_what_it_computes(massive_graph, photographs, tmp_path) -> None:
    checkpoint = massive_graph.parent / "checkpoint"
    kept, manifest = exported(checkpoint, tmp_path / "m.onnx", photographs, dtype=Dtype.FP16)
    assert manifest.check.cosine_min >= 0.999
    # the residual stream from the patches on: two additions a block, with their maxima; the last
    # block computes [CLS] alone, whose stream is not the massive one
    streams = {f"blocks.{i}.{add}" for i in range(5) for add in ("Add", "Add_2")}
    measured = {name: manifest.islands[name] for name in ("patch.Add", *streams)}
    assert all(peak == pytest.approx(1e5, rel=0.01) for peak in measured.values())
    # and a weight that is too large by itself
    assert set(manifest.islands) - set(measured) == {"pos_embed"}
    validation = validated(massive_graph, kept, photographs)
    assert validation.passed
    assert validation.check.cosine_min >= 0.999
    found = drifted(massive_graph, kept, photographs)
    assert found.passed
    assert all(stage.headroom < 1 for stage in found.stages[:6])
    # and the images are told apart, so that a cosine of 1 is no matter of course
    paths = sorted(photographs.iterdir())[:4]
    pixels = images.preprocess(paths, preset("hf", ImageSize(64, 64)))
    vectors = open_runner(massive_graph)(pixels)["embedding"]
    cosines = (vectors @ vectors.T) / np.outer(*[np.linalg.norm(vectors, axis=1)] * 2)
    assert cosines.min() < 0.99
