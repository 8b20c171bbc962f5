"""An artifact is read without a GPU; only a manifest whose hash fits is believed."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from msn_export.cli import main
from msn_export.compare.inspection import inspect
from msn_export.errors import MsnExportError
from msn_export.reporting.describe import file_rows, inspection_rows
from tests.builders.checkpoints import hugging_face
from tests.builders.engine_builds import NEEDS_RTX

pytestmark = NEEDS_RTX


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export and compile a tiny checkpoint: m.onnx and m.engine with their manifests."""
    folder = tmp_path_factory.mktemp("artifacts")
    hugging_face(folder / "hf", labels=3)
    for arguments in (
        ["onnx", str(folder / "hf"), "-o", str(folder / "m.onnx"), "--head", "tokens"],
        ["trt", str(folder / "m.onnx"), "--fp16", "-o", str(folder / "m.engine"),
         "--backend", "tensorrt-rtx", "--compute-capability", "8.6"],
    ):  # fmt: skip
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    return folder


def test_an_engine_tells_what_it_is_made_of(artifacts) -> None:
    found = inspect(artifacts / "m.engine")
    assert found.kind == "engine"
    assert found.described == "m.engine.json, hash verified"
    assert found.runs_on.endswith("on SM 8.6")
    assert found.gemm_dtypes == {"Half": 8}
    assert found.convolution_dtypes == {"Half": 1}
    assert (found.attention_fused, found.attention_expected) == (2, 2)
    assert found.accumulators == {"fp16": 2}
    assert found.kernels == sum(found.kernel_kinds.values())
    assert set(found.kernels_per_block) == {"0", "1"}
    assert any(place.startswith("block 1: blocks.1.attn.") for place in found.layout_only)
    assert found.weight_bytes is not None
    assert 0 < found.weight_bytes < found.bytes
    assert found.weight_bytes + (found.other_bytes or 0) == found.bytes
    assert found.executed.startswith(("compiled, not executed", "yes"))


def test_the_patch_convolution_has_a_row_beside_the_products(artifacts) -> None:
    for name, products, convolutions in (
        ("m.engine", "8 Half", "1 Half"), ("m.onnx", "8 float", "1 float")
    ):  # fmt: skip
        rows = dict(inspection_rows(inspect(artifacts / name)))
        assert (rows["matrix products"], rows["convolutions"]) == (products, convolutions)
    shutil.copy(artifacts / "m.engine", artifacts / "alone.engine")  # its kernels are unknown
    assert "convolutions" not in dict(inspection_rows(inspect(artifacts / "alone.engine")))


def test_one_kernel_is_not_called_kernels(artifacts) -> None:
    found = inspect(artifacts / "m.engine")
    one = replace(found, layout_only=found.layout_only[:1], accumulators={"fp16": 2, "fp32": 1})
    rows = dict(inspection_rows(one))
    assert rows["layout only"].startswith("1 kernel (")
    sums = dict(file_rows(one, None))["attention sums in"]
    assert sums == "fp16 in 2 kernels, fp32 in 1 kernel"


def test_a_graph_is_counted_from_the_file_itself(artifacts) -> None:
    found = inspect(artifacts / "m.onnx")
    assert found.precision == "fp32"
    assert found.gemm_dtypes == {"float": 8}
    assert found.convolution_dtypes == {"float": 1}
    assert (found.attention_fused, found.attention_expected) == (2, 2)
    assert found.multiply_adds is not None
    assert found.multiply_adds > 0
    assert found.check.startswith("passed: 4 of seeded noise")


def test_a_manifest_speaks_for_its_artifact(artifacts, tmp_path) -> None:
    assert inspect(artifacts / "m.engine.json") == inspect(artifacts / "m.engine")
    shutil.copy(artifacts / "m.engine.json", tmp_path)
    alone = inspect(tmp_path / "m.engine.json")
    assert alone.described == "the manifest alone: its artifact is not beside it"
    assert alone.kernels == inspect(artifacts / "m.engine").kernels


def test_without_a_manifest_only_the_header_speaks(artifacts, tmp_path) -> None:
    shutil.copy(artifacts / "m.engine", tmp_path)
    found = inspect(tmp_path / "m.engine")
    assert found.described == "no manifest: only what the file itself tells"
    assert found.accumulators == {"fp16": 2}  # the source is in the engine
    assert found.kernels is None
    assert found.runs_on.endswith("on SM 8.6")


def test_a_manifest_of_another_file_is_not_believed(artifacts, tmp_path) -> None:
    shutil.copy(artifacts / "m.onnx", tmp_path / "x.onnx")
    shutil.copy(artifacts / "m.engine.json", tmp_path / "x.onnx.json")
    found = inspect(tmp_path / "x.onnx")
    assert found.described == "x.onnx.json is not believed: only what the file itself tells"
    assert found.distrusted is not None
    assert "x.onnx is not the file its manifest describes (" in found.distrusted
    assert (found.checkpoint, found.check) == (None, "unknown")
    assert inspect(tmp_path / "x.onnx.json") == found
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "x.onnx")])
    assert shown.exit_code == 1
    assert "not believed" in shown.stdout


def test_nor_is_a_damaged_one(artifacts, tmp_path) -> None:
    shutil.copy(artifacts / "m.onnx", tmp_path)
    (tmp_path / "m.onnx.json").write_text("{")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "m.onnx"), "--json"])
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert "m.onnx.json is not JSON" in told["distrusted"]
    assert told["gemm_dtypes"] == {"float": 8}


