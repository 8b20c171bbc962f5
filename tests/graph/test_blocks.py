"""The residual stream is found by structure, in graphs of any exporter; parts by structure too."""

import contextlib
import io as stdio
import warnings
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from msn_export.commands.onnx import OnnxJob, run_onnx
from msn_export.errors import GraphError
from msn_export.graph import io
from msn_export.graph.blocks import ENTRY, find_stream, modules_of, parts_of, stages_of, tensors_of
from msn_export.graph.builder import GIVEN, MARK, mark_outputs, with_inputs
from msn_export.graph.cls_only import narrow_to_first_token
from msn_export.graph.emulate import emulate_bf16
from msn_export.graph.precision import type_graph
from msn_export.graph.summary import (
    Structure,
    differences,
    differences_by_block,
    lost_epsilons,
    precision_map,
    structure_of,
    structure_of_module,
)
from msn_export.models.checkpoint import load_checkpoint
from msn_export.progress import Silent
from msn_export.spec import Dtype, Head, Target
from tests.builders.checkpoints import hugging_face
from tests.builders.graphs import parse, run
from tests.contracts import faults

# One pre-norm block; the tanh form of GELU has an addition of two computed values inside
BLOCK = """
g (float[b,3,4] x) => (float[b,3,4] y)
<float[4] gain = {1.0, 1.0, 1.0, 1.0}, float[4,4] w = {1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0,
 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0}, float[4] position = {0.1, 0.2, 0.3, 0.4},
 float cube = {0.04}>
{
    entry = Add (x, position)
    n1 = LayerNormalization <epsilon = 0.000001> (entry, gain)
    q = MatMul (n1, w)
    kt = Transpose <perm = [0, 2, 1]> (n1)
    scores = MatMul (q, kt)
    p = Softmax <axis = -1> (scores)
    mixed = MatMul (p, n1)
    attended = MatMul (mixed, w)
    middle = Add (attended, entry)
    n2 = LayerNormalization <epsilon = 0.00001> (middle, gain)
    hidden = MatMul (n2, w)
    squared = Mul (hidden, hidden)
    third = Mul (squared, cube)
    inner = Add (hidden, third)
    bent = Tanh (inner)
    added = MatMul (bent, w)
    stream = Add (middle, added)
    y = LayerNormalization <epsilon = 0.000001> (stream, gain)
}
"""


def structure_of_graph(model: ir.Model) -> Structure:
    return structure_of(model, find_stream(model))


def text() -> ir.Model:
    return parse(BLOCK)


def test_the_stream_is_the_operand_that_the_other_comes_from() -> None:
    stream = find_stream(text())
    (block,) = stream.blocks
    assert stream.entry.name == "entry"
    assert [value.name for value in block.streams] == ["middle", "stream"]
    assert [value.name for value in block.branches] == ["attended", "added"]
    assert block.output.name == "stream"
    assert len(block.nodes) == 16
    assert list(stages_of(find_stream(text()))) == [ENTRY, "block 0"]


def test_parts_are_found_by_structure() -> None:
    (block,) = find_stream(text()).blocks
    assert {part: value.name for part, value in parts_of(block).items()} == {
        "block 0 norm before attention": "n1",
        "block 0 attention heads": "mixed",
        "block 0 attention": "attended",
        "block 0 stream after attention": "middle",
        "block 0 norm before MLP": "n2",
        "block 0 activation": "bent",
        "block 0 MLP": "added",
    }
    names = [names for names, _ in tensors_of(block)]
    assert ("n1", "block 0 norm before attention") in names
    assert ("scores",) in names


def test_what_a_graph_says_of_itself_is_read() -> None:
    told = structure_of_graph(text())
    assert told["block 0 norm before attention: epsilon"] == pytest.approx(1e-6)
    assert told["block 0 norm before MLP: epsilon"] == pytest.approx(1e-5)
    assert told["block 0: activation"] == "gelu, tanh form"
    assert told["block 0: addition of attention to the stream"] == "present"
    assert told["block 0: addition of the MLP to the stream"] == "present"
    assert told["block 0: order"] == "norm, attention, norm, MLP"
    assert told["final norm: epsilon"] == pytest.approx(1e-6)


