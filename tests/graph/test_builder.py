"""New nodes are named after the one they replace, and no name is taken twice."""

import numpy as np
import onnx
import onnx_ir as ir

from msn_export.graph.builder import GraphBuilder, replace
from tests.builders.graphs import op_types, parse, random_feeds, run

TEXT = "g (float[2,3] x) => (float[2,3] y) { a = Neg (x)  y = Abs (a) }"


def anchored(text: str = TEXT, index: int = 0) -> tuple[ir.Model, ir.Node, GraphBuilder]:
    model = parse(text)
    node = list(model.graph)[index]
    return model, node, GraphBuilder(model.graph, node)


def check(model: ir.Model) -> None:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_nodes_go_before_their_anchor_under_its_name() -> None:
    model, _, builder = anchored()
    first = builder.op("Relu", [model.graph.inputs[0]])
    second = builder.op("Relu", [first])
    third = builder.op("Relu", [second])
    assert op_types(model) == ["Relu", "Relu", "Relu", "Neg", "Abs"]
    names = [value.name for value in (first, second, third)]
    assert names == ["Neg0.Relu", "Neg0.Relu_2", "Neg0.Relu_3"]
    assert [n.name for n in model.graph][:3] == names


def test_nodes_that_go_after_a_node_keep_their_order() -> None:
    model, node, builder = anchored()
    first = builder.after(node).op("Relu", [node.outputs[0]], name="first")
    second = builder.op("Relu", [first], name="first")
    assert op_types(model) == ["Neg", "Relu", "Relu", "Abs"]
    assert [n.name for n in model.graph][1:3] == [first.name, second.name] == ["first", "first_2"]


def test_without_an_anchor_nodes_go_to_the_end_under_the_scope() -> None:
    model = parse(TEXT)
    builder = GraphBuilder(model.graph)
    builder.scope = "head"
    names = [builder.op("Relu", [model.graph.outputs[0]]).name for _ in range(2)]
    assert [n.name for n in model.graph][2:] == names == ["head.Relu", "head.Relu_2"]


def test_a_node_of_a_known_shape_has_the_type_of_its_first_input() -> None:
    model, _, builder = anchored()
    x = model.graph.inputs[0]
    flat = builder.reshape(x, 1, 3, shape=(2, 1, 3))
    half = builder.cast(flat, ir.DataType.FLOAT16)
    assert (flat.shape, flat.dtype) == (ir.Shape((2, 1, 3)), ir.DataType.FLOAT)
    assert (half.shape, half.dtype) == (ir.Shape((2, 1, 3)), ir.DataType.FLOAT16)
    assert model.graph.initializers["shape.bx1x3"].const_value.numpy().tolist() == [-1, 1, 3]


def test_an_anchor_without_a_name_lends_that_of_its_output() -> None:
    model = parse(TEXT)
    node = next(iter(model.graph))
    node.name = ""
    assert GraphBuilder(model.graph, node).op("Relu", [model.graph.inputs[0]]).name == "a.Relu"


def test_several_outputs_are_numbered() -> None:
    model, _, builder = anchored("g (float[2,4] x) => (float[2,4] y) { y = Neg (x) }")
    parts = builder.ops("Split", [model.graph.inputs[0]], {"axis": 1, "num_outputs": 2}, outputs=2)
    assert [part.name for part in parts] == ["Neg0.Split.0", "Neg0.Split.1"]


def test_a_name_that_some_value_has_is_not_given_again() -> None:
    # a graph of another tool may call its values as we would call ours
    model, node, _ = anchored()
    node.outputs[0].name = "Neg0.Relu"
    new = GraphBuilder(model.graph, node).op("Relu", [model.graph.inputs[0]])
    assert new.name == "Neg0.Relu_2"
    replace(node.outputs[0], new)
    check(model)


def test_a_constant_is_shared_where_it_is_the_same_and_renamed_where_it_is_not() -> None:
    model, _, builder = anchored()
    one = builder.constant(np.asarray(0.5, np.float32), "half")
    assert builder.constant(np.asarray(0.5, np.float32), "half") is one
    other = builder.constant(np.asarray(0.25, np.float32), "half")
    half = builder.constant(np.asarray(0.5, np.float16), "half")
    assert [value.name for value in (one, other, half)] == ["half", "half_", "half__"]
    assert half.dtype == ir.DataType.FLOAT16
    assert set(model.graph.initializers) == {"half", "half_", "half__"}


def test_readers_follow_and_the_numbers_stay() -> None:
    model, node, builder = anchored()
    feeds = random_feeds(model)
    before = run(model, feeds)
    x = model.graph.inputs[0]
    zero = builder.constant(np.zeros((), np.float32), "zero")
    replace(node.outputs[0], builder.op("Sub", [zero, x]))
    model.graph.remove(node, safe=True)
    assert op_types(model) == ["Sub", "Abs"]
    np.testing.assert_array_equal(run(model, feeds), before)
    check(model)


def test_a_graph_output_keeps_its_name_type_and_shape() -> None:
    model, node, builder = anchored(index=1)
    old = node.outputs[0]
    replace(old, builder.op("Max", [node.inputs[0], node.inputs[0]]))
    (output,) = model.graph.outputs
    assert output.name == "y"
    assert old.name == "y.before"
    assert output.dtype == ir.DataType.FLOAT
    assert output.shape == ir.Shape([2, 3])
    check(model)
