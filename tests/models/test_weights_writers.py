"""Whoever wrote a checkpoint, its weights are read, and its classifier computes the same."""

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open

from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.commands.trt import TrtJob, run_trt
from msn_export.commands.validate import ValidateJob, run_validate
from msn_export.errors import CheckpointError
from msn_export.models.checkpoint import load_checkpoint
from msn_export.spec import BatchRange, ComputeCapability, Dtype, Target
from tests.builders import writers
from tests.builders.writers import CLASSIFIERS, DEPTH, DIM, ENCODERS, HEADS, LABELS, MLP

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


def test_what_was_chosen_of_a_file_stands_in_the_manifest_and_its_labels_too(tmp_path) -> None:
    path = writers.saved(writers.timm_training(writers.encoder() | writers.head()), tmp_path)
    (tmp_path / "names.txt").write_text("cat\ndog\nfox\n")
    job = OnnxJob(
        str(path), tmp_path / "m.onnx", weights="state_dict_ema", labels=tmp_path / "names.txt"
    )
    _, manifest = run_onnx(job)
    assert manifest.labels == ("cat", "dog", "fox")
    assert manifest.checkpoint is not None
    assert manifest.checkpoint.weights == "state_dict_ema"
    assert manifest.checkpoint.notes[0] == (
        "weights read from 'state_dict_ema'; the file also has 'state_dict' (--weights state_dict)"
    )
    found = run_validate(ValidateJob(str(path), tmp_path / "m.onnx", weights="state_dict_ema"))
    assert found.passed
    assert not run_validate(ValidateJob(str(path), tmp_path / "m.onnx")).passed


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


# --- the libraries themselves, where they are installed -------------------------------------------


def vit_of_timm(**options: Any) -> torch.nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=DIM, depth=DEPTH, num_heads=HEADS, **options,
        mlp_ratio=MLP / DIM, num_classes=LABELS,
    )  # fmt: skip


def vit_of_torchvision() -> torch.nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=DEPTH, num_heads=HEADS, hidden_dim=DIM,
        mlp_dim=MLP, num_classes=LABELS,
    )  # fmt: skip


def vit_of_transformers() -> torch.nn.Module:
    from transformers import ViTMSNConfig, ViTMSNForImageClassification

    return ViTMSNForImageClassification(ViTMSNConfig(**writers.CONFIG, num_labels=LABELS))


def drawn(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, std=0.15, generator=generator)
            if "norm" in name or "ln" in name:
                parameter.add_(1)
    return model.eval()


LIBRARIES = {
    "timm": (vit_of_timm, lambda: writers.encoder() | writers.head()),
    "timm, global_pool=avg": (
        lambda: vit_of_timm(global_pool="avg"),
        lambda: writers.encoder(norm=False) | writers.fc_norm() | writers.head(),
    ),
    "torchvision": (
        vit_of_torchvision, lambda: writers.torchvision(writers.encoder() | writers.head())
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("library", LIBRARIES)
def test_a_librarys_own_model_is_read_and_has_the_keys_of_these_builders(library, tmp_path) -> None:
    make, build = LIBRARIES[library]
    model = drawn(make())
    assert model.state_dict().keys() == build().keys()
    got = load_checkpoint(str(writers.saved(model.state_dict(), tmp_path)))
    with torch.inference_mode():
        logits = got.model.classify(got.model.hidden(IMAGES))
        np.testing.assert_allclose(logits, model(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("vit", ["torchvision", "timm"])
def test_lightlys_masked_vit_is_read_without_its_head(vit, tmp_path) -> None:
    modules = pytest.importorskip("lightly.models.modules")
    if vit == "timm":
        masked = modules.MaskedVisionTransformerTIMM(vit=vit_of_timm())
        built = writers.lightly(writers.encoder() | writers.head())
    else:
        masked = modules.MaskedVisionTransformerTorchvision(vit=vit_of_torchvision())
        built = writers.lightly(writers.torchvision(writers.encoder() | writers.head()))
    drawn(masked)
    state = writers.prefixed("backbone.", masked.state_dict())
    assert state.keys() == {key for key in built if key.startswith("backbone.")}
    got = load_checkpoint(str(writers.saved({"state_dict": state}, tmp_path)))
    assert got.config.labels == ()
    with torch.inference_mode():
        cls = got.model(IMAGES)[:, 0]
        np.testing.assert_allclose(cls, masked(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_peft_adapter_is_refused_until_it_is_merged(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    base = drawn(vit_of_transformers())
    names = [name for name, _ in base.named_modules() if name.endswith(("q_proj", "query"))]
    settings = peft.LoraConfig(r=4, target_modules=names, modules_to_save=["classifier"])
    adapted = drawn(peft.get_peft_model(base, settings))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"is a PEFT adapter \(LORA\)"):
        load_checkpoint(str(tmp_path / "adapter"))
    path = writers.saved(adapted.state_dict(), tmp_path / "unmerged")
    with pytest.raises(CheckpointError, match="holds a PEFT adapter that is not merged"):
        load_checkpoint(str(path))
    with torch.inference_mode():
        wanted = adapted(IMAGES).logits
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    got = load_checkpoint(str(tmp_path / "merged"))
    with torch.inference_mode():
        logits = got.model.classify(got.model.hidden(IMAGES))
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_transformers_writes_the_keys_of_these_builders(tmp_path) -> None:
    model = drawn(vit_of_transformers())
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = {key.removeprefix("vit.") for key in file.keys()}  # noqa: SIM118  no dict
    built = writers.transformers_4(writers.encoder() | writers.head())
    assert written == {key.removeprefix("vit.") for key in built}
    got = load_checkpoint(str(tmp_path))
    with torch.inference_mode():
        logits = got.model.classify(got.model.hidden(IMAGES))
        np.testing.assert_allclose(logits, model(IMAGES).logits, rtol=0, atol=1e-5)
