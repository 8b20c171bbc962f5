"""Features, several blocks, attention maps and kept patches: what transformers and MSN compute."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ViTMSNConfig, ViTMSNModel

from msn_export.commands.drift import DriftJob, run_drift
from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.commands.trt import TrtJob, run_trt
from msn_export.commands.validate import ValidateJob, run_validate
from msn_export.compare.inspection import inspect
from msn_export.errors import CheckpointError, GraphError, SpecError
from msn_export.graph.torch_reference import TorchRunner
from msn_export.models.checkpoint import load_checkpoint
from msn_export.models.config import LinearClassifier, readout_in
from msn_export.runtime import open_runner
from msn_export.spec import BatchRange, ComputeCapability, Dtype, Head, KeptPatches, Target
from tests.builders.engine_builds import NEEDS_RTX

SIZE, PATCH, DIM, DEPTH, HEADS = 32, 8, 64, 3, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of transformers, whose attention is far from flat."""
    torch.manual_seed(0)
    shape = ViTMSNConfig(
        image_size=SIZE, patch_size=PATCH, hidden_size=DIM, num_hidden_layers=DEPTH,
        num_attention_heads=HEADS, intermediate_size=128, initializer_range=0.2,
    )  # fmt: skip
    where = tmp_path_factory.mktemp("checkpoint")
    ViTMSNModel(shape).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def peer(folder: Path) -> ViTMSNModel:
    return ViTMSNModel.from_pretrained(folder, attn_implementation="eager").eval()


def pixels(count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, SIZE, SIZE), np.float32)


def exported(folder: Path, output: Path, **options: object) -> dict[str, np.ndarray]:
    """Export with options, and run the graph."""
    heads = options.pop("heads")
    run_onnx(OnnxJob(str(folder), output, heads=heads, batch=BatchRange(1, 2, 4), **options))
    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {"pixel_values": pixels()}), strict=True))