def test_two_artifacts_stand_side_by_side_with_differences_marked(artifacts) -> None:
    result = CliRunner().invoke(
        main, ["inspect", str(artifacts / "m.onnx"), str(artifacts / "m.engine")]
    )
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert any("matrix products ≠" in line and "8 Half" in line for line in lines)
    assert not any(line.startswith(("│ checkpoint", "│ sha256")) for line in lines)
    assert any(line.startswith("the same: checkpoint, ") for line in lines)
    assert any(line.startswith("different, for --all: described by, sha256, ") for line in lines)


def test_with_all_every_row_is_there(artifacts) -> None:
    sides = [str(artifacts / "m.onnx"), str(artifacts / "m.engine")]
    lines = CliRunner().invoke(main, ["inspect", *sides, "--all"]).stdout.splitlines()
    assert any(line.startswith("│ checkpoint  ") for line in lines)
    assert any(line.startswith("│ sha256 ≠") for line in lines)


def test_a_kind_of_kernel_is_explained(artifacts) -> None:
    shown = CliRunner().invoke(main, ["inspect", str(artifacts / "m.engine")]).stdout
    assert " kgen (generated code: element-wise work, layout," in " ".join(shown.split())


def test_json_is_one_object(artifacts) -> None:
    one = CliRunner().invoke(main, ["inspect", str(artifacts / "m.engine"), "--json"])
    assert json.loads(one.stdout)["gemm_dtypes"] == {"Half": 8}
    both = ["inspect", str(artifacts / "m.engine"), str(artifacts / "m.onnx"), "--json"]
    told = json.loads(CliRunner().invoke(main, both).stdout)
    assert [artifact["kind"] for artifact in told["artifacts"]] == ["engine", "onnx"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.engine", b"", "is empty"),
        ("x.engine", b"hello world", "is not a TensorRT engine"),
        ("x.engine.json", b"{", "is not JSON"),
        ("x.json", b"{}", "was changed or damaged after it was written"),
    ],
)
def test_what_is_no_artifact_is_named(name, content, message, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / name)])
    assert result.exit_code == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("kind", "beside", "message"),
    [
        (
            "ranges", True,
            "is a ranges file of calibrate, not a manifest; give {folder}/m.int8.onnx",
        ),
        (
            "ranges", False,
            "is a ranges file of calibrate, not a manifest; give the .onnx file that was written "
            "with it",
        ),
        (
            "bench", True,
            "is a benchmark of msn-export bench, not a manifest; give an .onnx or .engine file",
        ),
    ],
)  # fmt: skip
def test_another_json_file_is_called_what_it_is(kind, beside, message, tmp_path) -> None:
    path = tmp_path / "m.int8.ranges.json"
    path.write_text(json.dumps({"kind": kind, "schema": 1, "tensors": {}}))
    if beside:
        (tmp_path / "m.int8.onnx").write_bytes(b"")
    result = CliRunner().invoke(main, ["inspect", str(path)])
    assert result.exit_code == 1
    assert " ".join(result.stderr.split()).endswith(f"{path} {message.format(folder=tmp_path)}")


def mutate(path: Path, other: Path, kind: str, generator: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "truncated":
        del data[generator.randrange(len(data)) :]
    elif kind == "flipped":
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    else:
        data = bytearray(other.read_bytes())
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(200))
def test_a_mutated_engine_or_manifest_is_refused_or_not_believed(
    artifacts, tmp_path_factory, seed
) -> None:
    generator = random.Random(seed)  # noqa: S311  reproducible, not secret
    folder = tmp_path_factory.mktemp("mutated")
    for name in ("m.engine", "m.engine.json"):
        shutil.copy(artifacts / name, folder / name)
    victim = generator.choice(["m.engine", "m.engine.json"])
    kind = generator.choice(["truncated", "flipped", "swapped"])
    before = (folder / victim).read_bytes()
    mutate(folder / victim, artifacts / "m.onnx.json", kind, generator)
    changed = (folder / victim).read_bytes() != before
    try:
        found = inspect(folder / "m.engine")
    except MsnExportError as error:
        assert "\n" not in str(error)
        return
    believed = found.described == "m.engine.json, hash verified"
    assert not (believed and changed)


def test_a_graph_is_compiled_in_openvino_to_see_what_it_computes_in(
    artifacts, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plain = inspect(artifacts / "m.onnx")
    assert plain.compiled == {}
    found = inspect(artifacts / "m.onnx", ["openvino"])
    ((name, precision),) = found.compiled.items()
    assert name.startswith("OpenVINO ")
    assert precision.products == {"fp32": 9}
    arguments = ["inspect", str(artifacts / "m.onnx"), "--providers", "openvino"]
    result = CliRunner().invoke(main, arguments)
    assert "9 of 9 products in fp32, 2 attention in fp32" in " ".join(result.output.split())
    told = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert told["compiled"][name]["products"] == {"fp32": 9}
    with pytest.raises(
        MsnExportError, match=r"onnxruntime .* does not say what it computes in; Op"
    ):
        inspect(artifacts / "m.onnx", ["cpu"])
    with pytest.raises(MsnExportError, match="takes no providers"):
        inspect(artifacts / "m.engine", ["openvino"])
