"""New nodes are named after the one they replace, and no name is taken twice."""

import numpy as np
import onnx
import onnx_ir as ir
from graphs import op_types, parse, random_feeds, run

from msn_export.graph.builder import Patch, replace

TEXT = "g (float[2,3] x) => (float[2,3] y) { a = Neg (x)  y = Abs (a) }"


def anchored(text: str = TEXT, index: int = 0) -> tuple[ir.Model, ir.Node, Patch]:
    model = parse(text)
    node = list(model.graph)[index]
    return model, node, Patch(model.graph, node)


def check(model: ir.Model) -> None:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_nodes_go_before_their_anchor_under_its_name() -> None:
    model, node, patch = anchored()
    first = patch.op("Relu", [model.graph.inputs[0]])
    second = patch.op("Relu", [first])
    third = patch.op("Relu", [second])
    assert op_types(model) == ["Relu", "Relu", "Relu", "Neg", "Abs"]
    names = [value.name for value in (first, second, third)]
    assert names == ["Neg0.Relu", "Neg0.Relu_2", "Neg0.Relu_3"]
    assert [n.name for n in model.graph][:3] == names
    assert patch.anchor is node


def test_an_anchor_without_a_name_lends_that_of_its_output() -> None:
    model = parse(TEXT)
    node = next(iter(model.graph))
    node.name = ""
    assert Patch(model.graph, node).op("Relu", [model.graph.inputs[0]]).name == "a.Relu"


def test_several_outputs_are_numbered() -> None:
    model, _, patch = anchored("g (float[2,4] x) => (float[2,4] y) { y = Neg (x) }")
    parts = patch.ops("Split", [model.graph.inputs[0]], {"axis": 1, "num_outputs": 2}, outputs=2)
    assert [part.name for part in parts] == ["Neg0.Split.0", "Neg0.Split.1"]


def test_a_name_that_some_value_has_is_not_given_again() -> None:
    # a graph of another tool may call its values as we would call ours
    model, node, _ = anchored()
    node.outputs[0].name = "Neg0.Relu"
    new = Patch(model.graph, node).op("Relu", [model.graph.inputs[0]])
    assert new.name == "Neg0.Relu_2"
    replace(node.outputs[0], new)
    check(model)


def test_a_constant_is_shared_where_it_is_the_same_and_renamed_where_it_is_not() -> None:
    model, _, patch = anchored()
    one = patch.constant(np.asarray(0.5, np.float32), "half")
    assert patch.constant(np.asarray(0.5, np.float32), "half") is one
    other = patch.constant(np.asarray(0.25, np.float32), "half")
    half = patch.constant(np.asarray(0.5, np.float16), "half")
    assert [value.name for value in (one, other, half)] == ["half", "half_", "half__"]
    assert half.dtype == ir.DataType.FLOAT16
    assert set(model.graph.initializers) == {"half", "half_", "half__"}


def test_readers_follow_and_the_numbers_stay() -> None:
    model, node, patch = anchored()
    feeds = random_feeds(model)
    before = run(model, feeds)
    x = model.graph.inputs[0]
    zero = patch.constant(np.zeros((), np.float32), "zero")
    replace(node.outputs[0], patch.op("Sub", [zero, x]))
    model.graph.remove(node, safe=True)
    assert op_types(model) == ["Sub", "Abs"]
    np.testing.assert_array_equal(run(model, feeds), before)
    check(model)


def test_a_graph_output_keeps_its_name_type_and_shape() -> None:
    model, node, patch = anchored(index=1)
    old = node.outputs[0]
    replace(old, patch.op("Max", [node.inputs[0], node.inputs[0]]))
    (output,) = model.graph.outputs
    assert output.name == "y"
    assert old.name == "y.before"
    assert output.dtype == ir.DataType.FLOAT
    assert output.shape == ir.Shape([2, 3])
    check(model)
