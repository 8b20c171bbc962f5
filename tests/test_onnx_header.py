"""What an ONNX file says of itself is read without onnx, bounded, and as strictly as a manifest."""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from msn_export import onnx_header
from msn_export.errors import GraphError, ManifestError, MsnExportError
from msn_export.onnx_header import GraphMetadata, read_onnx_header
from msn_export.preprocessing import preset
from msn_export.spec import Dtype, ImageSize, Scores, Target
from msn_export.version_table import Client

WHOLE = GraphMetadata(
    preset("msn-eval", ImageSize(32, 48)), ("cat", "dög", ""), Scores.SIGMOID, Target.PORTABLE,
    Dtype.INT8,
)  # fmt: skip


def model(**props: str) -> onnx.ModelProto:
    """Make a graph of one node, with weights, and metadata."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 4]) for n in "xy")
    w = helper.make_tensor("w", TensorProto.FLOAT, [4, 4], [0.5] * 16)
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [w])
    opsets = [helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("", 17)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="p")
    helper.set_model_props(made, props)
    return made


def written(path: Path, **props: str) -> Path:
    path.write_bytes(model(**props).SerializeToString())
    return path


def test_opset_and_metadata_are_those_that_onnx_reads(tmp_path) -> None:
    header = read_onnx_header(written(tmp_path / "m.onnx", a="1", b="dög"))
    assert (header.opset, header.metadata) == (17, {"a": "1", "b": "dög"})


def test_metadata_behind_the_graph_is_read_too(tmp_path) -> None:
    """As in a file that onnx.helper wrote, and one that had more fields appended."""
    path = tmp_path / "m.onnx"
    entry = onnx.ModelProto(metadata_props=[onnx.StringStringEntryProto(key="c", value="2")])
    path.write_bytes(model(a="1").SerializeToString() + entry.SerializeToString())
    assert read_onnx_header(path).metadata == {"a": "1", "c": "2"}


def test_what_was_written_is_read(tmp_path) -> None:
    assert GraphMetadata.of(written(tmp_path / "m.onnx", **WHOLE.props())) == WHOLE


def test_a_graph_of_another_tool_says_nothing(tmp_path) -> None:
    props = {"labels": "cat", "preprocessing": "mean 0.5", "product": "another tool 1"}
    assert GraphMetadata.of(written(tmp_path / "m.onnx", **props)) is None


def test_a_file_of_before_has_preprocessing_alone(tmp_path) -> None:
    props = {name: WHOLE.props()[name] for name in ("product", "preprocessing")}
    found = GraphMetadata.of(written(tmp_path / "m.onnx", **props))
    assert found == GraphMetadata(WHOLE.preprocessing)
    assert found.row is None


def test_the_row_of_the_version_table_is_that_of_target_and_dtype() -> None:
    assert WHOLE.row is not None
    assert WHOLE.row[Client.ONNXRUNTIME].takes("1.17.3")
    assert replace(WHOLE, dtype=Dtype.FP8).row is None


def test_labels_that_are_too_many_are_left_to_the_manifest() -> None:
    many = tuple(f"class {i:06}" for i in range(80_000))
    assert len(json.dumps(many)) > onnx_header.LARGEST_LABELS
    assert replace(WHOLE, labels=many).labels == ()
    few = tuple(f"class {i:06}" for i in range(21_841))  # as ImageNet-21k has
    assert replace(WHOLE, labels=few).labels == few


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", "cat", "m.onnx, its metadata: it is not JSON"),
        ("labels", '{"0": "cat"}', "m.onnx, its metadata.labels is {'0': 'cat'}; expected list"),
        ("labels", '["cat", 5]', "m.onnx, its metadata.labels[1] is 5; expected str"),
        ("labels", "[" * 100_000, "m.onnx, its metadata: it is not JSON"),
        ("scores", "best", "m.onnx, its metadata.scores is 'best'"),
        ("target", "../..", "m.onnx, its metadata.target is '../..'"),
        ("dtype", "int4", "m.onnx, its metadata.dtype is 'int4'"),
        ("preprocessing", '{"name": "hf"}', "m.onnx, its metadata.preprocessing.size is missing"),
        ("preprocessing", "NaN", "m.onnx, its metadata.preprocessing is nan"),
    ],
)
def test_what_no_version_wrote_is_refused(name, value, message, tmp_path) -> None:
    path = written(tmp_path / "m.onnx", **{**WHOLE.props(), name: value})
    with pytest.raises(ManifestError) as raised:
        GraphMetadata.of(path)
    assert str(raised.value).startswith(message)
    assert len(str(raised.value)) < 400


def test_preprocessing_out_of_bounds_is_refused(tmp_path) -> None:
    plain = json.loads(WHOLE.props()["preprocessing"])
    for change in ({"std": [0, 1, 1]}, {"size": {"height": 10**9, "width": 1}}, {"extra": 1}):
        props = {**WHOLE.props(), "preprocessing": json.dumps({**plain, **change})}
        with pytest.raises(ManifestError, match=r"m\.onnx, its metadata"):
            GraphMetadata.of(written(tmp_path / "m.onnx", **props))


def test_preprocessing_that_does_not_fit_the_graph_is_refused() -> None:
    WHOLE.require_fit(ImageSize(32, 48), 3, "m.onnx")
    message = "^m.onnx takes images of 48x32 with 3 channels, and its own metadata makes them of 32"
    with pytest.raises(ManifestError, match=message):
        WHOLE.require_fit(ImageSize(48, 32), 3, "m.onnx")
    with pytest.raises(ManifestError, match="with 1 channels"):
        WHOLE.require_fit(ImageSize(32, 48), 1, "m.onnx")


def test_metadata_larger_than_any_of_ours_is_refused_unread(tmp_path) -> None:
    path = written(tmp_path / "m.onnx", labels="x" * (onnx_header.LARGEST + 1))
    with pytest.raises(GraphError, match="its metadata is larger than 4194304 bytes"):
        read_onnx_header(path)
    path = written(tmp_path / "n.onnx", **{f"k{i}": "" for i in range(2000)})
    with pytest.raises(GraphError, match="its metadata is larger"):
        read_onnx_header(path)


def test_a_file_that_claims_more_than_it_has_is_no_onnx_file(tmp_path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x3a\xff\xff\xff\xff\x7f")  # a graph of 32 GiB
    with pytest.raises(GraphError, match=r"m.onnx is not an ONNX file \(a field of .* are left\)"):
        read_onnx_header(path)
    path.write_bytes(b"\x72" + b"\xff" * 11)
    with pytest.raises(GraphError, match="a number of more than 64 bits"):
        read_onnx_header(path)
    path.write_bytes(b"")
    with pytest.raises(GraphError, match=r"m.onnx is not an ONNX file \(no graph in it\)"):
        read_onnx_header(path)
    with pytest.raises(GraphError, match="does not exist; give an"):
        read_onnx_header(tmp_path / "absent.onnx")


@given(st.integers(0, 400), st.integers(0, 255), st.integers(1, 400))
def test_damage_gives_an_error_of_ours_or_another_header(at, byte, length) -> None:
    content = bytearray(model(**WHOLE.props()).SerializeToString())
    content[at % len(content)] = byte
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(content[: max(1, len(content) - length + 1)])
        file.flush()
        try:
            GraphMetadata.of(Path(file.name))
        except MsnExportError as error:
            assert str(error).count("\n") == 0


def test_a_header_needs_no_package(tmp_path) -> None:
    path = written(tmp_path / "m.onnx", **WHOLE.props())
    code = (
        "import sys; before = set(sys.modules); from pathlib import Path; "
        "from msn_export.onnx_header import GraphMetadata; "
        f"print(GraphMetadata.of(Path({str(path)!r})).labels); "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}"
        " - sys.stdlib_module_names))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["('cat', 'dög', '')", "msn_export"]
