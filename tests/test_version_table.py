"""The version table has a cell for everything that can be written, each with its evidence."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from msn_export.manifest import Manifest
from msn_export.runtime.versions import VERSIONS
from msn_export.spec import Dtype, Target
from msn_export.version_table import (
    Cell,
    Client,
    in_words,
    least_versions,
    numbers,
    row_by_opset,
    row_of,
    table,
)
from tests.builders.manifests import example

RUN = set(Client) - {Client.TENSORRT}  # what a machine without a GPU can try


def cells() -> Iterator[tuple[Target, Dtype, Client]]:
    for target in Target:
        for dtype in Dtype:
            if target is not Target.PORTABLE or dtype not in {Dtype.BF16, Dtype.FP8}:
                for client in Client:
                    yield target, dtype, client


def test_the_table_has_exactly_these_cells() -> None:
    found = {(t, d, c) for t, rows in table().items() for d, row in rows.items() for c in row}
    assert found == set(cells())


@pytest.mark.parametrize(("target", "dtype", "client"), tuple(cells()))
def test_a_cell_says_where_it_is_from(target, dtype, client) -> None:
    cell = table()[target][dtype][client]
    if client not in RUN:
        assert cell.evidence == "read"
        assert cell.source
        assert (cell.before, cell.newest) == (None, None)
    elif cell.least is None:  # nothing runs it: the newest was tried
        assert (cell.evidence, cell.before) == ("run", None)
        assert cell.newest
        assert cell.fails
    elif cell.evidence == "least tried":
        assert (cell.before, cell.fails) == (None, "")
        assert cell.newest
    else:
        assert cell.evidence == "run"
        assert cell.before
        assert cell.newest
        assert cell.fails
        assert numbers(cell.before) < numbers(cell.least) <= numbers(cell.newest)
    assert "\n" not in cell.fails
    assert "/" not in cell.fails.replace("://", "")  # no path of the machine it was run on


def test_a_version_is_taken_from_the_least_on() -> None:
    cell = Cell("1.24.1", "run", "1.23.2", "no kernel", "1.32.0")
    assert [cell.takes(version) for version in ("1.23.2", "1.24", "1.24.1", "1.24.1.post2")] == [
        False, False, True, True,
    ]  # fmt: skip
    assert (str(cell), str(Cell(None, "run"))) == ("≥ 1.24.1", "none")
    assert not Cell(None, "run", newest="1.32.0").takes("99.0")


def test_a_version_is_read_as_numbers() -> None:
    assert numbers("10.13.3.9.post1") == (10, 13, 3, 9)
    assert numbers("1.24.0+cuda12") == (1, 24, 0)
    assert numbers(None) == numbers("latest") == ()


# design: measured before there was a table; a table that says otherwise has to be looked at
@pytest.mark.parametrize(
    ("target", "dtype", "takes", "refuses"),
    [
        (Target.PORTABLE, Dtype.FP32, "1.14.1", "1.11.1"),
        (Target.PORTABLE, Dtype.INT8, "1.17.0", "1.9.0"),
        (Target.TENSORRT, Dtype.FP32, "1.23.0", "1.22.1"),
        (Target.ONNXRUNTIME, Dtype.FP16, "1.23.0", "1.22.1"),
        (Target.ONNXRUNTIME, Dtype.INT8, "1.24.1", "1.23.2"),
        (Target.TENSORRT, Dtype.INT8, "1.24.1", "1.23.2"),
    ],
)
def test_onnxruntime_takes_what_was_measured(target, dtype, takes, refuses) -> None:
    cell = table()[target][dtype][Client.ONNXRUNTIME]
    assert cell.takes(takes)
    assert not cell.takes(refuses)


def test_no_onnxruntime_runs_bf16_on_a_cpu() -> None:
    cell = table()[Target.TENSORRT][Dtype.BF16][Client.ONNXRUNTIME]
    assert cell.least is None
    assert "Conv(22)" in cell.fails


def test_tensorrt_is_as_the_compiler_takes_it() -> None:
    """The compiler writes Attention from the same version on that the table names."""
    since = min(v.since for v in VERSIONS if v.module == "tensorrt" and v.has_attention)
    cell = table()[Target.TENSORRT][Dtype.FP16][Client.TENSORRT]
    assert numbers(cell.least)[:2] == since
    reads_17 = min(v.since for v in VERSIONS if v.module == "tensorrt" and v.opset >= 17)
    assert numbers(table()[Target.PORTABLE][Dtype.FP32][Client.TENSORRT].least)[:2] == reads_17


def test_what_no_parser_of_tensorrt_takes_has_attention_in_fp32() -> None:
    """The reason that ``inspect`` and ``doctor`` give is that of every such cell."""
    for target, dtype, client in cells():
        cell = table()[target][dtype][client]
        if client.is_compiler and cell.least is None:
            assert "fp32 has no fused kernel" in cell.note or "dedicated kernel" in cell.fails


def test_eight_bits_beside_bf16_take_what_bf16_does() -> None:
    row = row_of(Target.TENSORRT, Dtype.INT8, Dtype.BF16)
    assert row is not None
    assert row[Client.ONNXRUNTIME].least is None
    rows = table()[Target.TENSORRT]
    openvino = [rows[dtype][Client.OPENVINO].least for dtype in (Dtype.INT8, Dtype.BF16)]
    assert row[Client.OPENVINO].least == max(openvino, key=numbers)
    assert row_of(Target.TENSORRT, Dtype.INT8, Dtype.FP16) == rows[Dtype.INT8]


def test_what_is_not_in_the_table_has_no_row() -> None:
    assert row_of(Target.PORTABLE, Dtype.FP8) is None
    assert row_of(None, Dtype.FP32) is None
    assert row_by_opset(23, Dtype.INT8) == table()[Target.TENSORRT][Dtype.INT8]
    assert row_by_opset(17, Dtype.FP32) is None  # of other tools: its operators are not known
    assert row_by_opset(21, Dtype.FP32) is None


def test_a_row_in_words_ends_with_what_does_not_take_it() -> None:
    row = {
        Client.ONNXRUNTIME: Cell("1.23.0", "run"), Client.OPENVINO: Cell("2025.4.0", "run"),
        Client.TENSORRT: Cell(None, "read"), Client.TENSORRT_RTX: Cell(None, "run"),
    }  # fmt: skip
    words = (
        "onnxruntime ≥ 1.23.0, OpenVINO ≥ 2025.4.0; not as it is in a plain parser of TensorRT, "
        "TensorRT-RTX (no kernel for attention in fp32): msn-export trt builds it"
    )
    assert in_words(row) == words
    bf16 = {Client.OPENVINO: Cell("2026.1.0", "run"), Client.NODE: Cell(None, "run")}
    assert in_words(bf16) == "OpenVINO ≥ 2026.1.0; not in onnxruntime-node"
    assert least_versions(row) == {
        "onnxruntime": "1.23.0", "openvino": "2025.4.0", "tensorrt": None, "tensorrt-rtx": None,
    }  # fmt: skip


def test_a_manifest_knows_its_row() -> None:
    graph: Manifest = example(kind="onnx", engine=None, target="tensorrt-8", dtype=Dtype.FP32)
    assert graph.row == table()[Target.PORTABLE][Dtype.FP32]
    assert example().row is None  # an engine's
    base = SimpleNamespace(base="bf16")
    eight = example(
        kind="onnx", engine=None, target="tensorrt", dtype=Dtype.INT8, quantization=base
    )
    assert eight.row == row_of(Target.TENSORRT, Dtype.INT8, Dtype.BF16)