def test_contradictions_are_told_once_for_all_their_places() -> None:
    reference = {f"block {i} norm before MLP: epsilon": 1e-6 for i in range(12)}
    candidate = dict.fromkeys(reference, 1e-5) | {"block 3: activation": "gelu"}
    assert differences(reference, candidate) == [
        "epsilon is 1e-05, the reference's 1e-06 in block 0 norm before MLP, block 1 norm before "
        "MLP, block 2 norm before MLP and 9 more"
    ]
    assert differences(reference, {}) == []
    assert differences(reference, dict.fromkeys(reference, float(np.float32(1e-6)))) == []


HALF = [
    (1e-6, float(np.float16(1e-6)), ir.DataType.FLOAT16, True),  # subnormal there: 1.3 % more
    (1e-5, float(np.float16(1e-5)), ir.DataType.FLOAT16, True),
    (1e-6, 1e-5, ir.DataType.FLOAT16, False),
    (1e-6, float(np.float16(1e-5)), ir.DataType.FLOAT16, False),
    (1e-6, 1e-12, ir.DataType.FLOAT16, False),
    (1e-6, 0.0, ir.DataType.FLOAT16, False),
    (1e-6, float(np.float16(1e-6)), ir.DataType.FLOAT, False),
    (1e-6, float(np.float16(1e-6)), ir.DataType.BFLOAT16, False),
    (3e-6, 2.995133399963379e-06, ir.DataType.BFLOAT16, True),
    (1e-12, 0.0, ir.DataType.FLOAT16, True),
    (1e-12, float(np.float16(5.96e-8)), ir.DataType.FLOAT16, True),
    (1e-12, float(np.float16(1e-7)), ir.DataType.FLOAT16, True),
    (1e-12, float(np.float16(1e-6)), ir.DataType.FLOAT16, False),
    (1e-12, 0.0, ir.DataType.FLOAT, False),
    (1e-12, 0.0, ir.DataType.BFLOAT16, False),  # which holds 1e-12
]  # fmt: skip


@pytest.mark.parametrize(("want", "have", "dtype", "same"), HALF)
def test_an_epsilon_may_be_rounded_to_the_type_of_its_graph(want, have, dtype, same) -> None:
    def with_epsilon(epsilon: float) -> ir.Model:
        model = text()
        for node in model.graph:
            if node.op_type == "LayerNormalization":
                node.attributes.add(ir.AttrFloat32("epsilon", epsilon))
        return model

    reference, candidate = with_epsilon(want), with_epsilon(have)
    for node in candidate.graph:
        node.outputs[0].dtype = dtype
    sides = [structure_of_graph(model) for model in (reference, candidate)]
    for pair in (sides, sides[::-1]):  # either may be the reference
        found, lost = differences(*pair), lost_epsilons(*pair)
        assert (found == []) is same, found
        shown = [f"{x:g}" for x in ((have, want) if pair is sides else (want, have))]
        assert lost == (
            [
                f"epsilon is {shown[0]}, the reference's {shown[1]} (fp16 holds none so small; the "
                "numbers decide) in block 0 norm before MLP, block 0 norm before attention, final "
                "norm"
            ]
            if same and want == 1e-12
            else []
        )


@pytest.mark.parametrize(
    ("old", "new", "without"),
    [
        ("added = MatMul (bent, w)", "added = Neg (bent)", [8]),  # fc2
        ("attended = MatMul (mixed, w)", "attended = Neg (mixed)", [3]),  # output projection
        ("n2 = LayerNormalization <epsilon = 0.00001> (middle, gain)", "n2 = Neg (middle)", [5]),
    ],
)
def test_a_part_that_a_block_does_not_have_computes_in_nothing(old, new, without) -> None:
    (whole,) = precision_map(find_stream(text()))
    (lacking,) = precision_map(find_stream(parse(BLOCK.replace(old, new))))
    assert whole.dtypes == ("fp32",) * 10
    assert [at for at, dtype in enumerate(lacking.dtypes) if not dtype] == without


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{ y = Relu (x) }", "no residual stream"),
        ("{ a = Relu (x)  y = Add (x, a) }", "no residual stream with attention"),
    ],
)
def test_what_is_no_transformer_is_refused(body, reason) -> None:
    model = parse(f"g (float[b,3] x) => (float[b,3] y) {body}")
    with pytest.raises(GraphError, match=reason):
        find_stream(model)


