"""The baseline is the reference in the candidate's precision, written as the candidate is."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from transformers import ViTMSNForImageClassification

from msn_export import baseline
from msn_export.artifact import Artifact
from msn_export.baseline import OwnRanges
from msn_export.calibration.qdq import Projection, find_projections
from msn_export.calibration.ranges import Observer
from msn_export.commands.calibrate import CalibrateJob, run_calibrate
from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.errors import GraphError
from msn_export.graph import io
from msn_export.graph.builder import GraphBuilder
from msn_export.graph.emulate import widen
from msn_export.graph.fuse import attention_form, fuse_attention
from msn_export.manifest import read
from msn_export.metrics.evaluate import Reference, Sample, draw, evaluate, run_reference
from msn_export.metrics.tolerances import MARGIN, Gate
from msn_export.mixed_precision import cpu_runner
from msn_export.runtime.onnxruntime import OrtRunner
from msn_export.spec import AttentionForm, Dtype, Head, InputFormat, Target
from tests.builders.calibrated_graphs import drop_activation_pairs
from tests.builders.checkpoints import hugging_face, processor
from tests.builders.foreign import Reading, scripted
from tests.builders.foreign import quantised as quantise_in_onnxruntime
from tests.builders.tiny_artifacts import pictures
from tests.contracts import faults
from tests.contracts.fault_kinds import Graph, widen_range


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("baseline")
    hugging_face(made / "hf", labels=4)
    processor(
        made / "hf", size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6],
        image_std=[0.3, 0.25, 0.2],
    )  # fmt: skip
    pictures(made / "images", 8)
    return made


@pytest.fixture(scope="module")
def export(folder) -> Callable[..., Path]:
    def made(name: str, **options) -> Path:
        output = folder / f"{name}.onnx"
        if not output.exists():
            job = OnnxJob(str(folder / "hf"), output, heads=(Head.CLS, Head.LOGITS), check=False)
            run_onnx(replace(job, **options))
        return output

    return made


@pytest.fixture(scope="module")
def quantised(folder, export) -> Callable[..., Path]:
    def made(name: str, written_for: Target = Target.ONNXRUNTIME, **options) -> Path:
        output = folder / f"{name}.onnx"
        source = export(f"fp32-{written_for}", target=written_for)
        if not output.exists():
            run_calibrate(CalibrateJob(
                source, Dtype.INT8, images=folder / "images", output=output, compile=False,
                gate_cosine=0.5, **options,
            ))  # fmt: skip
        return output

    return made


@pytest.fixture(scope="module")
def sample(folder, export) -> Sample:
    known = read(export("fp32"))
    return draw(folder / "images", known.preprocessing, limit=6)


@pytest.fixture(scope="module")
def reference(export, sample) -> Reference:
    with OrtRunner(export("fp32")) as runner:
        return run_reference(runner, sample)


def errors(runner, reference: Reference, input_format: InputFormat) -> dict[str, float]:
    with runner:
        outputs = evaluate(runner, reference, input_format, (3,), Gate()).outputs
    return {name: agreement.relative for name, agreement in outputs.items()}


# --- written as the candidate is ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "form"),
    [("fp32", Target.TENSORRT, AttentionForm.HEADS),
     ("fp32-ort", Target.ONNXRUNTIME, AttentionForm.PACKED),
     ("fp32-17", Target.PORTABLE, AttentionForm.PLAIN)],
)  # fmt: skip
@pytest.mark.parametrize("input_format", [InputFormat.FLOAT, InputFormat.UINT8])
def test_the_reference_is_the_same_function_in_every_form_and_input(
    name, target, form, input_format, export, reference, sample, tmp_path
) -> None:
    graph = io.load(export(name, target=target))
    assert attention_form(graph) is form
    for wanted in AttentionForm:
        written = baseline.write_like(graph, input_format, sample.preprocessing, wanted)
        assert attention_form(written) is wanted
        runner = baseline.open_typed(written, Dtype.FP32, sample, input_format, tmp_path)
        assert max(errors(runner, reference, input_format).values()) < 3e-6


def test_a_graph_of_bytes_is_written_for_floats(export, reference, sample, tmp_path) -> None:
    graph = io.load(export("bytes", input_format=InputFormat.UINT8))
    written = baseline.write_like(
        graph, InputFormat.FLOAT, sample.preprocessing, AttentionForm.HEADS
    )
    runner = baseline.open_typed(written, Dtype.FP32, sample, InputFormat.FLOAT, tmp_path)
    assert max(errors(runner, reference, InputFormat.FLOAT).values()) < 3e-6


def test_the_graph_that_is_given_stays_as_it_is(export, sample) -> None:
    graph = io.load(export("fp32"))
    before = [node.op_type for node in graph.graph]
    baseline.write_like(graph, InputFormat.UINT8, sample.preprocessing, AttentionForm.PLAIN)
    assert [node.op_type for node in graph.graph] == before


# --- it errs as a sound candidate does ------------------------------------------------------------


@pytest.mark.parametrize("dtype", [Dtype.FP16, Dtype.BF16])
def test_typing_costs_the_reference_what_it_costs_the_candidate(
    dtype, export, reference, sample, tmp_path
) -> None:
    candidate = export(str(dtype), dtype=dtype)
    have = errors(cpu_runner(candidate, dtype, tmp_path), reference, InputFormat.FLOAT)
    form = attention_form(io.load(candidate))
    written = baseline.write_like(
        io.load(export("fp32")), InputFormat.FLOAT, sample.preprocessing, form
    )
    runner = baseline.open_typed(written.clone(), dtype, sample, InputFormat.FLOAT, tmp_path)
    assert str(dtype) in runner.name
    want = errors(runner, reference, InputFormat.FLOAT)
    assert have == pytest.approx(want, rel=0.05)
    rounded = baseline.open_rounded(written, dtype, sample, InputFormat.FLOAT, tmp_path)
    for name, cost in errors(rounded, reference, InputFormat.FLOAT).items():
        assert have[name] / 2.5 < cost < have[name] * 2.5


@pytest.mark.parametrize(
    "options",
    [{}, {"smooth": 0.5}, {"base": Dtype.FP16}, {"quantize_attention": True},
     {"quantize_head": True, "quantize_patch": True}, {"written_for": Target.PORTABLE}],
    ids=str,
)  # fmt: skip
def test_eight_bits_cost_the_reference_what_they_cost_the_candidate(
    options, quantised, export, reference, sample, tmp_path
) -> None:
    candidate = quantised("int8-" + "-".join(map(str, options.values())), **options)
    graph = io.load(candidate)
    io.infer_shapes(graph)
    have = errors(cpu_runner(candidate, Dtype.INT8, tmp_path), reference, InputFormat.FLOAT)
    written = baseline.write_like(
        io.load(export("fp32")), InputFormat.FLOAT, sample.preprocessing,
        attention_form(graph),
    )  # fmt: skip
    (runner,) = baseline.open_quantised(written, graph, sample, InputFormat.FLOAT, tmp_path)
    assert have == pytest.approx(errors(runner, reference, InputFormat.FLOAT), rel=0.05)


def test_no_fault_of_the_candidate_is_in_its_baseline(
    quantised, export, reference, sample, tmp_path
) -> None:
    candidate = quantised("int8-")
    faulty = io.load(candidate)
    faults.edit(faulty, "blocks.1.norm1.weight", lambda gain: gain * np.float32(1.3))
    faults.edit(faulty, "pos_embed", lambda table: table[:, ::-1])
    io.infer_shapes(faulty)
    written = baseline.write_like(
        io.load(export("fp32")), InputFormat.FLOAT, sample.preprocessing, AttentionForm.PACKED
    )
    sound = io.load(candidate)
    io.infer_shapes(sound)
    costs = [
        errors(
            *baseline.open_quantised(written.clone(), graph, sample, InputFormat.FLOAT, tmp_path),
            reference,
            InputFormat.FLOAT,
        )
        for graph in (sound, faulty)
    ]
    assert costs[0] == costs[1]


def test_a_fault_that_hides_the_structure_leaves_the_baseline_as_it_is(
    quantised, export, sample
) -> None:
    def exchanged(builder: GraphBuilder, value: ir.Value) -> ir.Value:
        q, k, v = attention.inputs[:3]
        return builder.op("Attention", [k, q, v], dict(attention.attributes))

    sound, faulty = io.load(quantised("int8-")), io.load(quantised("int8-"))
    attention = next(node for node in faulty.graph if node.op_type == "Attention")
    faults.mix(faulty, attention.outputs[0], 0.5, exchanged)
    with pytest.raises(GraphError):
        find_projections(widen(faulty))
    written = baseline.write_like(
        io.load(export("fp32")), InputFormat.FLOAT, sample.preprocessing, AttentionForm.PACKED
    )
    made = [
        baseline.quantise_like(written, candidate, Dtype.FP32).graph.initializers
        for candidate in (sound, faulty)
    ]
    assert made[0].keys() == made[1].keys()
    for name, value in made[0].items():
        np.testing.assert_array_equal(value.const_value, made[1][name].const_value, err_msg=name)


@pytest.mark.parametrize("options", [{}, {"quantize_attention": True}], ids=str)
def test_ranges_of_the_images_stand_in_for_the_candidates(
    options, quantised, export, reference, sample, tmp_path
) -> None:
    graph = io.load(quantised("int8-" + "-".join(map(str, options.values())), **options))
    io.infer_shapes(graph)
    written = baseline.write_like(
        io.load(export("fp32")), InputFormat.FLOAT, sample.preprocessing,
        attention_form(graph),
    )  # fmt: skip
    narrow = graph.clone()
    for product in Graph(graph, np.zeros(1)).quantised():
        widen_range(narrow, product, 0.25)

    def costs(candidate: ir.Model, observer: Observer) -> list[float]:
        opened = baseline.open_quantised(
            written.clone(), candidate, sample, InputFormat.FLOAT, tmp_path, OwnRanges(observer)
        )
        runners = list(opened)
        assert f"with ranges of 6 of the images by {observer}, in" in runners[1].name
        return [max(errors(runner, reference, InputFormat.FLOAT).values()) for runner in runners]

    (sound, again), (wrong, same) = costs(graph, Observer.MSE), costs(narrow, Observer.MSE)
    assert again / 1.5 < sound < again * 1.5
    assert wrong > 4 * sound  # a wrong range is in the baseline that takes it
    assert same == again
    assert costs(graph, Observer.MAX)[1] != again


def test_a_candidate_of_few_pictures_may_err_as_ranges_of_either_half_do(
    quantised, export, reference, sample, tmp_path
) -> None:
    graph = io.load(quantised("int8-"))
    io.infer_shapes(graph)
    written = baseline.write_like(
        io.load(export("fp32")), InputFormat.FLOAT, sample.preprocessing, attention_form(graph)
    )
    enough, few = (
        list(baseline.open_quantised(
            written.clone(), graph, sample, InputFormat.FLOAT, tmp_path,
            OwnRanges(Observer.MSE, few=few),
        ))
        for few in (False, True)
    )  # fmt: skip
    assert (len(enough), len(few)) == (2, 4)
    names = {runner.name.partition(", in ")[0] for runner in few[1:]}
    assert names == {
        "the reference in int8 with ranges of 6 of the images, or of half of them, by mse"
    }
    costs = [errors(runner, reference, InputFormat.FLOAT)["logits"] for runner in (*enough, *few)]
    assert costs[:2] == costs[2:4]
    assert len({costs[3], *costs[4:]}) == 3, "either half has ranges of its own"


@pytest.mark.parametrize("options", [{}, {"base": Dtype.FP16}], ids=str)
def test_weights_alone_in_8_bits_cost_the_reference_what_they_cost_the_candidate(
    options, quantised, export, reference, sample, tmp_path
) -> None:
    graph = io.load(quantised("int8-" + "-".join(map(str, options.values())), **options))
    drop_activation_pairs(graph)
    candidate = tmp_path / "weights.onnx"
    io.save(graph, candidate)
    io.infer_shapes(graph)
    have = errors(cpu_runner(candidate, Dtype.INT8, tmp_path), reference, InputFormat.FLOAT)
    written = baseline.write_like(
        io.load(export("fp32")), InputFormat.FLOAT, sample.preprocessing, attention_form(graph)
    )
    # nothing has a range to measure
    (runner,) = baseline.open_quantised(
        written, graph, sample, InputFormat.FLOAT, tmp_path, OwnRanges(Observer.MSE, few=True)
    )
    assert "the reference in int8 with quantised weights alone, in" in runner.name
    assert have == pytest.approx(errors(runner, reference, InputFormat.FLOAT), rel=0.05)


@pytest.fixture(scope="module")
def theirs(folder) -> ir.Model:
    """Give the classifier as torch exports it (a product each for query, key and value) in int8.

    onnxruntime quantises the results of products too.
    """
    model = ViTMSNForImageClassification.from_pretrained(folder / "hf", attn_implementation="eager")
    path = scripted(folder / "theirs.onnx", Reading(model, lambda m, x: m(x).logits))
    return Artifact.open(quantise_in_onnxruntime(path)).graph


def steps_of(model: ir.Model) -> list[float]:
    nodes = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    return sorted(node.inputs[1].const_value.numpy().item() for node in nodes)


@pytest.mark.parametrize("hidden", [False, True])
def test_results_of_products_are_quantised_as_the_candidates_are(
    hidden, theirs, export, sample, monkeypatch
) -> None:
    written = baseline.write_like(
        io.load(export("fp32")), InputFormat.FLOAT, sample.preprocessing, AttentionForm.PLAIN
    )
    if hidden:  # products are found by their weights

        def find(model: ir.Model) -> tuple[Projection, ...]:
            if any(node.name == "classifier.Gemm" for node in model.graph):
                return find_projections(model)
            raise GraphError("a fault hides it")

        monkeypatch.setattr(baseline, "find_projections", find)
    made = baseline.quantise_like(written, theirs, Dtype.FP32)
    assert steps_of(made) == pytest.approx(steps_of(theirs), rel=1e-6)
    assert [node.op_type for node in made.graph].count("Split") == 2 + 2  # thirds in each block
    # of the images a range of their logits is not taken
    seen: list[str] = []

    def measure(model: ir.Model, names: Sequence[str]) -> dict[str, float]:
        seen.extend(names)
        return dict.fromkeys(names, 1.0)

    baseline.quantise_like(written, theirs, Dtype.FP32, measure)
    assert "blocks.0.mlp.fc1.MatMul" in seen
    assert "logits" not in seen


# --- limits, and what has no baseline -------------------------------------------------------------


def test_what_the_precision_costs_becomes_the_limit(export, reference, sample, tmp_path) -> None:
    written = baseline.write_like(
        io.load(export("fp32")), InputFormat.FLOAT, sample.preprocessing, AttentionForm.HEADS
    )
    with baseline.open_typed(written, Dtype.FP16, sample, InputFormat.FLOAT, tmp_path) as runner:
        limited = baseline.add_baseline(reference, runner, InputFormat.FLOAT)
        assert limited.limits_from == f"1.5 times the errors of {runner.name}"
    for name, cost in limited.baseline.items():
        assert limited.limit(name).errors.relative == pytest.approx(MARGIN * cost.relative)
    assert reference.limit("embedding") is None


def test_weights_that_are_transposed_behind_their_scales_have_no_baseline(
    quantised, export, sample
) -> None:
    graph = io.load(quantised("int8-"))
    drop_activation_pairs(graph)
    for product in [node for node in graph.graph if node.op_type == "MatMul"]:
        held = product.inputs[1].producer()
        if held is not None and held.op_type == "DequantizeLinear":
            builder = GraphBuilder(graph.graph, product)
            turned = builder.op("Transpose", [held.outputs[0]], {"perm": [1, 0]})
            back = builder.op("Transpose", [turned], {"perm": [1, 0]})
            product.replace_input_with(1, back)
    io.infer_shapes(graph)
    written = baseline.write_like(
        io.load(export("fp32")), InputFormat.FLOAT, sample.preprocessing, attention_form(graph)
    )
    with pytest.raises(GraphError, match="has no product with its 8-bit weight right in front of"):
        baseline.quantise_like(written, graph, Dtype.FP32)


def test_weights_of_one_scale_have_no_baseline(quantised, export, sample) -> None:
    graph = io.load(quantised("int8-"))
    product = next(p for p in graph.graph if p.op_type == "MatMul")
    pair = product.inputs[1].producer()
    scale = pair.inputs[1]
    scale.const_value = ir.tensor(scale.const_value.numpy()[:1], name=scale.name)
    scale.shape = ir.Shape([1])
    written = baseline.write_like(
        io.load(export("fp32")), InputFormat.FLOAT, sample.preprocessing, AttentionForm.PACKED
    )
    with pytest.raises(GraphError):
        baseline.quantise_like(written, graph, Dtype.FP32)


def test_a_graph_without_8_bits_is_none_to_quantise_like(export) -> None:
    graph = io.load(export("fp32"))
    with pytest.raises(GraphError, match="the candidate has no Q/DQ; expected a quantised graph"):
        baseline.quantise_like(graph, graph, Dtype.FP16)


def test_a_packed_projection_stands_for_the_three_of_another_graph(export) -> None:
    packed = io.load(export("fp32"))
    fuse_attention(packed, AttentionForm.HEADS)
    found = find_projections(packed)
    (qkv,) = [p for p in found if (p.role, p.block) == ("qkv", 0)]
    apart = tuple(replace(qkv, node=f"{name}.MatMul") for name in "qkv")
    matched = baseline._matched_by_role(found, (*apart, *(p for p in found if p != qkv)))
    assert dict(matched)[qkv].node == "q.MatMul"
    assert len(matched) == len(found)
    with pytest.raises(GraphError, match=r"has 2 qkv projections in block 0 and the reference 3"):
        baseline._matched_by_role(apart, apart[:2])