def of_transformers(peer: ViTMSNModel) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Give the states behind each block, before the final LayerNorm, and the attentions."""
    states: list[torch.Tensor] = []
    attentions: list[torch.Tensor] = []
    blocks = next(m for m in peer.modules() if isinstance(m, torch.nn.ModuleList))
    hooks = [
        block.register_forward_hook(
            lambda _m, _i, out: states.append(out[0] if isinstance(out, tuple) else out)
        )
        for block in blocks
    ]
    with torch.no_grad():
        out = peer(torch.from_numpy(pixels()), output_attentions=True)
        attentions += out.attentions
    for hook in hooks:
        hook.remove()
    return states, attentions


def unit(rows: torch.Tensor) -> np.ndarray:
    centred = rows.double() - rows.double().mean(dim=1, keepdim=True)
    return (centred / centred.norm(dim=1, keepdim=True)).numpy()


@pytest.mark.parametrize("blocks", [1, 2])
def test_features_are_the_centred_cls_before_the_final_layer_norm(
    folder, peer, tmp_path, blocks
) -> None:
    found = exported(folder, tmp_path / "m.onnx", heads=(Head.FEATURES,), blocks=blocks)
    states, _ = of_transformers(peer)
    rows = torch.cat([state[:, 0] for state in states[-blocks:]], dim=1)
    np.testing.assert_allclose(found["features"], unit(rows), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found["features"], axis=1), 1, atol=1e-5)


def test_cls_of_two_blocks_is_each_ones_behind_the_final_layer_norm(folder, peer, tmp_path) -> None:
    found = exported(folder, tmp_path / "m.onnx", heads=(Head.CLS,), blocks=2)
    states, _ = of_transformers(peer)
    with torch.no_grad():
        rows = torch.cat([peer.layernorm(state)[:, 0] for state in states[-2:]], dim=1)
    np.testing.assert_allclose(found["embedding"], rows.numpy(), atol=1e-5)


@pytest.mark.parametrize("pooling", ["features", "cls"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_given_classifier_reads_what_its_head_holds(folder, peer, tmp_path, pooling, blocks):
    rows = np.random.default_rng(1).standard_normal((5, blocks * DIM), np.float32)
    classifier = LinearClassifier(rows, tuple("abcde"), pooling, blocks)
    found = exported(folder, tmp_path / "m.onnx", heads=(Head.LOGITS,), classifier=classifier)
    states, _ = of_transformers(peer)
    if pooling == "features":
        read = unit(torch.cat([state[:, 0] for state in states[-blocks:]], dim=1))
    else:
        with torch.no_grad():
            tokens = [peer.layernorm(state)[:, 0] for state in states[-blocks:]]
        read = torch.cat(tokens, dim=1).double().numpy()
    wanted = read @ rows.T.astype(np.float64)
    error = np.linalg.norm(found["logits"] - wanted) / np.linalg.norm(wanted)
    assert error < 5e-6
    manifest = json.loads((tmp_path / "m.onnx.json").read_text())
    assert manifest["labels"] == list("abcde")
    assert manifest["scores"] == "softmax"
    assert manifest["check"]["passed"]


def test_the_map_of_attention_is_transformers(folder, peer, tmp_path) -> None:
    found = exported(folder, tmp_path / "m.onnx", heads=(Head.CLS, Head.ATTENTION))
    _, attentions = of_transformers(peer)
    wanted = attentions[-1][:, :, 0, 1:].unflatten(-1, (SIZE // PATCH, SIZE // PATCH)).numpy()
    np.testing.assert_allclose(found["attention"], wanted, rtol=1e-5, atol=1e-6)
    assert found["attention"].std() > 0.01  # of a flat map any wrong one would be right


@pytest.mark.parametrize("head", [Head.CLS, Head.MEAN])
def test_normalised_rows_have_norm_1(folder, tmp_path, head) -> None:
    plain = exported(folder, tmp_path / "a.onnx", heads=(head,))[head.output]
    found = exported(folder, tmp_path / "b.onnx", heads=(head,), normalize=True)[head.output]
    np.testing.assert_allclose(
        found, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6
    )


def test_kept_patches_are_those_that_msns_dropping_leaves(folder, peer, tmp_path) -> None:
    kept = KeptPatches.parse("0.5:random:3")
    found = exported(folder, tmp_path / "m.onnx", heads=(Head.CLS, Head.TOKENS), keep_patches=kept)
    rows = [0, *(1 + patch for patch in kept.of((4, 4)))]
    with torch.no_grad():
        tokens = peer.embeddings(torch.from_numpy(pixels()))[:, rows]
        for block in next(m for m in peer.modules() if isinstance(m, torch.nn.ModuleList)):
            out = block(tokens)
            tokens = out[0] if isinstance(out, tuple) else out
        wanted = peer.layernorm(tokens).numpy()
    assert wanted.shape == (3, 9, DIM)
    np.testing.assert_allclose(found["last_hidden_state"], wanted, atol=1e-5)
    np.testing.assert_allclose(found["embedding"], wanted[:, 0], atol=1e-5)


def test_validate_reads_the_checkpoint_as_the_graph_does(folder, tmp_path) -> None:
    output = tmp_path / "m.onnx"
    options = {"blocks": 2, "normalize": True, "keep_patches": KeptPatches(0.5)}
    exported(folder, output, heads=(Head.CLS, Head.FEATURES), **options)
    found = run_validate(ValidateJob(str(folder), str(output)))
    assert found.passed, found.reasons
    assert set(found.check.outputs) == {"embedding", "features"}


def test_a_map_of_some_patches_is_refused(folder, tmp_path) -> None:
    with pytest.raises(GraphError, match="a map of all patches; leave --keep-patches out"):
        exported(
            folder, tmp_path / "m.onnx", heads=(Head.ATTENTION,), keep_patches=KeptPatches(0.5)
        )


def test_more_blocks_than_there_are_is_refused(folder, tmp_path) -> None:
    with pytest.raises(CheckpointError, match="blocks 4 is out of range; expected 1 to 3"):
        exported(folder, tmp_path / "m.onnx", heads=(Head.CLS,), blocks=4)


@pytest.mark.parametrize("kept", [(3, 1), (0, 0), (16,), (-1,)])
def test_a_model_keeps_patches_that_it_has_in_order(folder, kept) -> None:
    config = load_checkpoint(str(folder)).config
    with pytest.raises(CheckpointError, match="ascending numbers from 0 to 15"):
        replace(config, kept=kept)


@pytest.mark.parametrize(
    "damage", [{"kept": "all"}, {"kept": [1.5]}, {"blocks": True}, {"normalize": 1}]
)
def test_a_manifest_that_no_export_wrote_is_refused(damage) -> None:
    with pytest.raises(CheckpointError, match="which no export writes"):
        readout_in(damage, "manifest of m.onnx")
    assert readout_in({}, "") == {"kept": (), "blocks": 1, "normalize": False}


def test_the_reference_in_fp64_reads_the_same_heads(folder) -> None:
    model = load_checkpoint(str(folder)).model
    heads = (Head.FEATURES, Head.ATTENTION)
    single, exact = (
        TorchRunner(model, heads)(pixels()),
        TorchRunner(model, heads, exact=True)(pixels()),
    )
    for name in single:
        np.testing.assert_allclose(single[name], exact[name], atol=1e-6)


@given(
    st.integers(1, 40), st.integers(1, 40), st.floats(0.001, 1), st.sampled_from(["grid", "random"])
)
def test_a_pattern_is_ascending_and_of_the_share(rows, columns, share, pattern) -> None:
    kept, grid, patches = KeptPatches(share, pattern), (rows, columns), rows * columns
    if int(patches * share + 1e-9) == 0:
        with pytest.raises(SpecError, match="is less than one; keep more"):
            kept.of(grid)
        return
    found = kept.of(grid)
    assert list(found) == sorted(set(found))
    assert not found or 0 <= found[0] <= found[-1] < patches
    assert len(found) in {0, int(patches * share + 1e-9)}
    assert KeptPatches.parse(str(KeptPatches(0.25, pattern, 7 * (pattern == "random")))) == (
        KeptPatches(0.25, pattern, 7 * (pattern == "random"))
    )


@pytest.mark.parametrize(
    "text", ["", "0", "1.5", "0.3:", "0.3:stripes", "x", "0.3:random:x", "1e-3"]
)
def test_what_is_no_share_is_refused(text) -> None:
    with pytest.raises(SpecError, match="share"):
        KeptPatches.parse(text)


def test_a_grid_is_even() -> None:
    assert KeptPatches(0.25).of((4, 4)) == (2, 4, 11, 13)
    assert KeptPatches(0.5).of((4, 4)) == (1, 3, 4, 6, 9, 11, 12, 14)  # a chessboard
    assert KeptPatches(1).of((2, 5)) == ()


@pytest.mark.parametrize("share", [0.15, 0.25, 0.3, 0.5, 0.7, 0.85])
@pytest.mark.parametrize("grid", [(14, 14), (56, 56), (32, 32), (14, 20), (37, 37)])
def test_each_row_and_each_column_has_its_share_of_a_grid(grid, share) -> None:
    """Half of 14 x 14 patches is no seven columns."""
    chosen = np.zeros(grid, bool)
    chosen.flat[list(KeptPatches(share).of(grid))] = True
    assert np.ptp(chosen.sum(axis=1)) <= 1
    assert np.ptp(chosen.mean(axis=0)) <= 0.15


@pytest.mark.parametrize("options", [{"keep_patches": KeptPatches(0.5)}, {"blocks": 2}])
def test_drift_follows_what_is_kept_and_read(folder, tmp_path, options) -> None:
    output = tmp_path / "m.onnx"
    exported(folder, output, heads=(Head.CLS, Head.FEATURES), **options)
    found = run_drift(DriftJob(str(folder), str(output)))
    assert found.passed, found.sentence
    assert [stage.name for stage in found.stages if stage.name.startswith("block")] == [
        "block 0", "block 1", "block 2",
    ]  # fmt: skip


def test_a_map_beside_packed_attention_is_refused(folder, tmp_path) -> None:
    with pytest.raises(SpecError, match="take --target tensorrt, which onnxruntime runs too"):
        OnnxJob(str(folder), heads=(Head.ATTENTION,), target=Target.ONNXRUNTIME)


@pytest.mark.slow
@NEEDS_RTX
@pytest.mark.parametrize(
    ("heads", "keep", "most"),
    [
        ((Head.FEATURES,), None, 1),
        ((Head.FEATURES, Head.ATTENTION), None, 6),
        ((Head.FEATURES,), KeptPatches(0.3), 1),
    ],
)
def test_what_is_read_costs_an_engine_few_kernels(heads, keep, most, tmp_path) -> None:
    """Of vit-msn-small in fp16 for SM 8.9, beside [CLS] alone; attention stays fused."""
    kernels = []
    for chosen, kept in (((Head.CLS,), None), (heads, keep)):
        job = OnnxJob(
            "random:vit-msn-small", tmp_path / "m.onnx", heads=chosen, keep_patches=kept,
            check=False, force=True,
        )  # fmt: skip
        graph, _ = run_onnx(job)
        built = run_trt(
            TrtJob(
                graph, tmp_path / "m.engine", Dtype.FP16, "tensorrt-rtx",
                (ComputeCapability(8, 9),), force=True,
            )
        )[1]  # fmt: skip
        assert built.engine.fused_attention == 12
        kernels.append(built.engine.kernels)
    assert 0 <= kernels[1] - kernels[0] <= most


def test_kept_patches_save_multiply_adds_as_computed(folder, tmp_path) -> None:
    def macs(tokens: int) -> int:
        patch = 16 * DIM * 3 * PATCH * PATCH  # all of them are embedded
        block = tokens * (4 * DIM * DIM + 2 * DIM * 128) + 2 * tokens * tokens * DIM
        return patch + DEPTH * block

    for kept, tokens in ((None, 17), (KeptPatches(0.5), 9)):
        output = tmp_path / "m.onnx"
        run_onnx(
            OnnxJob(
                str(folder), output, heads=(Head.TOKENS,), keep_patches=kept, check=False,
                batch=BatchRange(1, 1, 1), force=True,
            )
        )  # fmt: skip
        assert inspect(output).multiply_adds == macs(tokens)


def test_a_map_alone_needs_no_values_of_the_last_block(folder, tmp_path) -> None:
    job = OnnxJob(str(folder), tmp_path / "m.onnx", heads=(Head.ATTENTION,))
    output, manifest = run_onnx(job)
    assert (manifest.attention.expected, manifest.attention.fused) == (DEPTH - 1, DEPTH - 1)
    assert manifest.check.passed
    with open_runner(output) as runner:
        assert runner.selftest().passed
