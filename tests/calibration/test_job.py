"""A calibration's types follow from its options and from what its graph was exported for."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from msn_export.calibration.job import CalibrateJob, settled
from msn_export.calibration.qdq import Role
from msn_export.errors import SpecError
from msn_export.spec import Dtype, Target

INT8 = CalibrateJob(Path("m.onnx"), Dtype.INT8, Path("pictures"))
FP8 = replace(INT8, dtype=Dtype.FP8)


def graph(target: str | None, opset: int = 23) -> SimpleNamespace:
    """A graph as its manifest describes it; ``target`` None has no manifest."""
    manifest = None if target is None else SimpleNamespace(target=target)
    return SimpleNamespace(stated=manifest, opset=opset)


@pytest.mark.parametrize(
    ("job", "source", "base", "target"),
    [
        (INT8, graph("tensorrt"), Dtype.FP16, None),
        (FP8, graph("tensorrt"), Dtype.FP16, None),
        (INT8, graph("onnxruntime"), Dtype.FP32, None),
        (FP8, graph("onnxruntime"), Dtype.FP16, None),
        (replace(INT8, base=Dtype.BF16), graph("onnxruntime"), Dtype.BF16, None),
        (INT8, graph("portable", 17), Dtype.FP32, Target.PORTABLE),
        (INT8, graph("tensorrt-8", 17), Dtype.FP32, Target.PORTABLE),
        (INT8, graph(None, 17), Dtype.FP32, Target.PORTABLE),
        (replace(INT8, base=Dtype.FP16), graph(None, 17), Dtype.FP16, None),
        (INT8, graph(None, 19), Dtype.FP16, None),
    ],
)
def test_the_type_of_the_rest_follows_what_the_graph_is_for(job, source, base, target) -> None:
    found = settled(job, source)
    assert (found.base, found.target) == (base, target)
    assert found.scheme.base is base


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (FP8, r"is for portable, opset 17, which has no fp8; quantise it to int8, or export"),
        (replace(INT8, base=Dtype.FP16), r"takes? fp32 scales only: --base fp16 cannot be written"),
    ],
)
def test_what_opset_17_does_not_have_is_refused(job, message) -> None:
    with pytest.raises(SpecError, match=message):
        settled(job, graph("portable", 17))


def test_options_name_what_is_quantised_besides_the_blocks() -> None:
    assert INT8.extra == ()
    assert replace(INT8, quantize_patch=True, quantize_head=True).extra == (Role.PATCH, Role.HEAD)


def test_the_gate_is_the_formats_unless_a_cosine_is_asked_for() -> None:
    assert INT8.gate.cosine_p1 is not None
    assert replace(INT8, gate_cosine=0.5).gate.cosine_p1 == 0.5
    assert replace(INT8, gate_cosine=0.5).gate.cosine_p1 != INT8.gate.cosine_p1
