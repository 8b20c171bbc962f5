"""A verdict says what quantising costs and saves, and plainly where nothing is gained."""

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from msn_export.calibration import verdict
from msn_export.calibration.images import FEW
from msn_export.calibration.verdict import CostBenefit, neighbours_of, summary
from msn_export.engine.options import BuildSpec, BuildStep
from msn_export.errors import BuildError
from msn_export.metrics.evaluate import Evaluation, Reference, Sample, evaluate
from msn_export.metrics.tolerances import Gate
from msn_export.preprocessing import preset
from msn_export.spec import BatchRange, Dtype, ImageSize, InputFormat

SAMPLE = Sample(
    np.zeros((4, 8, 8, 3), np.uint8), tuple("abcd"), "here", preset("hf", ImageSize(8, 8))
)
EMBEDDING = np.eye(4, dtype=np.float32) + 0.1
LOGITS = np.eye(4, dtype=np.float32)


class Runner:
    name = "runner"

    def __init__(self, **outputs: np.ndarray) -> None:
        self.outputs = outputs

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: values[: len(images)] for name, values in self.outputs.items()}


def judged(**outputs: np.ndarray) -> Evaluation:
    reference = Reference({"embedding": EMBEDDING, "logits": LOGITS}, SAMPLE, "reference")
    runner = Runner(**{"embedding": EMBEDDING, "logits": LOGITS, **outputs})
    return evaluate(runner, reference, InputFormat.UINT8, (4,), Gate(cosine_p1=0.99))


def test_what_agrees_passes_with_all_neighbours_and_classes() -> None:
    found = judged()
    assert (found.failures, neighbours_of(found), found.check.classes) == ((), 1.0, 1.0)
    assert found.check.cosine_p1 == pytest.approx(1)


def test_classes_are_counted_where_there_are_logits() -> None:
    assert judged(logits=np.roll(LOGITS, 1, axis=1)).check.classes == 0.0
    assert judged(logits=LOGITS[[0, 1, 3, 2]]).check.classes == 0.5


def test_nan_is_no_agreement() -> None:
    logits = LOGITS.copy()
    logits[0, 3] = np.nan  # argmax of a row with NaN is the NaN: no class
    found = judged(logits=logits)
    assert found.check.classes == 0.75
    assert found.failures[0].startswith("output 'logits': 1 NaN")


def test_the_worst_output_is_told() -> None:
    found = judged(embedding=EMBEDDING[::-1].copy())
    assert any(failure.startswith("output 'embedding': cosine_p1 ") for failure in found.failures)
    assert found.check.passed is False


ALIKE = judged()


def savings(**said) -> CostBenefit:
    return CostBenefit(**{
        "base": "fp16", "form": "int8", "file": (100, 55), "engine": (100, 70),
        "latency": "no GPU", **said,
    })  # fmt: skip


def said(saved: CostBenefit, kept: int = 0, calibrated: int = FEW) -> str:
    return summary(saved, ALIKE, ALIKE, kept=kept, depth=12, calibrated=calibrated)


def test_ranges_of_few_images_stand_in_the_summary() -> None:
    assert "; only 12 images were calibrated on; time not measured" in said(savings(), 0, 12)
    assert "calibrated on" not in said(savings())


def test_a_gain_in_bytes_is_a_gain_where_no_time_was_measured() -> None:
    assert savings().worthwhile
    assert said(savings()) == (
        "the int8 engine is 30% smaller than the fp16 one; relative error 0.00% (fp16: 0.00%); "
        "p1 cosine 1.00000 (fp16: 1.00000); 100% of neighbours agree; 100% of classes agree; "
        "time not measured: no GPU"
    )


def test_the_file_counts_where_nothing_was_compiled() -> None:
    assert said(savings(engine=None)).startswith("the int8 file is 45% smaller than the fp16 one; ")


@pytest.mark.parametrize(
    ("saved", "detail"),
    [
        ({"engine": (100, 95)}, "the int8 engine is 5% smaller"),
        ({"engine": (100, 120)}, "the int8 engine is 20% larger"),
        ({"latency": (1.0, 1.25)}, "1.25 ms a batch (fp16: 1.00)"),
        ({"latency": (4219.12, 6914.28)}, "6910 ms a batch (fp16: 4220)"),
        (
            {"latency": (1.0, 1.25), "spread": "time ratio 1.25"},
            "1.25 ms a batch (fp16: 1.00); time ratio 1.25",
        ),
        ({"latency": (1.0, float("nan"))}, "nan ms a batch"),
        ({"faults": ("fused attention in 0 of 12 blocks",)}, "; fused attention in 0 of 12 blocks"),
    ],
)
def test_keep_fp16_is_said_plainly_where_nothing_is_gained(saved, detail) -> None:
    found = savings(**saved)
    assert not found.worthwhile
    assert said(found).startswith("keep fp16: the int8 engine is ")
    assert detail in said(found)


def test_less_time_and_fewer_bytes_are_a_gain() -> None:
    assert savings(latency=(1.0, 0.8)).worthwhile
    assert said(savings(latency=(1.0, 0.8))).endswith("; 0.800 ms a batch (fp16: 1.00)")


def test_times_of_a_busy_machine_do_not_decide() -> None:
    slower = {"latency": (1.0, 1.25), "spread": "time ratio 1.25; Too noisy", "noisy": True}
    assert savings(**slower).worthwhile
    assert said(savings(**slower)).endswith(
        "1.25 ms a batch (fp16: 1.00); time ratio 1.25; Too noisy"
    )
    assert not savings(engine=(100, 95), **slower).worthwhile


def test_blocks_that_stay_are_told() -> None:
    assert "3 of 12 blocks kept in fp16; " in said(savings(), kept=3)


def test_a_single_image_has_no_neighbours() -> None:
    agreements = {
        name: replace(one, neighbours=None, classes=None) for name, one in ALIKE.outputs.items()
    }
    alone = replace(ALIKE, outputs=agreements)
    assert "agree" not in summary(savings(), alone, alone, kept=0, depth=12, calibrated=FEW)


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt"])
def test_where_one_build_fails_the_other_ends(tmp_path, monkeypatch, module) -> None:
    begun: list[Dtype] = []

    def build(spec: BuildSpec, _backend, _output, *, progress) -> None:
        begun.append(spec.precision)
        if spec.precision is Dtype.FP16:
            raise BuildError("no kernel for this")
        for _ in range(1000):
            time.sleep(0.01)
            progress(BuildStep("tactics", 1, 2, 0.5))
        pytest.fail("nothing ended it")

    monkeypatch.setattr(verdict, "build_engine", build)
    specs = [
        BuildSpec(tmp_path / "m.onnx", (BatchRange(),), precision=dtype)
        for dtype in (Dtype.FP16, Dtype.INT8)
    ]
    row = SimpleNamespace(targets_capabilities=module == "tensorrt_rtx")
    with pytest.raises(BuildError, match="no kernel for this"):
        verdict._build_together(specs, SimpleNamespace(row=row), tmp_path)
    assert begun[0] is Dtype.FP16