# --- structure that differs -----------------------------------------------------------------------

QUICK_GELU = {
    "a product and Sigmoid": "f = Mul (x, c)  s = Sigmoid (f)  y = Mul (x, s)",
    "the factor first": "f = Mul (c, x)  s = Sigmoid (f)  y = Mul (s, x)",
    "divided": "f = Div (x, d)  s = Sigmoid (f)  y = Mul (x, s)",
    "an exponential": (
        "f = Mul (x, minus)  e = Exp (f)  t = Add (e, one)  r = Reciprocal (t)  y = Mul (x, r)"
    ),
    "negated, divided by": (
        "f = Mul (x, c)  n = Neg (f)  e = Exp (n)  t = Add (one, e)  y = Div (x, t)"
    ),
    "half precision": (
        "h = Cast <to = 10> (x)  k = Cast <to = 10> (c)  f = Mul (h, k)  s = Sigmoid (f)"
        "  m = Mul (h, s)  y = Cast <to = 1> (m)"
    ),
    "one operator": "y = Swish <alpha = 1.702> (x)",
}  # fmt: skip
OTHERS = {
    "silu": "s = Sigmoid (x)  y = Mul (x, s)",
    "x * sigmoid(1.6 x)": "f = Mul (x, other)  s = Sigmoid (f)  y = Mul (x, s)",
    "relu": "y = Relu (x)",
}
NUMBERS = """<float c = {1.702}, float d = {0.58754405}, float minus = {-1.702}, float one = {1.0},
 float other = {1.6}>"""


def activated(body: str) -> ir.Model:
    """The block of this page with another activation."""
    model = text()
    form = parse(f"g (float[b,3,4] x) => (float[b,3,4] y) {NUMBERS} {{ {body} }}", opset=24)
    bent = next(node for node in model.graph if node.op_type == "Tanh")
    inputs = {"x": next(n for n in model.graph if n.outputs[0].name == "hidden").outputs[0]}
    inputs |= {name: value for name, value in form.graph.initializers.items() if value.uses()}
    for name in inputs.keys() - {"x"}:
        value = ir.Value(name=name, const_value=inputs[name].const_value)
        value.type, value.shape = inputs[name].type, inputs[name].shape
        model.graph.register_initializer(value)
        inputs[name] = value
    for node in form.graph:
        read = [inputs[value.name] for value in node.inputs if value is not None]
        made = ir.node(node.op_type, read, dict(node.attributes), name=f"act.{node.name}")
        made.outputs[0].name, made.outputs[0].type = (
            f"act.{node.outputs[0].name}",
            node.outputs[0].type,
        )
        inputs[node.outputs[0].name] = made.outputs[0]
        model.graph.insert_before(bent, made)
    bent.outputs[0].replace_all_uses_with(inputs["y"])
    return model


@pytest.mark.parametrize("body", QUICK_GELU.values(), ids=QUICK_GELU.keys())
def test_quick_gelu_is_known_in_each_form_exporters_write(body) -> None:
    told = structure_of_graph(activated(body))
    assert told["block 0: activation"] == "gelu, sigmoid form"
    assert differences(structure_of_graph(text()), told) == [
        "activation is gelu, sigmoid form, the reference's gelu, tanh form in block 0"
    ]


@pytest.mark.parametrize(("name", "body"), OTHERS.items())
def test_what_is_no_quick_gelu_is_named_as_what_it_is(name, body) -> None:
    assert structure_of_graph(activated(body))["block 0: activation"] == name


