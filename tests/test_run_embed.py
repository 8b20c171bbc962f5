"""``msn-export embed``: a folder through a model, whole or in two halves, to the same bytes."""

import base64
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper
from pyarrow import parquet
from tiny_artifacts import classifier, foreign, pictures

from msn_export import golden, images, manifest
from msn_export.cli import main
from msn_export.embed.local import Local

BROKEN = (5, 18)
COUNT = 45


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier(tmp_path_factory.mktemp("embed"), "--batch", "1:4:8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures"), COUNT, BROKEN)


def embed(model: object, folder: object, output: Path, *options: str):
    arguments = ["embed", str(model), str(folder), "-o", str(output), *options]
    return CliRunner().invoke(main, arguments)


def names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in images.find(folder)]


def lines_of(output: Path) -> list[dict[str, object]]:
    """Read the sidecar that has a line a row."""
    text = output.with_name(output.name + ".rows.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def is_broken(name: str) -> bool:
    return int(Path(name).stem) in BROKEN


@pytest.fixture(scope="module")
def wanted(model, folder):
    """What the model gives for each good picture, run alone: embedding, logits."""
    known = manifest.read(model)
    assert known is not None
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = {}
    for name in names(folder):
        if not is_broken(name):
            feed = images.preprocess([folder / name], known.preprocessing)
            embedding, logits = session.run(["embedding", "logits"], {"pixel_values": feed})
            found[name] = embedding[0], logits[0]
    return found


def test_npy_holds_a_row_for_each_path_in_order(model, folder, wanted, tmp_path) -> None:
    output = tmp_path / "out.npy"
    result = embed(model, folder, output, "--json")
    assert result.exit_code == 0, result.output
    vectors = np.load(output)
    lines = lines_of(tmp_path / "out.npy")
    assert vectors.dtype == np.float32
    assert vectors.shape == (COUNT, 64)
    assert [line["path"] for line in lines] == names(folder)
    assert [line["row"] for line in lines] == list(range(COUNT))
    for line, vector in zip(lines, vectors, strict=True):
        if is_broken(line["path"]):
            assert f"{folder / line['path']} is not a readable picture" in line["error"]
            assert np.isnan(vector).all()
            assert "label" not in line
            continue
        embedding, logits = wanted[line["path"]]
        assert line["error"] is None
        np.testing.assert_allclose(vector, embedding, atol=1e-5)  # batches of 4 round differently
        assert line["label"] == f"class {logits.argmax()}"
        softmax = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert line["probability"] == pytest.approx(softmax.max(), abs=1e-5)
    told = json.loads(result.stdout)
    assert (told["images"], told["broken"], told["shape"]) == (COUNT, 2, [COUNT, 64])
    assert told["output_name"] == "embedding"
    about = json.loads((tmp_path / "out.npy.json").read_text())
    assert about["model"] == manifest.read(model).sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["out.npy", "out.npy.json", "out.npy.rows.jsonl"]
    )


def test_parquet_holds_the_same(model, folder, tmp_path) -> None:
    for name in ("out.npy", "out.parquet"):
        assert embed(model, folder, tmp_path / name).exit_code == 0
    table = parquet.read_table(tmp_path / "out.parquet")
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds == {
        "path": "string",
        "embedding": "fixed_size_list<element: float>[64]",
        "error": "string",
        "label": "string",
        "probability": "float",
    }
    vectors = np.load(tmp_path / "out.npy")
    lines = lines_of(tmp_path / "out.npy")
    for row, line, vector in zip(table.to_pylist(), lines, vectors, strict=True):
        assert row["path"] == line["path"]
        assert row["error"] == line["error"]
        assert row["label"] == line.get("label")
        if row["error"] is None:
            np.testing.assert_array_equal(np.asarray(row["embedding"], np.float32), vector)
            assert np.float32(row["probability"]) == np.float32(line["probability"])
        else:
            assert row["embedding"] is None
    about = json.loads(table.schema.metadata[b"msn-export"])
    assert about["broken"] == 2
    assert about["preprocessing"]["name"] == "hf"


SCRIPT = """
import sys
from msn_export.embed import parts
parts.SECONDS = 0.0  # each batch a part: a tiny run would be over before its first
from msn_export.cli import main
if __name__ == "__main__":
    main(sys.argv[1:])
"""


