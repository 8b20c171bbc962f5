"""Attention is emulated as the fused kernels compute it: flash attention, sums in fp16."""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from msn_export.errors import GraphError
from msn_export.graph.emulate import PEAKS, emulate_attention, peaks_of
from tests.builders.graphs import parse

Array = NDArray[np.floating]


def graph(n: int, d: int, m: int | None = None, scale: str = "") -> ir.Model:
    """Make one attention of two heads; m queries."""
    return parse(
        f"g (float16[b,2,{m or n},{d}] q, float16[b,2,{n},{d}] k, float16[b,2,{n},{d}] v) "
        f"=> (float16[b,2,{m or n},{d}] y) {{ y = Attention {scale} (q, k, v) }}"
    )


def draw(n: int, d: int, m: int | None = None, *, b: int = 2) -> dict[str, Array]:
    rng = np.random.default_rng(n * d)
    return {
        name: rng.standard_normal((b, 2, tokens, d)).astype(np.float16)
        for name, tokens in (("q", m or n), ("k", n), ("v", n))
    }


def run(model: ir.Model, feeds: dict[str, Array]) -> dict[str, Array]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def half(x: Array) -> Array:
    return x.astype(np.float16).astype(np.float32)


def brain(x: Array) -> Array:
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)


def flash(q: Array, k: Array, v: Array) -> Array:
    """Compute what the emulation has to, in NumPy."""
    root = np.float32(np.float16(q.shape[-1] ** -0.25))
    q, k, v = half(q * root), half(k * root), v.astype(np.float32)
    top = np.full((*q.shape[:-1], 1), -1e30, np.float32)
    total, sums = np.zeros_like(top), np.zeros_like(q)
    for start in range(0, k.shape[2], 32):
        keys, values = k[:, :, start : start + 32], v[:, :, start : start + 32]
        scores = np.zeros((*q.shape[:-1], keys.shape[2]), np.float32)
        for at in range(0, q.shape[-1], 16):
            part = slice(at, at + 16)
            scores = half(scores + q[..., part] @ keys[..., part].swapaxes(-1, -2))
        higher = np.maximum(top, scores.max(-1, keepdims=True))
        fade, p = np.exp(top - higher), np.exp(scores - higher)
        total = total * fade + p.sum(-1, keepdims=True)
        sums, p, top = half(sums * fade), half(p), higher
        for at in range(0, keys.shape[2], 16):
            sums = half(sums + p[..., at : at + 16] @ values[..., at : at + 16, :])
    return sums / total


def exact(q: Array, k: Array, v: Array) -> Array:
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return p @ v / p.sum(-1, keepdims=True)


def error(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize(
    ("n", "d", "m"), [(17, 32, None), (64, 64, None), (197, 64, 5), (40, 80, 1)]
)
def test_fp16_sums_are_those_of_flash_attention(n: int, d: int, m: int | None) -> None:
    model = graph(n, d, m)
    emulated = emulate_attention(model, fp16=["Attention0"])
    feeds = draw(n, d, m)
    outputs = run(emulated.model, feeds)
    # exp of onnxruntime and NumPy differ in the last bit of fp32, which a rounding can turn over
    assert error(outputs["y"], flash(**feeds)) < 3e-4
    assert error(outputs["y"], exact(**feeds)) < 2e-3
    assert [node.op_type for node in model.graph] == ["Attention"]


def test_more_tokens_cost_more_and_onnxruntime_does_not_show_it() -> None:
    emulated, plain = [], []
    for n in (64, 1025):
        feeds, model = draw(n, 32, 16, b=1), graph(n, 32, 16)
        outputs = run(emulate_attention(model, fp16=["Attention0"]).model, feeds)
        emulated.append(error(outputs["y"], exact(**feeds)))
        plain.append(error(run(model, feeds)["y"], exact(**feeds)))
    # 7.2e-4 and 1.38e-3 against 4.5e-4 and 5.4e-4
    assert emulated[1] > 1.6 * emulated[0]
    assert plain[1] < 1.3 * plain[0]
    assert emulated[1] > 2 * plain[1]


def test_bf16_rounds_what_it_multiplies_and_sums_in_fp32() -> None:
    feeds = draw(197, 64)
    emulated = emulate_attention(graph(197, 64), bf16=["Attention0"])
    assert [value.name for value in emulated.model.graph.outputs] == ["y"]
    root = np.float32(ml_dtypes.bfloat16(64**-0.25))
    q, k = (brain(brain(feeds[name]) * root) for name in "qk")
    scores = q @ k.swapaxes(-1, -2)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    wanted = brain(brain(p) @ brain(feeds["v"]) / p.sum(-1, keepdims=True))
    assert error(run(emulated.model, feeds)["y"], wanted) < 1e-3  # a rounding turned over: 4e-3


def test_the_peaks_are_an_output_with_a_row_an_image() -> None:
    text = "g (float16[b,2,40,32] x) => (float16[b,2,40,32] y) { y = Attention (x, x, x) }"
    emulated = emulate_attention(parse(text), fp16=["Attention0"])
    assert [str(output.shape) for output in emulated.model.graph.outputs] == [
        "[b,2,40,32]",
        "[b,2]",
    ]


def test_peaks_are_the_largest_score_and_sum_before_rounding() -> None:
    feeds = draw(100, 32)
    feeds["k"][1, 0, 3] *= 50
    feeds["v"][:, 1, 5, 2] = 3000
    emulated = emulate_attention(graph(100, 32), fp16=["Attention0"])
    outputs = run(emulated.model, feeds)
    assert outputs[PEAKS].shape == (2, 2)  # a row an image
    ((score, total),) = peaks_of(emulated, outputs)
    root = np.float32(np.float16(32**-0.25))
    scores = half(feeds["q"] * root) @ half(feeds["k"] * root).swapaxes(-1, -2)
    assert score == pytest.approx(np.abs(scores).max(), rel=2e-3)  # each sum is rounded once
    assert 1500 < total < 6100


@pytest.mark.parametrize(("large", "which"), [("k", 0), ("v", 1)])
def test_what_passes_fp16_shows_as_infinity_and_in_the_peaks(large: str, which: int) -> None:
    """All tokens alike: the sum is tokens times the value, 200 * 400 = 80000."""
    feeds = draw(200, 32)
    feeds["q"][:] = 16
    feeds["k"][:] = 1 if large == "v" else 4000
    feeds["v"][:] = 400 if large == "v" else 1
    model = graph(200, 32)
    emulated = emulate_attention(model, fp16=["Attention0"])
    outputs = run(emulated.model, feeds)
    assert peaks_of(emulated, outputs)[0, which] > 65504
    assert not np.isfinite(outputs["y"]).all()
    # onnxruntime rounds scores to fp16 too, and divides probabilities before it sums
    assert np.isfinite(run(model, feeds)["y"]).all() == (large == "v")


@pytest.mark.parametrize(
    ("model", "node", "message"),
    [
        (graph(8, 16), "a.Attention", r"the graph has no Attention node 'a\.Attention'"),
        (graph(8, 16, scale="<is_causal = 1>"), "Attention0",
         "attention 'Attention0' cannot be emulated: its is_causal is 1, a ViT has none"),
        (parse("g (float16[b,2,n,16] q) => (float16[b,2,n,16] y) { y = Attention (q, q, q) }"),
         "Attention0", "attention 'Attention0' has no fixed number of tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_emulated_is_named(model: ir.Model, node: str, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        emulate_attention(model, fp16=[node])