@pytest.fixture(scope="module")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("four")
    hugging_face(path / "hf", num_hidden_layers=4)
    run_onnx(OnnxJob(str(path / "hf"), path / "m.onnx", check=False), Silent())
    return path / "m.onnx"


IRREGULAR = {
    "attention not added": (
        faults.no_residual, "blocks.2.Add_2",
        "addition of attention to the stream is missing, the reference's present in block 2",
    ),
    "MLP not added": (
        partial(faults.no_residual, mlp=True), "blocks.2.mlp.fc2.Add",
        "addition of the MLP to the stream is missing, the reference's present in block 2",
    ),
    "norms behind the additions": (
        faults.post_norm, "blocks.2.norm2.LayerNormalization",
        "order is attention, norm, MLP, norm, the reference's norm, attention, norm, MLP in "
        "block 2",
    ),
    "QuickGELU": (
        faults.quick_gelu, "blocks.2.Add_2",
        "activation is gelu, sigmoid form, the reference's gelu in block 2",
    ),
    "a residual tail": (
        lambda model, _block: faults.tail(model), "blocks.2.Add_2",
        "number of residual additions is 1, the reference's 0 in the tail",
    ),
}  # fmt: skip


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(("fault", "output", "told"), IRREGULAR.values(), ids=IRREGULAR.keys())
def test_blocks_are_found_where_one_is_irregular(fault, output, told, named, four_blocks) -> None:
    model = io.load(four_blocks)
    io.infer_shapes(model)
    regular = structure_of_graph(model)
    fault(model, 2)
    expected = next(v for node in model.graph for v in node.outputs if v.name == output)
    if not named:
        for index, node in enumerate(model.graph):
            node.name = f"n{index}"
            for place, value in enumerate(node.outputs):
                value.name = value.name if value.is_graph_output() else f"v{index}.{place}"
    stream = find_stream(model)
    assert [block.number for block in stream.blocks] == [0, 1, 2, 3]
    assert stream.blocks[2].output is expected
    assert all(a.output is b.entry for a, b in pairwise(stream.blocks))
    assert differences(regular, structure_of_graph(model)) == [told]


def test_a_block_without_attention_leaves_its_number_free(four_blocks) -> None:
    model = io.load(four_blocks)
    faults.no_branch(model, 1)
    assert [block.number for block in find_stream(model).blocks] == [0, 2, 3]


def test_contradictions_are_told_by_block_too() -> None:
    want = {"block 1 norm before MLP: epsilon": 1e-6, "block 1: activation": "gelu"}
    have = {"block 1 norm before MLP: epsilon": 1e-5, "block 1: activation": "relu"}
    assert differences_by_block(want, have) == {
        "block 1": (
            "epsilon is 1e-05, the reference's 1e-06 in norm before MLP",
            "activation is relu, the reference's gelu",
        )
    }
    assert differences_by_block({"the tail: x": "0"}, {"the tail: x": "1"}) == {
        "the tail": ("x is 1, the reference's 0",)
    }


# --- values shown, and given ----------------------------------------------------------------------


def test_a_given_value_takes_the_place_of_what_is_computed() -> None:
    model = text()
    middle = find_stream(model).blocks[0].streams[0]
    fed = mark_outputs(with_inputs(model, {"middle": middle}), {"middle": middle})
    assert [value.name for value in fed.graph.inputs] == ["x", f"{GIVEN}middle"]
    draw = np.random.default_rng(0)
    x, other = (draw.standard_normal((2, 3, 4)).astype(np.float32) for _ in range(2))
    plain = mark_outputs(model, {"middle": middle})
    computed = run_all(plain, {"x": x})[f"{MARK}middle"]
    again = run_all(fed, {"x": x, f"{GIVEN}middle": computed})
    np.testing.assert_array_equal(again["y"], run(model, {"x": x}))
    changed = run_all(fed, {"x": x, f"{GIVEN}middle": other})
    # what is computed is still shown; what follows comes from what was given
    np.testing.assert_array_equal(changed[f"{MARK}middle"], computed)
    assert not np.allclose(changed["y"], again["y"])


