"""``msn-export embed``: what is wrong with its input is one line, and nothing is left."""

import sys
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from msn_export.cli import main
from tests.builders.embeds import BROKEN, COUNT, embed
from tests.builders.tiny_artifacts import classifier, foreign, pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("embed"), "--batch", "1:4:8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), COUNT, BROKEN)


def _empty(tmp: Path, model: Path) -> tuple[object, ...]:
    (tmp / "empty").mkdir()
    return model, tmp / "empty", tmp / "o.npy"


def _all_broken(tmp: Path, model: Path) -> tuple[object, ...]:
    return model, pictures(tmp / "p", 3, broken=(0, 1, 2)), tmp / "o.npy"


def _several(tmp: Path, model: Path) -> tuple[object, ...]:
    graph = foreign(tmp / "m.onnx", ["b", 3, 32, 32], {"left": 3, "right": 3})
    return graph, pictures(tmp / "p", 1), tmp / "o.npy"


def _open_size(tmp: Path, model: Path) -> tuple[object, ...]:
    graph = foreign(tmp / "m.onnx", ["b", 3, "h", "w"], {"features": 3})
    return graph, pictures(tmp / "p", 1), tmp / "o.npy"


def _wrong_size(tmp: Path, model: Path) -> tuple[object, ...]:
    return model, pictures(tmp / "p", 1), tmp / "o.npy", "--image-size", "48"


def _planes_to_parquet(tmp: Path, model: Path) -> tuple[object, ...]:
    planes = helper.make_node("Identity", ["pixels"], ["planes"])
    shape = ["b", 3, 32, 32]
    tensors = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in planes.input]
    given = [helper.make_tensor_value_info("planes", TensorProto.FLOAT, shape)]
    graph = helper.make_graph([planes], "g", tensors, given)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(made, tmp / "m.onnx")
    return tmp / "m.onnx", pictures(tmp / "p", 1), tmp / "o.parquet"


def _exists(tmp: Path, model: Path) -> tuple[object, ...]:
    (tmp / "o.npy.json").write_text("{}")
    return model, pictures(tmp / "p", 1), tmp / "o.npy"


def _no_folder(tmp: Path, model: Path) -> tuple[object, ...]:
    return model, pictures(tmp / "p", 1), tmp / "none" / "o.npy"


def _not_its_manifest(tmp: Path, model: Path) -> tuple[object, ...]:
    other = tmp / "m.onnx"
    other.write_bytes(model.read_bytes() + b"\n")
    (tmp / "m.onnx.json").write_bytes(model.with_name("tiny.onnx.json").read_bytes())
    return other, pictures(tmp / "p", 1), tmp / "o.npy"


def _no_such_output(tmp: Path, model: Path) -> tuple[object, ...]:
    return model, pictures(tmp / "p", 1), tmp / "o.npy", "--output-name", "tail"


def _argmax(tmp: Path, model: Path) -> tuple[object, ...]:
    graph = foreign(tmp / "m.onnx", ["b", 3, 32, 32], {"scores": 3})
    made = onnx.load(graph)
    made.graph.node.append(helper.make_node("ArgMax", ["scores"], ["best"], axis=1, keepdims=0))
    del made.graph.output[:]
    made.graph.output.append(helper.make_tensor_value_info("best", TensorProto.INT64, ["b"]))
    onnx.save(made, graph)
    return graph, pictures(tmp / "p", 1), tmp / "o.npy"


BAD = {
    "empty folder": (_empty, "holds no picture"),
    "all broken": (_all_broken, "none of the 3 pictures of"),
    "several outputs": (_several, "has the outputs left, right; choose one with --output-name"),
    "argmax": (
        _argmax,
        "m.onnx: output 'best' is int64['b']; expected floats of two axes or more, a row for each",
    ),
    "open size": (_open_size, "leaves height and width open, --image-size says them"),
    "wrong size": (_wrong_size, "images of 48x48 do not fit"),
    "planes to parquet": (_planes_to_parquet, "a .parquet row holds one vector; write .npy"),
    "sidecar exists": (_exists, "o.npy.json exists; --force replaces it"),
    "no folder": (_no_folder, "does not exist; create it"),
    "not its manifest": (_not_its_manifest, "is not the file its manifest describes"),
    "no such output": (_no_such_output, "has no such output; it has embedding, logits"),
}


@pytest.mark.parametrize(("prepare", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_message(prepare, message, model, tmp_path) -> None:
    result = embed(*prepare(tmp_path, model))
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith("o.")}
    assert left <= {"o.npy.json"}  # which was there before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "out.csv"], "'--output': out.csv does not end in .npy, .parquet or .usearch"),
        ([], "Missing option '-o' / '--output'"),
        (["-o", "out.npy", "--batch", "0"], "Invalid value for '--batch'"),
        (["-o", "out.npy", "--workers", "0"], "Invalid value for '--workers'"),
        (["-o", "out.npy", "--ray", "local", "--actors", "0"], "Invalid value for '--actors'"),
        (
            ["-o", "s3://bucket/out.parquet"],
            "'--output': the output is a file here; write one and copy it to the bucket",
        ),
    ],
)
def test_usage_errors_name_the_option(options, message, model, folder) -> None:
    result = CliRunner().invoke(main, ["embed", str(model), str(folder), *options])
    assert result.exit_code == 2
    assert message in result.output


def test_what_a_cluster_alone_can_do_says_so(model, folder, tmp_path) -> None:
    output = tmp_path / "out.parquet"
    result = embed(model, "s3://bucket/pictures", output)
    assert result.exit_code == 1
    assert result.stderr == (
        "error: s3://bucket/pictures is read on a Ray cluster alone; add --ray local, or copy it "
        "to a folder\n"
    )
    result = embed(model, folder, output, "--actors", "2")
    assert result.exit_code == 1
    assert "error: --actors is of a Ray cluster; add --ray, or leave it out" in result.stderr
    result = embed(model, folder, output, "--ray", "ray://head:10001")
    assert result.exit_code == 1
    assert "error: --ray ray://head:10001: Ray Data runs inside the cluster;" in result.stderr


def test_an_engine_takes_no_threads(folder, tmp_path) -> None:
    engine = tmp_path / "m.engine"
    engine.touch()
    result = embed(engine, folder, tmp_path / "out.npy", "--threads", "2")
    assert result.exit_code == 1
    told = f"error: --threads is for graphs on a CPU, and {engine} is an engine"
    assert result.stderr.splitlines()[-1] == told


def test_without_ray_the_line_that_installs_it(model, folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = embed(model, folder, tmp_path / "out.npy", "--ray")
    assert result.exit_code == 1
    assert "error: --ray needs Ray Data (" in result.stderr
    assert "pip install 'msn-export[ray]'" in result.stderr
    assert not list(tmp_path.iterdir())


def test_parquet_without_its_package_is_refused_before_any_work(
    model, folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    result = embed(model, folder, tmp_path / "out.parquet")
    assert result.exit_code == 1
    assert "a .parquet output needs pyarrow" in result.stderr
    assert "pip install 'msn-export[parquet]'" in result.stderr
