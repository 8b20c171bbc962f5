"""Every shape in every precision: built, run on photographs, and gated on the card itself."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from msn_export.graph.torch_reference import read_head
from msn_export.metrics.evaluate import Reference, draw, evaluate, run_reference, with_ragged
from msn_export.metrics.tolerances import GATES
from msn_export.spec import Dtype, Head, InputFormat
from tests.gpu.places import CARD, SHAPES, TINY, Built, Place

HEADS = (Head.CLS, Head.MEAN)


class TorchOn:
    """The fp32 model on a device, its products in fp32."""

    def __init__(self, built: Built, device: str) -> None:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.model, self.device = built.checkpoint.model.to(device), device
        self.name = f"torch {torch.__version__}, {device}, fp32"

    def __call__(self, images: Any) -> dict[str, np.ndarray[Any, Any]]:
        with torch.inference_mode():
            hidden = self.model.hidden(torch.from_numpy(images).to(self.device))
            return {
                head.output: read_head(self.model, head, hidden).cpu().numpy() for head in HEADS
            }


def reference_of(built: Built, place: Place) -> Reference:
    preprocessing, (profile, *_) = built.manifest.preprocessing, built.manifest.profiles
    assert preprocessing is not None
    sample = replace(draw(place.photographs, preprocessing), max_batch=profile.max)
    return run_reference(TorchOn(built, place.torch_device), sample)


@pytest.mark.parametrize("dtype", Dtype)
@pytest.mark.parametrize(("place", "shape"), SHAPES, indirect=["place"])
def test_an_engine_agrees_with_torch_on_the_same_card(place, shape, dtype) -> None:
    if obstacle := place.obstacle(dtype):
        pytest.skip(obstacle)
    built = place.build(shape, dtype)
    profile = built.manifest.profiles[0]
    # more than one call takes, too: the runner splits it
    sizes = (*with_ragged([profile.min, profile.opt, profile.max], 16), profile.max + 3)
    with place.open(built) as runner:
        reference = reference_of(built, place)
        found = evaluate(runner, reference, InputFormat.FLOAT, sizes, GATES[dtype])
    assert set(found.outputs) == {head.output for head in HEADS}
    assert found.failures == ()


@pytest.mark.parametrize("place", [CARD], indirect=True)
@pytest.mark.parametrize("dtype", Dtype)
def test_what_trt_says_of_an_engine_it_ran_here(place, dtype) -> None:
    if obstacle := place.obstacle(dtype):
        pytest.skip(obstacle)
    engine = place.build("vit-msn-small", dtype).manifest.engine
    assert engine.executed is True, engine.reason
    assert engine.check.passed is True
    assert place.device.name in engine.reason


@pytest.mark.parametrize(("place", "shape"), [("rehearsal", TINY), SHAPES[1]], indirect=["place"])
def test_the_gate_on_the_card_can_fail(place, shape) -> None:
    built = place.build(shape, Dtype.FP16)
    reference = reference_of(built, place)
    spoiled = {name: output.copy() for name, output in reference.outputs.items()}
    spoiled["embedding"][0] *= -1
    with place.open(built) as runner:
        given = replace(reference, outputs=spoiled)
        found = evaluate(runner, given, InputFormat.FLOAT, [1], GATES[Dtype.FP16])
    assert "cosine_p1" in found.failures[0]


@pytest.mark.parametrize(("place", "shape"), [("rehearsal", TINY), SHAPES[1]], indirect=["place"])
@pytest.mark.parametrize("dtype", [Dtype.FP32, Dtype.FP16])
def test_the_golden_input_is_reproduced(place, shape, dtype) -> None:
    checked = place.folder / f"{shape}.{dtype}.checked.onnx"
    options = ("--head", "cls", "--dtype", str(dtype), *place.images())
    place.run(checked, "onnx", place.source(shape), *options)
    with place.open(replace(place.build(shape, dtype), artifact=checked)) as runner:
        result = runner.selftest()
    assert result.passed, str(result)