def test_a_given_input_is_ready_for_the_first_node() -> None:
    model = text()
    fed = with_inputs(model, {"x": model.graph.inputs[0]})
    assert fed.graph[0].outputs[0].name == f"{GIVEN}x.Cast"


def run_all(model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def test_shown_values_are_the_graphs_own_and_change_nothing() -> None:
    model = text()
    shown = mark_outputs(model, {"block 0": find_stream(model).blocks[0].output})
    assert [value.name for value in shown.graph.outputs] == ["y", f"{MARK}block 0"]
    assert len(model.graph.outputs) == 1
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    np.testing.assert_array_equal(run(shown, {"x": x}), run(model, {"x": x}))


def test_half_precision_is_shown_as_float32() -> None:
    for dtype in (Dtype.FP16, Dtype.BF16):
        model = text()
        type_graph(model, dtype)
        shown = mark_outputs(model, {"block 0": find_stream(model).blocks[0].output})
        assert shown.graph.outputs[1].dtype == ir.DataType.FLOAT
        if dtype is Dtype.BF16:
            emulated = emulate_bf16(shown)
            assert [value.name for value in emulated.graph.outputs] == ["y", f"{MARK}block 0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream")
    hugging_face(path / "hf")
    return path


@pytest.mark.parametrize("target", Target)
def test_our_graphs_of_every_target_name_blocks_and_modules(target, folder, tmp_path) -> None:
    job = OnnxJob(str(folder / "hf"), tmp_path / "m.onnx", target=target, check=False)
    run_onnx(replace(job, heads=(Head.TOKENS,)), Silent())
    model = io.load(tmp_path / "m.onnx")
    io.infer_shapes(model)
    stream = find_stream(model)
    assert [block.number for block in stream.blocks] == [0, 1]
    assert all(block.output.name.startswith(f"blocks.{block.number}.") for block in stream.blocks)
    assert set(modules_of(stream.blocks[1])) == {
        f"blocks.1.{leaf}"
        for leaf in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    }
    assert len(parts_of(stream.blocks[1])) == 7
    module = load_checkpoint(str(folder / "hf")).model
    assert structure_of_graph(model).keys() == structure_of_module(module).keys()
    assert differences(structure_of_module(module), structure_of_graph(model)) == []
    (first, _) = precision_map(find_stream(model))
    assert set(first.dtypes) == {"fp32"}


def test_a_last_block_for_the_first_token_alone_keeps_its_place(folder, tmp_path) -> None:
    run_onnx(OnnxJob(str(folder / "hf"), tmp_path / "m.onnx", check=False), Silent())
    model = io.load(tmp_path / "m.onnx")
    narrow_to_first_token(model)
    stream = find_stream(model)
    assert [block.number for block in stream.blocks] == [0, 1]
    assert list(stream.blocks[1].output.shape)[1:] == [1, 64]
    assert len(parts_of(stream.blocks[1])) == 7


class Tokens(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).last_hidden_state


def exported_elsewhere(model: torch.nn.Module, path: Path, opset: int) -> Path:
    """Export Hugging Face's own model with torch alone; opset 14 writes LayerNorm out."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(stdio.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Tokens(model), (torch.zeros(2, 3, 32, 32),), path, dynamo=opset > 17,
            opset_version=opset, input_names=["pixel_values"], output_names=["last_hidden_state"],
            verbose=False,
            **({"external_data": False} if opset > 17 else {}),
        )  # fmt: skip
    return path


@pytest.mark.parametrize("opset", [14, 18, 23])
def test_a_graph_of_another_exporter_has_the_same_stream(opset, tmp_path) -> None:
    path = exported_elsewhere(hugging_face(tmp_path / "hf"), tmp_path / "hf.onnx", opset)
    model = io.load(path)
    io.infer_shapes(model)
    stream = find_stream(model)
    assert [block.number for block in stream.blocks] == [0, 1]
    expected = 5 if opset == 14 else 7  # a LayerNorm that is written out has no operator
    assert [len(parts_of(block)) for block in stream.blocks] == [expected, expected]
