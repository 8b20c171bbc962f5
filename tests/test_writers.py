"""Whoever wrote a checkpoint, its weights are read, and its classifier computes the same."""

import numpy as np
import onnxruntime
import pytest
import torch
import writers
from writers import CLASSIFIERS, ENCODERS, LABELS

from msn_export.models.checkpoints import load_checkpoint
from msn_export.run_onnx import OnnxJob, run_onnx
from msn_export.run_trt import TrtJob, run_trt
from msn_export.spec import BatchRange, ComputeCapability, Dtype, Target

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def test_at_least_twenty_writers_are_covered() -> None:
    assert len(ENCODERS.keys() | CLASSIFIERS.keys()) >= 20


@pytest.mark.parametrize("writer", ENCODERS)
def test_an_encoder_has_the_writers_weights_and_every_wrapper_is_noted(writer, tmp_path) -> None:
    write, note = ENCODERS[writer]
    got = load_checkpoint(str(write(tmp_path)))
    assert got.config.labels == ()
    for name, tensor in got.model.state_dict().items():
        assert torch.equal(tensor, writers.encoder()[name.replace("patch.", "patch_embed.proj.")])
    wrapped = [said for said in got.notes if said.startswith("weights read from")]
    assert [said.startswith(note) for said in wrapped] == ([True] if note else [])


@pytest.mark.parametrize("writer", CLASSIFIERS)
def test_a_classifier_gives_the_writers_logits(writer, tmp_path) -> None:
    write, compute = CLASSIFIERS[writer]
    got = load_checkpoint(str(write(tmp_path)))
    assert got.config.labels == tuple(f"LABEL_{i}" for i in range(LABELS))
    with torch.inference_mode():
        logits = got.model.classify(got.model.hidden(IMAGES))
    # fp32 in another order; logits are near 1
    np.testing.assert_allclose(logits, compute(IMAGES), rtol=0, atol=1e-5)


# one of each form that a classifier has here
FORMS = [
    "MAE code base, --cls_token",
    "MAE code base, --global_pool",
    "msn linear evaluation",
    "msn linear evaluation of 2 blocks",
]


@pytest.mark.parametrize("target", list(Target))
@pytest.mark.parametrize("writer", FORMS)
def test_the_graph_gives_the_writers_logits_with_every_attention_fused(
    writer, target, tmp_path
) -> None:
    write, compute = CLASSIFIERS[writer]
    path, manifest = run_onnx(
        OnnxJob(str(write(tmp_path)), tmp_path / "m.onnx", target=target, batch=BatchRange(1, 2, 4))
    )
    assert [spec.name for spec in manifest.outputs] == ["logits"]
    assert (manifest.attention.fused, manifest.attention.expected) == (2, 2)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": IMAGES.numpy()})
    # fp32 in another order; logits are near 1
    np.testing.assert_allclose(logits, compute(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("writer", FORMS)
def test_tensorrt_fuses_every_attention_of_its_graph(writer, tmp_path) -> None:
    batch = BatchRange(1, 2, 4)
    graph, _ = run_onnx(
        OnnxJob(str(CLASSIFIERS[writer][0](tmp_path)), tmp_path / "m.onnx", batch=batch)
    )
    _, built = run_trt(
        TrtJob(
            graph,
            tmp_path / "m.engine",
            precision=Dtype.FP16,
            backend="tensorrt-rtx",
            capabilities=(ComputeCapability(8, 9),),
        )
    )
    assert built.engine is not None
    assert built.engine.fused_attention == 2
    assert set(built.engine.gemm_dtypes) == {"Half"}
