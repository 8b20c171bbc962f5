"""Graphs are read from hostile files and written without gathering their weights."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msn_export.errors import GraphError
from msn_export.graph import io
from tests.builders.graphs import parse, random_feeds, run

TEXT = """
g (float[b,4] x) => (float[b,2] y) <float[4,2] w = {1, 2, 3, 4, 5, 6, 7, 8}> { y = MatMul (x, w) }
"""


def with_big_weight() -> ir.Model:
    return parse(
        TEXT.replace("[4,2]", "[4,600]")
        .replace("b,2]", "b,600]")
        .replace("{1, 2, 3, 4, 5, 6, 7, 8}", "{" + ", ".join(str(i % 7) for i in range(2400)) + "}")
    )


def test_a_saved_graph_is_what_onnx_would_have_saved(tmp_path) -> None:
    model = with_big_weight()
    io.save(model, tmp_path / "m.onnx")
    ours, theirs = onnx.load(tmp_path / "m.onnx"), ir.to_proto(model)
    assert onnx.numpy_helper.to_array(ours.graph.initializer[0]).tolist() == (
        onnx.numpy_helper.to_array(theirs.graph.initializer[0]).tolist()
    )
    theirs.graph.ClearField("value_info")  # that of the weight, which repeats the weight's own
    for proto in (ours, theirs):
        proto.graph.ClearField("initializer")
    assert ours == theirs
    io.check(tmp_path / "m.onnx")
    feeds = random_feeds(model)
    np.testing.assert_array_equal(run(io.load(tmp_path / "m.onnx"), feeds), run(model, feeds))


def test_saving_twice_gives_the_same_bytes(tmp_path) -> None:
    for name in ("a", "b"):
        io.save(with_big_weight(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_graph_over_two_gib_is_refused_before_it_is_written(tmp_path) -> None:
    model = parse(TEXT)
    weight = model.graph.initializers["w"]

    class Huge(ir.LazyTensor):
        nbytes = 2**31

    weight.const_value = Huge(
        lambda: ir.tensor(np.zeros(1, np.float32)), ir.DataType.FLOAT, ir.Shape([2**29])
    )
    with pytest.raises(GraphError, match=r"the graph is 2.0 GiB .* export it with --dtype fp16"):
        io.save(model, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_a_skeleton_has_weights_as_inputs_and_is_refilled() -> None:
    model = with_big_weight()
    proto = io.skeleton(model)
    assert [value.name for value in proto.graph.input] == ["x", "w"]
    assert proto.ByteSize() < 1000
    assert "w" in model.graph.initializers
    refilled = io.refill(proto, model)
    feeds = random_feeds(model)
    np.testing.assert_array_equal(run(refilled, feeds), run(model, feeds))


def test_a_skeleton_that_asks_for_an_unknown_weight_is_refused() -> None:
    model = with_big_weight()
    proto = io.skeleton(model)
    proto.graph.input[1].name = "other"
    proto.graph.node[0].input[1] = "other"
    with pytest.raises(GraphError, match="asks for 'other', which is no weight"):
        io.refill(proto, model)


def test_a_graph_that_has_lost_its_weights_is_named(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    made = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"], name="A")], "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1, 3, 4, 4])],
        [onnx.helper.make_tensor_value_info("y", 1, [1, 3, 4, 4])],
    )  # fmt: skip
    onnx.save(onnx.helper.make_model(made), path)
    with pytest.raises(GraphError, match=r"nothing in it makes 'w', which node 'A' reads"):
        io.load(path)


def test_a_weight_of_another_size_than_it_says_is_named(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    weight = onnx.numpy_helper.from_array(np.zeros((2, 3), np.float32), "w")
    weight.raw_data = weight.raw_data[:8]
    made = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g",
        [onnx.helper.make_tensor_value_info("x", 1, [2, 3])],
        [onnx.helper.make_tensor_value_info("y", 1, [2, 3])], [weight],
    )  # fmt: skip
    onnx.save(onnx.helper.make_model(made), path)
    with pytest.raises(GraphError, match=r"weight 'w' has 8 bytes, and its sizes \[2, 3\] make 24"):
        io.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give an .onnx or .engine file"),
        (b"", "is not an ONNX file"),
        (b"not protobuf at all", "is not an ONNX file"),
        (b"\x08\x0a", "is not an ONNX file"),
    ],
)
def test_what_is_not_onnx_is_named(content, message, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(GraphError, match=rf"m\.onnx {message}"):
        io.load(path)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(data)
        with pytest.raises(GraphError):
            io.load(path)


@given(st.data())
def test_a_truncated_or_flipped_file_is_read_or_refused(data: st.DataObject) -> None:
    original = ir.to_proto(parse(TEXT)).SerializeToString()
    broken = bytearray(original[: data.draw(st.integers(0, len(original)))])
    if broken and data.draw(st.booleans()):
        broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        path.write_bytes(bytes(broken))
        try:
            io.load(path)
        except GraphError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname", "a/../../w.bin"])
def test_weights_outside_the_folder_are_refused(location, tmp_path) -> None:
    proto = ir.to_proto(with_big_weight())
    external(proto, location)
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match="weight 'w' lies outside the folder"):
        io.load(path)


def test_missing_external_weights_are_named(tmp_path) -> None:
    proto = ir.to_proto(with_big_weight())
    external(proto, "w.bin")
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match=r"its weight file w\.bin is missing"):
        io.load(path)


def test_external_weights_beside_the_file_are_read(tmp_path) -> None:
    model = with_big_weight()
    path = tmp_path / "m.onnx"
    save_beside(model, path)
    assert (tmp_path / "w.bin").stat().st_size == 4 * 4 * 600
    feeds = random_feeds(model)
    io.save(io.load(path), tmp_path / "whole.onnx")
    np.testing.assert_array_equal(run(io.load(tmp_path / "whole.onnx"), feeds), run(model, feeds))


def test_small_external_weights_reach_the_libraries_too(tmp_path) -> None:
    # torch.onnx.export puts every weight beside the graph, whatever its size
    model, path = parse(TEXT), tmp_path / "m.onnx"
    save_beside(model, path)
    assert io.skeleton(io.load(path)).graph.initializer[0].external_data == []


@pytest.mark.parametrize("location", ["../w.bin", "/etc/hostname"])
@pytest.mark.parametrize("place", ["attribute", "subgraph"])
def test_nor_can_they_hide_in_an_attribute_or_a_subgraph(place, location, tmp_path) -> None:
    proto = ir.to_proto(with_big_weight())
    external(proto, location)
    weight = proto.graph.initializer.pop()
    if place == "attribute":
        proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=weight))
    else:
        branch = onnx.helper.make_graph(list(proto.graph.node), "b", [], proto.graph.output)
        branch.initializer.append(weight)
        proto.graph.input.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, []))
        del proto.graph.node[:]
        proto.graph.node.append(
            onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        )
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match="weight 'w' lies outside the folder"):
        io.load(path)


def test_external_weights_that_end_too_soon_are_named(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    save_beside(with_big_weight(), path)
    (tmp_path / "w.bin").write_bytes(b"short")
    with pytest.raises(GraphError, match=r"its weights cannot be read \(.*\); copy them again"):
        io.load(path)


def test_a_graph_that_contradicts_itself_fails_its_check(tmp_path) -> None:
    proto = ir.to_proto(parse(TEXT))
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3
    path = tmp_path / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(GraphError, match=r"m\.onnx breaks the ONNX specification: .*hape"):
        io.check(path)
    with pytest.raises(GraphError, match="types or shapes do not fit"):
        io.infer_shapes(io.load(path))


def test_shapes_follow_from_values_that_are_shapes() -> None:
    """As exporters write a reshape that keeps the batch: Shape, Gather, Concat."""
    model = parse("""
        g (float[2,3,4] x) => (float[m,n] y)
        <int64 first = {0}, int64[1] axes = {0}, int64[1] rest = {-1}> {
            s = Shape (x)
            b = Gather (s, first)
            c = Unsqueeze (b, axes)
            t = Concat <axis = 0> (c, rest)
            z = Reshape (x, t)
            y = Relu (z)
        }""")
    io.infer_shapes(model)
    (z,) = (value for node in model.graph for value in node.outputs if value.name == "z")
    assert list(z.shape) == [2, 12]


def test_an_operand_of_a_type_that_its_operator_does_not_take_is_refused() -> None:
    model = parse("g (float[b,4] x) => (float[b,4] y) { y = Sqrt (x) }")
    model.graph.inputs[0].dtype = ir.DataType.INT64
    with pytest.raises(GraphError, match="the graph's types or shapes do not fit: "):
        io.infer_shapes(model)


def save_beside(model: ir.Model, path: Path) -> None:
    """Save with every weight in w.bin."""
    ir.save(model, path, external_data="w.bin", size_threshold_bytes=0)


def external(proto: onnx.ModelProto, location: str) -> None:
    tensor = proto.graph.initializer[0]
    tensor.raw_data = onnx.numpy_helper.to_array(tensor).tobytes()
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")


@pytest.mark.parametrize("named", ["m.onnx", "./m.onnx", "{folder}/m.onnx"])
@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_a_link_out_of_the_folder_is_not_followed(named, link, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_beside(with_big_weight(), folder / "m.onnx")
    (folder / "w.bin").rename(tmp_path / "secret.bin")
    link(folder / "w.bin", tmp_path / "secret.bin")
    monkeypatch.chdir(folder)
    with pytest.raises(GraphError, match=r"m\.onnx: its weights cannot be read \(External data"):
        io.load(Path(named.format(folder=folder)))


@pytest.mark.parametrize("place", ["node", "function", "list"])
def test_a_tensor_in_another_file_is_refused_where_nobody_would_look_for_it(
    place, tmp_path, monkeypatch
) -> None:
    proto = ir.to_proto(parse(TEXT))
    (tmp_path / "w.bin").write_bytes(bytes(64))
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [0.0])
    weight.ClearField("float_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="w.bin")
    held = [weight] if place == "list" else weight
    node = onnx.helper.make_node("ConstantOfShape", ["s"], ["c"], name="fill", value=held)
    if place == "function":
        opsets = [onnx.helper.make_opsetid("", 23)]
        function = onnx.helper.make_function("own", "F", ["s"], ["c"], [node], opsets)
        proto.functions.append(function)
    else:
        proto.graph.input.append(
            onnx.helper.make_tensor_value_info("s", onnx.TensorProto.INT64, [1])
        )
        proto.graph.node.append(node)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GraphError, match="'value' of node 'fill' has its tensor in another file"):
        io.load(Path("m.onnx"))


def damaged(change: Callable[[onnx.ModelProto], object], path: Path) -> Path:
    proto = ir.to_proto(parse(TEXT))
    proto.graph.node[0].name = "a name"
    change(proto)
    path.write_bytes(proto.SerializeToString().replace(b"a name", b"a\xff\xfeme"))
    return path


def no_name_that_is_text(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].name = "a name"


def no_operators(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].name = ""
    del proto.opset_import[:]


def no_type_that_there_is(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].name = ""
    proto.graph.node[0].attribute.add(name="x", type=onnx.AttributeProto.UNDEFINED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_name_that_is_text, "is not an ONNX file"),
        (no_operators, "names no version of ONNX's operators; export it again"),
        (no_type_that_there_is, "is not an ONNX file"),
    ],
)
def test_what_could_not_be_written_again_is_not_read(change, message, tmp_path) -> None:
    with pytest.raises(GraphError, match=message):
        io.load(damaged(change, tmp_path / "m.onnx"))


def test_whatever_onnx_raises_for_shapes_is_our_error() -> None:
    model = parse(TEXT)
    model.graph.inputs[0].shape = ir.Shape([2**62, 2**62])
    model.graph.node(0).attributes.add(ir.AttrInt64s("axes", [2**40]))
    with pytest.raises(GraphError, match="the graph's types or shapes do not fit: "):
        io.infer_shapes(model)


def test_operands_of_two_types_do_not_fit() -> None:
    model = parse("g (float[2] x, float[2] z) => (float[2] y) { y = Add (x, z) }")
    model.graph.inputs[1].type = ir.TensorType(ir.DataType.INT64)
    with pytest.raises(GraphError, match=r"^the graph's types or shapes do not fit: "):
        io.infer_shapes(model)
