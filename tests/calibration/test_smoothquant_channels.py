"""The columns behind attention's channels are found in every packing; where unsure, none are."""

import numpy as np
import pytest

from msn_export.calibration.qdq import Role, find_cores, find_projections
from msn_export.calibration.smoothquant import columns_behind, keeps_channels
from msn_export.graph.attention import AttentionCore
from tests.builders.calibrated_graphs import PACKINGS, block, vit
from tests.builders.graphs import parse


def behind(model):
    (core,) = find_cores(model)
    out = next(p for p in find_projections(model) if p.role is Role.OUT)
    return columns_behind(core, next(node for node in model.graph if node.name == out.node))


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_columns_of_the_values_in_the_order_they_are_read(packing) -> None:
    found = behind(block(packing))
    assert found is not None
    source, columns = found
    assert source.name == "packed"
    axes = PACKINGS[packing]["packing"]  # where the 3 stands among h = 2 and d = 2
    numbers = np.arange(12).reshape(axes)
    assert columns.tolist() == np.take(numbers, 2, axis=axes.index(3)).ravel().tolist()


def test_one_query_in_the_last_block_changes_nothing(tmp_path) -> None:
    model = vit(tmp_path, cls_only=True, depth=1)
    (core,) = find_cores(model)
    # its result is expanded to all tokens, which is no move: the chain ends there
    proj = next(node for node in model.graph if node.name == "blocks.0.attn.proj.MatMul")
    assert isinstance(core, AttentionCore)
    assert columns_behind(core, proj) is None


@pytest.mark.parametrize("seen", ["v", "packed", "heads", "o"])
def test_a_value_that_another_sees_too_is_not_touched(seen) -> None:
    model = block("thirds")
    value = next(v for node in model.graph for v in node.outputs if v.name == seen)
    model.graph.outputs.append(value)
    assert behind(model) is None


def test_heads_that_were_read_twice_are_not_touched() -> None:
    model = block("thirds")
    heads = next(v for node in model.graph for v in node.outputs if v.name == "heads")
    out = next(node for node in model.graph if node.outputs[0].name == "out")
    model.graph.insert_before(out, type(out)("", "Relu", [heads], name="other"))
    assert behind(model) is None


PICKS = {
    "token": ("int64 i = {0}", "Gather <axis = 1> (x, i)", "b,4", True),
    "channel": ("int64 i = {0}", "Gather <axis = -1> (x, i)", "b,5", False),
    "tokens": ("int64[1] s = {0}, int64[1] e = {1}, int64[1] a = {1}", "Slice (x, s, e, a)",
               "b,1,4", True),
    "channels, turned round": (
        "int64[1] s = {-1}, int64[1] e = {-9}, int64[1] a = {2}, int64[1] t = {-1}",
        "Slice (x, s, e, a, t)", "b,5,4", False),
    "no pick": ("int64 i = {0}", "Relu (x)", "b,5,4", False),
}  # fmt: skip


@pytest.mark.parametrize(("constants", "op", "shape", "kept"), PICKS.values(), ids=PICKS.keys())
def test_picking_rows_keeps_channels_and_picking_channels_does_not(
    constants, op, shape, kept
) -> None:
    model = parse(f"g (float[b,5,4] x) => (float[{shape}] y) <{constants}> {{ y = {op} }}")
    assert keeps_channels(model.graph[0]) is kept
