"""Loops are taken where the file itself bounds their trip count, wherever in it they are."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from msn_export.errors import GraphError
from msn_export.graph import io
from msn_export.onnx_loops import LONGEST, require_bounded_loops
from msn_export.runtime import open_runner

IMAGE = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 4, 4])
MOST = LONGEST - 1


def number(name: str, value: int, *, raw: bool = True) -> TensorProto:
    if raw:
        return numpy_helper.from_array(np.array(value, np.int64), name)
    return helper.make_tensor(name, TensorProto.INT64, [], [value])


def body(nodes: Sequence[onnx.NodeProto] = (), constants: Sequence[TensorProto] = ()):
    """A loop's body: its image goes through, plus what ``nodes`` do besides."""
    return helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Identity", ["i"], ["o"]),
         *nodes],
        "body",
        [helper.make_tensor_value_info("n", TensorProto.INT64, []),
         helper.make_tensor_value_info("c", TensorProto.BOOL, []),
         helper.make_tensor_value_info("i", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, []),
         helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
        constants,
    )  # fmt: skip


def loop(trips: str, inside: onnx.GraphProto | None = None, image: str = "x") -> onnx.NodeProto:
    return helper.make_node("Loop", [trips, "", image], ["y"], body=inside or body(), name="L")


def graph(nodes, constants=(), **options) -> onnx.ModelProto:
    made = helper.make_graph(
        list(nodes),
        "g",
        [IMAGE],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 3, 4, 4])],
        list(constants),
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], **options)


def constant(output: str, **value) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [output], **value)


def scan(axis: int, over: str, constants: Sequence[TensorProto] = ()) -> onnx.ModelProto:
    inside = helper.make_graph(
        [helper.make_node("Identity", ["s"], ["t"])],
        "each",
        [helper.make_tensor_value_info("s", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
    )
    options = {"scan_input_axes": [axis], "scan_output_axes": [axis]} if axis else {}
    node = helper.make_node("Scan", [over], ["y"], body=inside, num_scan_inputs=1, **options)
    return graph([node], constants)


def in_if(node: onnx.NodeProto) -> onnx.ModelProto:
    branch = helper.make_graph(
        [node], "then", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    condition = constant("yes", value=numpy_helper.from_array(np.array(True)))
    both = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    return graph([condition, both], [number("m", 2), number("large", LONGEST)])


def in_function(trips: onnx.NodeProto) -> onnx.ModelProto:
    opset = [helper.make_opsetid("", 17)]
    function = helper.make_function("own", "F", ["x"], ["y"], [trips, loop("m")], opset)
    call = helper.make_node("F", ["x"], ["y"], domain="own")
    made = graph([call], functions=[function])
    made.opset_import.append(helper.make_opsetid("own", 1))
    return made


def nested(outer: int, inner: int) -> onnx.ModelProto:
    within = loop("inner", image="i")
    within.output[0] = "unused"
    return graph([loop("outer", body([within]))], [number("outer", outer), number("inner", inner)])


BOUNDED = {
    "initializer": graph([loop("m")], [number("m", MOST)]),
    "int64_data": graph([loop("m")], [number("m", MOST, raw=False)]),
    "Constant": graph([constant("m", value=number("", 3)), loop("m")]),
    "value_int": graph([constant("m", value_int=3), loop("m")]),
    "value_ints": graph([constant("m", value_ints=[3]), loop("m")]),
    "negative": graph([loop("m")], [number("m", -1)]),
    "If": in_if(loop("m")),
    "function": in_function(constant("m", value_int=3)),
    "nested": nested(99, 100),
    "Scan": scan(1, "x"),
    "other domain": graph([helper.make_node("Loop", ["x"], ["y"], domain="com.example")]),
}


@pytest.mark.parametrize("model", BOUNDED.values(), ids=BOUNDED.keys())
def test_a_loop_with_a_small_constant_is_taken(tmp_path, model) -> None:
    onnx.save(model, tmp_path / "m.onnx")
    require_bounded_loops(tmp_path / "m.onnx")


SUM = helper.make_node("ReduceSum", ["x"], ["m"], keepdims=0)
UNBOUNDED = {
    "too many": (graph([loop("m")], [number("m", LONGEST)]), "Loop 'L' has 10,000 trips"),
    "int64_data": (graph([loop("m")], [number("m", 2**40, raw=False)]), "1,099,511,627,776 trips"),
    "none": (graph([loop("")]), "Loop 'L' has no constant trip count"),
    "computed": (graph([SUM, loop("m")]), "Loop 'L' has no constant trip count"),
    "If": (in_if(loop("large")), "Loop 'L' has 10,000 trips"),
    "function": (in_function(SUM), "Loop 'L' has no constant trip count"),
    "nested": (nested(100, 100), "Loop 'L' has 10,000 trips"),
    "twice": (
        graph([loop("m")], [number("m", 1), number("m", 2**40)]), "no constant trip count",
    ),
    "Scan, open": (scan(0, "x"), "Scan '' has no constant trip count"),
    "Scan, long": (
        scan(0, "w", [numpy_helper.from_array(np.zeros(LONGEST, np.float32), "w")]),
        "Scan '' has 10,000 trips",
    ),
    "SequenceMap": (
        graph([helper.make_node("SequenceMap", ["x"], ["y"], body=body(), name="S")]),
        "SequenceMap 'S' has no constant trip count",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "message"), UNBOUNDED.values(), ids=UNBOUNDED.keys())
def test_a_loop_that_may_run_for_ever_is_refused_by_all_that_runs_graphs(
    tmp_path, model, message
) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    in_openvino = partial(open_runner, providers=["openvino"])
    for read in (require_bounded_loops, io.load, open_runner, in_openvino):
        with pytest.raises(GraphError) as caught:
            read(path)
        assert message in str(caught.value)
        assert str(caught.value).endswith(
            "expected a constant below 10,000: export the model without this loop, or unroll it"
        )


def test_two_graphs_and_graphs_nested_for_ever_are_no_onnx_file(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    first, second = graph([loop("m")], [number("m", 1)]), graph([], [number("n", 1)])
    path.write_bytes(first.SerializeToString() + second.SerializeToString())
    with pytest.raises(GraphError, match=r"is not an ONNX file \(two graphs in it\)"):
        require_bounded_loops(path)
    within = loop("m")
    for _ in range(24):
        within = loop("m", body([within]))
    onnx.save(graph([within], [number("m", 1)]), path)
    require_bounded_loops(path)
    content = graph([loop("m")], [number("m", 1)]).SerializeToString()
    for cut in range(0, len(content), 7):
        path.write_bytes(content[:cut])
        with pytest.raises(GraphError, match="export it again"):
            io.load(path)