def start(script: Path, *arguments: object) -> subprocess.Popen[str]:
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def children(process: int) -> set[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return {int(child) for child in found}


def wait_for(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.002)


def running(process: int) -> bool:
    """Say whether a process runs; one that ended and waits to be collected does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.parametrize(("kind", "number"), [("npy", signal.SIGKILL), ("parquet", signal.SIGINT)])
def test_ended_in_the_middle_and_resumed_it_writes_the_same_bytes(
    model, folder, tmp_path, kind, number
) -> None:
    whole, output = tmp_path / f"whole.{kind}", tmp_path / f"halves.{kind}"
    assert embed(model, folder, whole, "--batch", "2").exit_code == 0
    parts = tmp_path / f"halves.{kind}.parts"
    script = tmp_path / "slow_parts.py"
    arguments = ("embed", model, folder, "-o", output, "--batch", "2")
    with start(script, *arguments) as run:
        journal = parts / "parts.jsonl"
        wait_for(lambda: journal.exists() and len(journal.read_text().splitlines()) > 4)
        workers = children(run.pid)
        run.send_signal(number)
        stderr = run.communicate(timeout=60)[1]
    assert workers
    wait_for(lambda: not any(running(worker) for worker in workers))
    assert not output.exists()
    if number == signal.SIGINT:
        assert run.returncode == 130
        assert f"of {COUNT} rows are kept in {parts}" in stderr
        assert "the same command with --resume goes on from there" in stderr
        assert "Traceback" not in stderr
    else:
        assert run.returncode == -signal.SIGKILL
    refused = embed(model, folder, output, "--batch", "2")
    assert refused.exit_code == 1
    assert "--resume goes on from there, --force starts over" in refused.stderr
    resumed = embed(model, folder, output, "--batch", "2", "--resume", "--json")
    assert resumed.exit_code == 0, resumed.output
    assert 0 < json.loads(resumed.stdout)["resumed_at"] < COUNT
    assert output.read_bytes() == whole.read_bytes()
    for ending in (".rows.jsonl", ".json") if kind == "npy" else ():
        sidecars = [path.with_name(path.name + ending).read_bytes() for path in (whole, output)]
        assert sidecars[0] == sidecars[1]
    assert not parts.exists()


def test_a_full_disk_is_one_line_and_what_was_done_is_resumed(model, folder, tmp_path) -> None:
    output, script = tmp_path / "out.npy", tmp_path / "s.py"
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
    command = [sys.executable, str(script), "embed", str(model), str(folder), "-o", str(output)]
    script.write_text(limited + SCRIPT)
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert f"error: no room left in {tmp_path} (File too large)" in run.stderr
    assert "Traceback" not in run.stderr
    assert not output.exists()
    result = embed(model, folder, output, "--resume", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["resumed_at"] > 0
    assert embed(model, folder, tmp_path / "whole.npy").exit_code == 0
    assert output.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_resume_refuses_parts_of_another_run(model, folder, tmp_path) -> None:
    output = tmp_path / "out.npy"
    with start(tmp_path / "s.py", "embed", model, folder, "-o", output, "--batch", "2") as run:
        journal = tmp_path / "out.npy.parts" / "parts.jsonl"
        wait_for(lambda: journal.exists() and len(journal.read_text().splitlines()) > 2)
        run.kill()
        run.communicate(timeout=60)
    more = pictures(tmp_path / "more", 3)
    for options, told in (
        (("--batch", "3"), "begun with another batch (2, now 3)"),
        (("--batch", "2", "--preprocess", "msn-eval"), "begun with another preprocessing"),
        (("--batch", "2", "--output-name", "logits"), "begun with another output name"),
    ):
        result = embed(model, folder, output, "--resume", *options)
        assert result.exit_code == 1
        assert told in result.stderr
    result = embed(model, more, output, "--resume", "--batch", "2")
    assert "begun with another listing (45 pictures" in result.stderr


def test_resume_with_nothing_to_resume_starts(model, folder, tmp_path) -> None:
    result = embed(model, folder, tmp_path / "out.npy", "--resume", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["resumed_at"] == 0


def test_batches_do_not_depend_on_who_is_broken(model, folder, tmp_path) -> None:
    mended = tmp_path / "mended"
    pictures(mended, COUNT)
    for name in ("out.npy", "mended.npy"):
        source = folder if name == "out.npy" else mended
        assert embed(model, source, tmp_path / name).exit_code == 0
    good = [index for index, name in enumerate(names(folder)) if not is_broken(name)]
    np.testing.assert_array_equal(
        np.load(tmp_path / "out.npy")[good], np.load(tmp_path / "mended.npy")[good]
    )


def test_uint8_and_fp16_models_are_fed_what_they_take(folder, wanted, tmp_path) -> None:
    model = classifier(tmp_path / "m", "--input", "uint8", "--dtype", "fp16", heads=("cls",))
    output = tmp_path / "out.npy"
    assert embed(model, folder, output).exit_code == 0
    for name, vector in zip(names(folder), np.load(output), strict=True):
        if not is_broken(name):
            embedding = wanted[name][0]
            cosine = vector @ embedding / np.linalg.norm(vector) / np.linalg.norm(embedding)
            assert cosine > 0.999  # the gate of an fp16 graph
    lines = lines_of(tmp_path / "out.npy")
    assert set(lines[0]) == {"row", "path", "error"}  # no classifier


def test_file_names_that_are_no_text_do_not_stop_it(model, tmp_path) -> None:
    folder = pictures(tmp_path / "pictures", 2)
    good = (folder / "a" / "000.png").read_bytes()
    for name in (b"caf\xe9.png", b"new\nline.png"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(good)
    for name in ("out.npy", "out.parquet"):
        result = embed(model, folder, tmp_path / name)
        assert result.exit_code == 0, result.output
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["path"].to_pylist()[2:] == ["caf\\xe9.png", "new\nline.png"]


def test_a_graph_of_another_tool_runs_with_a_note(folder, tmp_path) -> None:
    model = foreign(tmp_path / "m.onnx", ["b", 3, 32, 32], {"features": 6})
    result = embed(model, folder, tmp_path / "out.npy", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["notes"] == ["m.onnx has no manifest: preprocessing hf assumed"]
    assert told["output_name"] == "features"


def test_numbers_that_are_none_are_errors(tmp_path) -> None:
    folder = pictures(tmp_path / "pictures", 3)
    from PIL import Image

    Image.new("RGB", (40, 40)).save(folder / "dark.png")
    Image.new("RGB", (40, 40), "white").save(folder / "white.png")
    model = foreign(tmp_path / "m.onnx", ["b", 3, 32, 32], {"features": 6}, bad=True)
    assert embed(model, folder, tmp_path / "out.npy").exit_code == 0
    lines = lines_of(tmp_path / "out.npy")
    told = {line["path"]: line["error"] for line in lines}
    assert told["white.png"] is None
    assert told["dark.png"] == "the model's features has NaN or infinity"


def test_a_machine_that_computes_something_else_is_noticed_first(model, folder, tmp_path) -> None:
    known = manifest.read(model)
    assert known is not None
    assert known.golden is not None
    values = golden.values_of(known.golden)[:, ::-1].copy()
    text = base64.b64encode(values.tobytes()).decode("ascii")
    other = tmp_path / "other.onnx"
    other.write_bytes(model.read_bytes())
    changed = replace(known, golden=replace(known.golden, values=text))
    (tmp_path / "other.onnx.json").write_text(manifest.seal(changed))
    result = embed(other, folder, tmp_path / "out.npy")
    assert result.exit_code == 1
    assert "selftest failed" in result.stderr
    assert "run it all the same with --no-check" in result.stderr
    result = embed(other, folder, tmp_path / "out.npy", "--no-check", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["selftest"] == "none (--no-check)"
    result = embed(model, folder, tmp_path / "out.npy", "--force", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["selftest"].startswith("selftest passed")


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


BAD = {
    "empty folder": (_empty, "holds no picture"),
    "all broken": (_all_broken, "none of the 3 pictures of"),
    "several outputs": (_several, "has the outputs left, right; choose one with --output-name"),
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
        (["-o", "out.csv"], "'--output': out.csv ends in neither .npy nor .parquet"),
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


def test_rows_that_did_not_come_back_are_no_output(model, folder, tmp_path, monkeypatch) -> None:
    made = Local.rows

    def without_the_second(self, *arguments):
        for start, rows in made(self, *arguments):
            if start != 4:
                yield start, rows

    with monkeypatch.context() as losing:
        losing.setattr(Local, "rows", without_the_second)
        result = embed(model, folder, tmp_path / "out.npy")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"error: 4 of {COUNT} rows did not come back; the same command with --resume makes them"
    )
    assert not (tmp_path / "out.npy").exists()
    result = embed(model, folder, tmp_path / "out.npy", "--resume", "--json")
    assert json.loads(result.stdout)["resumed_at"] == COUNT - 4


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
